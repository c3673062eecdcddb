"""Parts of a model's text: reasoning, answer and tool calls, told apart by the markers in its chat template.

A form is known by its markers, never by a model's name. Text whose markers never close is handed on as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rkf.runtime.generate import StopStrings
from rkf.serve.call_forms import Call, read_calls
from rkf.text.tokenizer import Tokenizer

# Opening and closing marker; the first pair that a template names is its model's.
_REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<reasoning>", "</reasoning>"),
)
# Without a closing marker a call ends with the text, or at the next one.
_TOOLS = (("<tool_call>", "</tool_call>"), ("[TOOL_CALLS]", ""), ("<|tool_call|>", ""), ("<|python_tag|>", ""))


class Parts(NamedTuple):
    """What a piece of text adds to the parts of an answer."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputForms:
    """The markers of one model. special: some of them are special tokens, so decoding must show those."""

    reasoning: tuple[str, str] | None = None
    tools: tuple[str, str] | None = None
    special: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> OutputForms:
        template = tokenizer.template or ""
        reasoning = next((pair for pair in _REASONING if pair[1] in template), None)
        tools = next((pair for pair in _TOOLS if pair[0] in template), None)
        markers = [*(reasoning or ()), *(tools or ())]
        special = any(marker not in tokenizer.decode(tokenizer.encode(marker, bos=False)) for marker in markers)
        return cls(reasoning, tools, special)

    def splitter(self, prompt_end: str, *, tools: bool) -> Splitter:
        """For one answer. prompt_end: the prompt's last text, which may open the reasoning or a call; tools: whether
        calls are expected.
        """
        expected = self.tools if tools else None
        for part, markers in (("reasoning", self.reasoning), ("call", expected)):
            if markers is not None and prompt_end.rstrip().endswith(markers[0]):
                return Splitter(self.reasoning, expected, part)
        return Splitter(self.reasoning, expected)


class Splitter:
    """Splits the text of one answer as it arrives. Space at the start of a part belongs to its marker."""

    def __init__(self, reasoning: tuple[str, str] | None, tools: tuple[str, str] | None, part: str = "content") -> None:
        self._reasoning, self._tools = reasoning, tools
        self._content, self._thoughts, self._call = "", "", ""  # since the last call of push; all of an open call
        self._calls: list[Call] = []
        self._blank = reasoning is not None or tools is not None  # no text of this part yet
        self._part = part
        self._ends = self._markers()

    @property
    def reasons(self) -> bool:
        """Whether the text so far ends within the reasoning."""
        return self._part == "reasoning"

    def push(self, text: str) -> Parts:
        """The parts that `text` adds. Text that may begin a marker is held back."""
        while True:
            self._add(self._ends.push(text))
            if not self._ends.found:
                return self._taken()
            marker, text = self._ends.cut()
            self._enter(marker)

    def finish(self) -> Parts:
        """The rest, once no text comes any more."""
        self._add(self._ends.finish())
        if self._part == "call":
            self._end_call()
        return self._taken()

    def _add(self, text: str) -> None:
        if self._part == "call":
            self._call += text
            return
        if self._blank:
            text = text.lstrip()
            self._blank = not text
        if self._part == "reasoning":
            self._thoughts += text
        else:
            self._content += text

    def _enter(self, marker: str) -> None:
        if self._part == "call":
            self._end_call()
            self._part = "call" if self._tools is not None and marker == self._tools[0] else "content"
        elif self._part == "reasoning":
            self._part, self._reasoning = "content", None  # there is one part of reasoning, before the answer
        else:
            self._part = "call" if self._tools is not None and marker == self._tools[0] else "reasoning"
        self._blank = True
        self._ends = self._markers()

    def _end_call(self) -> None:
        """Read what was called; text that is no call is content."""
        calls = read_calls(self._call)
        if not calls:
            self._content += (self._tools or ("", ""))[0] + self._call
        self._calls += calls
        self._call = ""

    def _taken(self) -> Parts:
        found = Parts(self._content, self._thoughts, tuple(self._calls))
        self._content, self._thoughts, self._calls = "", "", []
        return found

    def _markers(self) -> StopStrings:
        """What ends the present part."""
        if self._part == "content":
            opening = [pair[0] for pair in (self._reasoning, self._tools) if pair is not None]
            return StopStrings(opening)
        pair = self._reasoning if self._part == "reasoning" else self._tools
        return StopStrings([] if pair is None else [pair[1] or pair[0]])
