"""Parts of a model's text: reasoning, answer and tool calls, told apart by the markers in its chat template.

A form is known by its markers, never by a model's name. Text whose markers never close is handed on as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rkf.runtime.generate import StopStrings
from rkf.runtime.guide import Form
from rkf.serve import channels
from rkf.serve.call_forms import call_grammar, read_calls
from rkf.serve.channels import ChannelSplitter
from rkf.serve.splitting import Splitter
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


@dataclass(frozen=True, slots=True)
class OutputForms:
    """The markers of one model. special: some of them are special tokens, so decoding must show those; in_channels:
    its answers are messages in channels (channels.py), which need no other markers.
    """

    reasoning: tuple[str, str] | None = None
    tools: tuple[str, str] | None = None
    special: bool = False
    in_channels: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> OutputForms:
        template = tokenizer.template or ""
        if all(marker in template for marker in channels.MARKERS):
            return cls(special=_are_special(channels.MARKERS, tokenizer), in_channels=True)
        reasoning = next((pair for pair in _REASONING if pair[1] in template), None)
        tools = next((pair for pair in _TOOLS if pair[0] in template), None)
        markers = [*(reasoning or ()), *(tools or ())]
        return cls(reasoning, tools, _are_special(markers, tokenizer))

    @property
    def reads_calls(self) -> bool:
        """Whether it knows the form of the model's calls."""
        return self.in_channels or self.tools is not None

    @property
    def before_form(self) -> str:
        """What comes between the prompt and an answer of a given form."""
        return channels.FINAL if self.in_channels else ""

    def required_call(self, tools: Mapping[str, Mapping[str, Any]]) -> tuple[str, Form]:
        """What comes between the prompt and a call of one of some functions, and the form of the call. tools: name to
        the schema of its arguments; `reads_calls` must hold.
        """
        if self.in_channels:
            header = f'{channels.CHANNEL} "commentary json" {channels.MESSAGE}'
            return channels.RECIPIENT, call_grammar(tools, "", header, "")
        before = "" if self.tools is None else self.tools[0] + "\n"
        return before, call_grammar(tools, '{"name": "', '"\\", \\"arguments\\": "', "}")

    def splitter(self, prompt_end: str, *, tools: bool) -> Splitter:
        """For one answer. prompt_end: the prompt's last text, which may open the reasoning or a call; tools: whether
        calls are expected.
        """
        if self.in_channels:
            return ChannelSplitter(prompt_end, tools=tools)
        expected = self.tools if tools else None
        for part, markers in (("reasoning", self.reasoning), ("call", expected)):
            if markers is not None and prompt_end.rstrip().endswith(markers[0]):
                return TagSplitter(self.reasoning, expected, part)
        return TagSplitter(self.reasoning, expected)


def _are_special(markers: Sequence[str], tokenizer: Tokenizer) -> bool:
    return any(marker not in tokenizer.decode(tokenizer.encode(marker, bos=False)) for marker in markers)


class TagSplitter(Splitter):
    """Splits at pairs of markers. Space at the start of a part belongs to its marker."""

    def __init__(self, reasoning: tuple[str, str] | None, tools: tuple[str, str] | None, part: str = "content") -> None:
        super().__init__()
        self._reasoning, self._tools, self._call = reasoning, tools, ""
        self._blank = reasoning is not None or tools is not None  # no text of this part yet
        self._part = part
        self._ends = self._markers()

    @property
    def reasons(self) -> bool:
        return self._part == "reasoning"

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
            self._end()
            self._part = "call" if self._tools is not None and marker == self._tools[0] else "content"
        elif self._part == "reasoning":
            self._part, self._reasoning = "content", None  # there is one part of reasoning, before the answer
        else:
            self._part = "call" if self._tools is not None and marker == self._tools[0] else "reasoning"
        self._blank = True
        self._ends = self._markers()

    def _end(self) -> None:
        """Read what was called; text that is no call is content."""
        if self._part != "call":
            return
        calls = read_calls(self._call)
        if not calls:
            self._content += (self._tools or ("", ""))[0] + self._call
        self._calls += calls
        self._call = ""

    def _markers(self) -> StopStrings:
        """What ends the present part."""
        if self._part == "content":
            opening = [pair[0] for pair in (self._reasoning, self._tools) if pair is not None]
            return StopStrings(opening)
        pair = self._reasoning if self._part == "reasoning" else self._tools
        return StopStrings([] if pair is None else [pair[1] or pair[0]])
