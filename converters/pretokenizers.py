"""How a byte-level BPE splits text into words before it merges: GGUF's `tokenizer.ggml.pre` names, as a table.

The patterns come from the models' own tokenizer.json. The names, and which of them set BOS or skip merges, come from
llama.cpp (`llama_vocab::impl::load`, src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """splits: patterns applied in turn, each to the pieces of the one before; matches and gaps are both kept.

    ignore_merges: a word that is itself a token is not merged from parts. add_bos: the default if the file sets none.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        cuts = [pre_tokenizers.Split(Regex(split), "isolated") for split in self.splits]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_REST}"
_DEEPSEEK3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2_LIKE = PreTokenizer((_GPT2,))
_DIGITS_FIRST = PreTokenizer((_DIGIT, _GPT2))
_LLAMA3_LIKE = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_LIKE = PreTokenizer((_QWEN2,))

# Ordered by how specific a name is: `name_of` returns the first that fits.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "llama-bpe": _LLAMA3_LIKE,
    # Qwen's own tokenizer.json composes text first (NFC). A GGUF has no field for that, so like llama.cpp we do not.
    "qwen2": _QWEN2_LIKE,
    "smollm": _DIGITS_FIRST,
    "gpt-2": _GPT2_LIKE,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT)),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3_WORDS)),
    "stablelm2": _QWEN2_LIKE,
    "dbrx": PreTokenizer((_LLAMA3,)),
    "llama3": _LLAMA3_LIKE,
    "llama-v3": _LLAMA3_LIKE,
    "falcon3": _LLAMA3_LIKE,
    "pixtral": _LLAMA3_LIKE,
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "deepseek-r1-qwen": _QWEN2_LIKE,
    "megrez": _QWEN2_LIKE,
    "llama4": PreTokenizer((_GPT4O,)),
    "starcoder": _DIGITS_FIRST,
    "refact": _DIGITS_FIRST,
    "command-r": _DIGITS_FIRST,
    "codeshell": _DIGITS_FIRST,
    "exaone": _DIGITS_FIRST,
    "minerva-7b": _DIGITS_FIRST,
    "olmo": _GPT2_LIKE,
    "mpt": _GPT2_LIKE,
    "phi-2": _GPT2_LIKE,
    "trillion": _GPT2_LIKE,
    "granite-docling": _GPT2_LIKE,
    # llama.cpp's fallback for a file that names none.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def name_of(tokenizer: Mapping[str, Any]) -> str | None:
    """The GGUF name for a byte-level tokenizer.json, or None if no entry of the table splits words like it."""
    splits = _splits(tokenizer.get("pre_tokenizer") or {})
    if splits is None:
        return None
    whole = bool(tokenizer["model"].get("ignore_merges"))
    fitting = [name for name, pre in PRE_TOKENIZERS.items() if pre.splits == splits]
    exact = [name for name in fitting if PRE_TOKENIZERS[name].ignore_merges == whole]
    return next(iter(exact or fitting), None)


def _splits(step: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The patterns of a pre_tokenizer in tokenizer.json, or None for a kind that the table cannot express."""
    match step:
        case {"type": "Sequence", "pretokenizers": [*steps]}:
            parts = [_splits(each) for each in steps]
            return None if None in parts else tuple(split for part in parts if part for split in part)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return (pattern,)
        case {"type": "Digits", "individual_digits": True}:
            return (_DIGIT,)
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return (_GPT2,) if step.get("use_regex", True) else ()
    return None
