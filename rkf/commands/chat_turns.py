"""The messages of a chat: those that are sent to the model, and the conversation as a file. Knows no model.

The file is JSON: {"rkf_conversation": 1, "messages": [{"role": …, "content": …}, …]}. A system message may come first;
then the user and the assistant take turns, and the assistant has the last word. docs/chat.md describes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rkf.errors import UsageError
from rkf.file.atomic import replacing
from rkf.text.reading import read_text

_VERSION = "rkf_conversation"
_FORM = 1
Turn = dict[str, str]


class ChatTurns:
    """turns: messages of the user and of the assistant in turn. left_out: the first turns, which no longer fit into the
    context: they are not sent, but saved.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system, self.turns, self.left_out = system, list[Turn](), 0

    def opening(self) -> list[Turn]:
        """The system message, if there is one."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def save(self, path: Path, force: bool) -> None:
        """Write it to a file that only its owner may read. UsageError: the file exists and `force` is not given."""
        text = json.dumps({_VERSION: _FORM, "messages": [*self.opening(), *self.turns]}, ensure_ascii=False, indent=1)
        with replacing(path, force=force, private=True) as file:
            file.write(f"{text}\n".encode())


def read_conversation(path: Path) -> ChatTurns:
    """The conversation in a file. UsageError: it cannot be read, or is not of this form."""
    text = read_text(path)
    try:
        found = json.loads(text)
        messages = _messages(found)
    except RecursionError:
        raise UsageError(f"{path}: nested too deep for a conversation") from None
    except ValueError as error:
        raise UsageError(f"{path}: no conversation that this version of rkf can read: {error}") from None
    conversation = ChatTurns()
    if messages and messages[0]["role"] == "system":
        conversation.system = messages.pop(0)["content"]
    conversation.turns = messages
    for number, message in enumerate(messages):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise UsageError(f"{path}: message {number + 1} after the system message: expected the role {expected}")
    if len(messages) % 2:
        raise UsageError(f"{path}: the last message has no answer: remove it")
    return conversation


def _messages(found: Any) -> list[Turn]:
    """The messages of the parsed file. ValueError: they are not of the form."""
    if not isinstance(found, dict) or _VERSION not in found:
        raise ValueError(f"expected {_VERSION} and messages")
    if found[_VERSION] != _FORM:
        raise ValueError(f"expected version {_FORM}, got {str(found[_VERSION])[:20]}")
    if found.keys() != {_VERSION, "messages"} or not isinstance(found["messages"], list):
        raise ValueError("expected nothing but a list of messages")
    for number, message in enumerate(found["messages"], 1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(f"message {number}: expected a role and a content")
        for text in message.values():
            if not isinstance(text, str):
                raise ValueError(f"message {number}: expected text")
            text.encode()  # UnicodeEncodeError, a ValueError: half of a surrogate pair
    return list(found["messages"])
