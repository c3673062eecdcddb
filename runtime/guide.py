"""Answers of a given form: a JSON schema, a regular expression or a grammar as the tokens allowed next (llguidance).

Work on a form is bounded: llguidance gives up beyond limits of its own, and a text beyond `MOST_CHARS` is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UsageError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MOST_CHARS = 1 << 18  # a schema of this size compiles in a second
_SPACES = r"[ \n\t]{1,40}"  # in JSON; without a bound small models write spaces without end


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer must match. text: a JSON schema as JSON, a regular expression, or a grammar in Lark's syntax."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str


def json_part(schema: Mapping[str, Any]) -> str:
    """A JSON schema as the right side of a rule in Lark's syntax."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": _SPACES}})


def check(form: Form) -> None:
    """Refuse what is wrong for every tokenizer. UsageError: the form is not valid or too large; llguidance is not
    installed.
    """
    grammar = _grammar(form)
    from llguidance import LLMatcher

    error = LLMatcher.validate_grammar(grammar)
    if error:
        raise UsageError(f"{form.kind}: {_line(error)}")


class Guides:
    """Makes guides for one tokenizer."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._json, self._vocab_size, self._eos_ids = tokenizer_json, vocab_size, list(eos_ids)

    def guide(self, form: Form) -> Guide:
        """A guide for one answer. It may take a second and can run on any thread.

        UsageError: the form is not valid, too large or too complex; the model has no token that ends an answer;
        llguidance is not installed.
        """
        grammar = _grammar(form)
        if not self._eos_ids:
            raise UsageError("answers of a given form need a model with a token that ends an answer")
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"{form.kind}: {_line(matcher.get_error())}")
        return Guide(matcher, self._vocab_size)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        return LLTokenizer(self._json, n_vocab=self._vocab_size, eos_token=self._eos_ids)


class Guide:
    """Follows one answer. `allowed` and `accept` are called in turn."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._mask = np.zeros(-(-vocab_size // 32), np.int32)

    def copy(self) -> Guide:
        """A guide in the same state, for another answer; much cheaper than a new one."""
        return Guide(self._matcher.deep_copy(), self._vocab_size)

    def allowed(self) -> NDArray[np.bool_]:
        """The tokens that may come next: bool[vocab]. UsageError: the form got too complex."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        bits = np.unpackbits(self._mask.view(np.uint8), count=self._vocab_size, bitorder="little")
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("<state>")[0]  # then come pages about the parser
            raise UsageError(f"the answer's form cannot be followed: {_line(reason)}")
        return bits.view(np.bool_)

    def accept(self, token: int) -> None:
        """Go on after an allowed token."""
        self._matcher.consume_token(token)


def _grammar(form: Form) -> str:
    """The form in llguidance's own. UsageError: see `check`."""
    if find_spec("llguidance") is None:
        raise UsageError("answers of a given form need llguidance: pip install 'rkf-llm[serve]'")
    if len(form.text) > MOST_CHARS:
        raise UsageError(f"{form.kind}: {len(form.text)} characters, expected at most {MOST_CHARS}")
    from llguidance import LLMatcher

    try:
        if form.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(form.text, defaults={"whitespace_pattern": _SPACES})
        made = LLMatcher.grammar_from_regex if form.kind == "regex" else LLMatcher.grammar_from_lark
        return made(form.text)
    except ValueError as error:
        raise UsageError(f"{form.kind}: {_line(error)}") from None


def _line(error: object) -> str:
    return " ".join(str(error).split())[:500]
