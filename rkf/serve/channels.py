"""Answers in channels, as gpt-oss writes them: messages with a header that says what each is.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>
    <|start|>assistant to=functions.NAME<|channel|>commentary json<|message|>{…}<|call|>

`analysis` is reasoning, a recipient makes a call, and all else is for the user, also `commentary` without a recipient.
"""

from __future__ import annotations

import re

from rkf.runtime.generate import StopStrings
from rkf.serve.call_forms import call_of
from rkf.serve.splitting import Splitter

START, MESSAGE, CHANNEL = "<|start|>", "<|message|>", "<|channel|>"
MARKERS = (START, MESSAGE, CHANNEL)
FINAL = CHANNEL + "final" + MESSAGE  # the header of an answer, behind a prompt that ends before it
RECIPIENT = " to=functions."
_ENDS = ("<|end|>", "<|call|>", "<|return|>", START, CHANNEL)  # models forget to end a message before the next one
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")


class ChannelSplitter(Splitter):
    """prompt_end: the prompt's last text, in which the first header begins; tools: whether calls are expected."""

    def __init__(self, prompt_end: str, *, tools: bool) -> None:
        super().__init__()
        self._tools = tools
        self._header, message, _ = prompt_end.rpartition(START)[2].partition(MESSAGE)
        self._given = len(self._header)  # by the prompt
        self._part, self._body, self._name = "header", "", ""
        self._ends = StopStrings([MESSAGE])
        if message:
            self._enter(MESSAGE)

    @property
    def reasons(self) -> bool:
        return self._part == "analysis"

    def _add(self, text: str) -> None:
        if self._part == "header":
            self._header += text
        elif self._part == "analysis":
            self._thoughts += text
        elif self._part == "call":
            self._body += text
        else:
            self._content += text

    def _enter(self, marker: str) -> None:
        if self._part != "header":
            self._end()
            self._part, self._header, self._given = "header", marker if marker == CHANNEL else "", 0
            self._ends = StopStrings([MESSAGE])
            return
        channel, recipient = _CHANNEL.search(self._header), _RECIPIENT.search(self._header)
        if recipient is not None and self._tools:
            self._part, self._name, self._body = "call", recipient[1], ""
        else:
            self._part = "analysis" if channel is not None and channel[1] == "analysis" else "content"
        self._ends = StopStrings(_ENDS)

    def _end(self) -> None:
        """Read what was called; text that is no call, or that has no header, is content."""
        if self._part == "call":
            call = call_of(self._name, self._body)
            if call is None:
                self._content += self._body
            else:
                self._calls.append(call)
        elif self._part == "header" and not any(marker in self._header[self._given :] for marker in MARKERS):
            self._content += self._header[self._given :]
        self._body = self._header = ""
