"""`rkf chat`: a conversation, line by line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkf.commands.answering import (
    MODEL,
    answering_options,
    load_model,
    loading_options,
    say_if_cut,
    say_recommended,
    session,
)
from rkf.commands.chat_turns import ChatTurns, Turn, read_conversation
from rkf.commands.line_editor import at_terminal, edited_lines, piped_lines
from rkf.commands.options import answer_keywords
from rkf.commands.output import write_text
from rkf.errors import ContextLengthError, RkfError, UsageError
from rkf.file.atomic import reporting
from rkf.text.terminal import printable

if TYPE_CHECKING:
    from rkf.runtime.generate import Generation
    from rkf.runtime.model import Model

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
_HELP = """\
/save FILE    save the conversation
/load FILE    go on with a saved one
/system TEXT  set the system message; without TEXT, remove it
/retry        answer the last message again
/help         this list
Enter sends; Alt-Enter or Ctrl-J breaks the line. A space before a / sends it as text.
Ctrl-C stops an answer, Ctrl-D leaves."""


@click.command()
@MODEL
@answering_options
def chat(model: Path | None, system: str | None, session_file: Path | None, **options: Any) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D quits, /help tells the rest. Without MODEL:
    SmolLM2-135M-Instruct.
    """
    loading = loading_options(options)
    keywords = answer_keywords(options)
    with load_model(model, **loading) as ready:
        say_recommended(ready, keywords)
        if "form" in keywords:
            ready.guides.guide(keywords["form"])  # refused now, not after the first line
        chat = _Chat(ready, ChatTurns(system), keywords)
        with session(ready, session_file):
            if at_terminal():
                _talk(chat)
            else:
                _answer_lines(chat)


def _talk(chat: _Chat) -> None:
    """A chat at a terminal: lines may be commands, and what was refused can be edited."""
    read, begun = edited_lines(), ""
    while (line := read(begun)) is not None:
        begun = ""
        try:
            command = _COMMAND.fullmatch(line.rstrip())
            if command is None:
                chat.say(line)
            else:
                chat.obey(command[1], command[2] or "")
        except UsageError as error:
            click.echo(f"({printable(error)})", err=True)
            begun = line
        except RkfError as error:
            click.echo(f"({printable(error)})", err=True)


def _answer_lines(chat: _Chat) -> None:
    """A chat with a pipe: each line is a message. None is a command, because pipes carry text of any origin."""
    read = piped_lines()
    while (line := read("")) is not None:
        try:
            chat.say(line)
        except ContextLengthError as error:  # of this line alone: the conversation goes on without it
            click.echo(f"({error})", err=True)


class _Chat:
    """A conversation with a model, and what a line does to it. own_file: the file that /save may write again."""

    def __init__(self, model: Model, conversation: ChatTurns, options: dict[str, Any]) -> None:
        self._model, self._conversation, self._options = model, conversation, options
        self._own_file: Path | None = None
        self._retries = 0

    def say(self, line: str) -> None:
        """Print the answer to a message. ContextLengthError: it does not fit; the conversation is as before."""
        if line.strip():
            self._retries = 0
            self._answer([*self._conversation.turns, {"role": "user", "content": line}])

    def obey(self, command: str, argument: str) -> None:
        """Run a command. UsageError: there is none of this name, or it cannot be done."""
        if command == "system":
            self._conversation.system = argument or None
            click.echo(f"(the system message is {'set' if argument else 'removed'})", err=True)
        elif command in ("save", "load"):
            path = _path(argument)
            self._save(path) if command == "save" else self._load(path)
        elif command == "retry":
            self._retry()
        elif command == "help":
            click.echo(_HELP, err=True)
        else:
            raise UsageError(f"/{command} is no command: /help lists them; begin with a space to send it as text")

    def _save(self, path: Path) -> None:
        with reporting(path):
            exists = path.exists()
        if exists and path != self._own_file:
            raise UsageError(f"{path}: exists already: choose another name")
        self._conversation.save(path, force=path == self._own_file)
        self._own_file = path
        click.echo(f"(saved {len(self._conversation.turns)} messages)", err=True)

    def _load(self, path: Path) -> None:
        self._conversation = read_conversation(path)
        self._own_file, self._retries = path, 0
        turns = self._conversation.turns
        click.echo(f"(loaded {len(turns)} messages{'; the last one:' if turns else ''})", err=True)
        if turns:
            write_text(turns[-1]["content"])
            click.echo()

    def _retry(self) -> None:
        if not self._conversation.turns:
            raise UsageError("there is nothing to answer again")
        self._retries += 1
        generation = self._answer(self._conversation.turns[:-1])
        if generation is not None and generation.choose.sampling.temperature == 0:
            click.echo("(temperature 0 gives the same answer each time)", err=True)

    def _answer(self, turns: list[Turn]) -> Generation | None:
        """Print the answer to the last of `turns` as it is generated, and go on from there; Ctrl-C keeps a part."""
        pieces, generation = list[str](), None
        try:
            generation = self._stream(turns)
            for piece in generation:
                pieces.append(piece)
                write_text(piece)
            click.echo()
            say_if_cut(generation)
        except KeyboardInterrupt:
            click.echo(" (stopped)", err=True, nl=False)
            click.echo()
        self._conversation.turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]
        return generation

    def _stream(self, turns: list[Turn]) -> Generation:
        """Start an answer. The oldest turns are left out as far as the context demands, never the system message."""
        before = left_out = min(self._conversation.left_out, len(turns) - 1)
        while True:
            try:
                generation = self._started(turns[left_out:])
                break
            except ContextLengthError:
                if left_out == before:  # before anything is left out: does the message fit at all?
                    self._check_alone(turns[-1])
                left_out += 2
        if left_out > before:
            click.echo(f"(the oldest {left_out} messages no longer fit the context: the model forgets them)", err=True)
        self._conversation.left_out = left_out
        return generation

    def _check_alone(self, turn: Turn) -> None:
        try:
            self._started([turn])
        except ContextLengthError as error:
            raise ContextLengthError(f"{error}; the line was not sent, and nothing is forgotten") from None

    def _started(self, turns: list[Turn]) -> Generation:
        options = dict(self._options)
        if self._retries and options.get("seed") is not None:  # another text, and the same one if all is repeated
            options["seed"] = (options["seed"] + self._retries) % (1 << 64)
        return self._model.stream([*self._conversation.opening(), *turns], **options)


def _path(text: str) -> Path:
    if not text.strip() or not text.isprintable():
        raise UsageError("expected the name of a file after the command")
    try:
        return Path(text.strip()).expanduser()
    except RuntimeError as error:  # there is no such user
        raise UsageError(f"{text}: {error}") from None
