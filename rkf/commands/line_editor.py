"""Reads the lines of a chat: from a terminal with an editor (prompt_toolkit), or plainly from a pipe. Knows no chat."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from rkf.cache import cache_dir
from rkf.errors import OutputError
from rkf.text.terminal import masked

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

_MOST_HISTORY_BYTES = 1 << 26  # it is read whole when a chat begins
ReadLine = Callable[[str], str | None]
"""The text that the next line begins with -> the line; None at the end of input. A pipe begins with nothing."""


class _Discarded(Exception):
    """Ctrl-C at the prompt. Not KeyboardInterrupt, which SIGTERM raises: that ends the chat."""


def at_terminal() -> bool:
    """Whether a person sits at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def piped_lines() -> ReadLine:
    """Lines of stdin, one message each. Bytes that are not UTF-8 spoil their line alone."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")

    def read(begun: str) -> str | None:
        line = sys.stdin.readline()
        return line.removesuffix("\n").removesuffix("\r") if line else None

    return lambda begun: _unspoilt(read, begun)


def edited_lines() -> ReadLine:
    """Texts of one or more lines that the user edits: Enter sends, Alt-Enter or Ctrl-J breaks the line, the arrows go
    through those of earlier chats.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput

    class Harmless(Processor):
        """Shows characters that control the direction of text as one replacement character each."""

        def apply_transformation(self, given: TransformationInput) -> Transformation:
            return Transformation([(each[0], masked(each[1])) for each in given.fragments])

    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
        history=history(),
        input_processors=[Harmless()],
        interrupt_exception=_Discarded,
    )

    def read(begun: str) -> str | None:
        while True:
            try:
                return session.prompt(default=begun)
            except EOFError:
                return None
            except _Discarded:
                begun = ""
                click.echo("(Ctrl-D leaves, /help tells more)", err=True)

    return lambda begun: _unspoilt(read, begun)


def _unspoilt(read: ReadLine, begun: str) -> str | None:
    """The next line that is text."""
    while (line := read(begun)) is not None:
        try:
            line.encode()
            return line
        except UnicodeEncodeError:
            click.echo("(the line is not UTF-8; it was ignored)", err=True)
    return None


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def history() -> History:
    """The lines of earlier chats, in a file that only the user can read; those of this chat alone if it cannot be."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    from rkf.file.private import private_folder, read_private

    class Kept(FileHistory):
        """A line that cannot be kept is still a line of this chat."""

        def store_string(self, string: str) -> None:
            with suppress(OSError):
                super().store_string(string)

    try:
        folder = cache_dir() / "chat"
        private_folder(folder)
        path = folder / "history"
        if not path.is_symlink():
            path.touch(mode=0o600)
        return InMemoryHistory() if read_private(path, _MOST_HISTORY_BYTES) is None else Kept(str(path))
    except (OutputError, OSError):
        return InMemoryHistory()
