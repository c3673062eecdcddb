"""Loads a tokenizer.json of unknown origin with the `tokenizers` library. Knows no model, no ids and no texts.

The library panics on some files, and its components can be chained until one letter becomes 2^40. So a file is loaded
under `one_line`, and refused unless each of its components is known and together they keep texts within a bound.
"""

from __future__ import annotations

import json
import os
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import tokenizers

from rkf.errors import StructureError

MAX_GROWTH = 1000  # bytes that the replacements of a normalizer or a decoder make of one; those of real models make 64
MAX_COMPONENTS = 64
MAX_AFFIX = 64  # bytes that a BPE puts before or behind the letters of a word
MAX_ID = 1 << 22  # the largest vocabularies have 300,000 tokens
MAX_WORD = 1000  # letters of a word that WordPiece tries in quadratic time; 100 by default
_TRIED = 64  # tokens whose texts are tried where the letter a has none

_NORMALIZERS = (
    *("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Strip", "StripAccents"),
    *("Precompiled", "Prepend", "Replace"),
)
_PRE_TOKENIZERS = (
    *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace", "Punctuation"),
    *("Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
)
_DECODERS = (*("BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"),)
_alone = threading.Lock()  # a process has one standard error


def load(tokenizer_json: bytes) -> tokenizers.Tokenizer:
    """The tokenizer, without truncation, padding and chance. Raises StructureError: invalid, or out of bounds."""
    with one_line("tokenizer.json"):
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if isinstance(tokenizer.model, tokenizers.models.BPE):
            tokenizer.model.dropout = None
    _check_model(tokenizer.model)
    _check("normalizer", tokenizer.normalizer, _NORMALIZERS)
    _check("pre_tokenizer", tokenizer.pre_tokenizer, _PRE_TOKENIZERS)
    _check("decoder", tokenizer.decoder, _DECODERS)
    return tokenizer


def around(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and behind a text; none if it does not leave the text whole.

    Use it under `one_line`: a post-processor can fail.
    """
    for text in _probes(tokenizer):
        bare, whole = tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.encode(text).ids
        for start in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[start : start + len(bare)] == bare:
                return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()


def _probes(tokenizer: tokenizers.Tokenizer) -> Iterator[str]:
    """Short texts, of which a tokenizer knows one at least."""
    yield "a"
    yield from sorted(tokenizer.get_vocab(with_added_tokens=False))[:_TRIED]


def ending(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that the post-processor puts behind a text; none if it fails."""
    with suppress(StructureError), one_line("tokenizer.json: post_processor"):
        return around(tokenizer)[1]
    return ()


def to_json(tokenizer: tokenizers.Tokenizer) -> str:
    """The tokenizer as tokenizer.json. Use it under `one_line`; ValueError: an id beyond MAX_ID. The library makes a
    list of all ids that no token has, up to the largest.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest > MAX_ID:
        raise ValueError(f"expected ids of at most {MAX_ID}, got {largest}")
    text: str = tokenizer.to_str()
    return text


@contextmanager
def one_line(what: str, quiet: bool = True) -> Iterator[None]:
    """Turn every failure of the library into a StructureError of one line that begins with `what`.

    A panic is no Exception, and it prints lines of its own. quiet: drop those, which takes 20 microseconds; what others
    write meanwhile is kept.
    """
    try:
        if not quiet:
            yield
        else:
            with _alone, _standard_error_held():
                yield
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise StructureError(f"{what}: {' '.join(str(error).split())[:300]}") from None


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # of no module that can be imported


@contextmanager
def _standard_error_held() -> Iterator[None]:
    """Collect what is written to the standard error's descriptor, and write it at the end unless a panic ended it."""
    held = os.memfd_create("rkf") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
    try:
        original = os.dup(2)
    except OSError:  # there is none
        original = -1
    try:
        if original >= 0:
            os.dup2(held, 2)
        yield
    except BaseException as error:
        if _is_panic(error):
            os.ftruncate(held, 0)
        raise
    finally:
        if original >= 0:
            os.dup2(original, 2)
            os.close(original)
            if size := os.lseek(held, 0, os.SEEK_END):
                os.lseek(held, 0, os.SEEK_SET)
                os.write(2, os.read(held, size))
        os.close(held)


def _check_model(model: Any) -> None:
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(getattr(model, name, None) or "") > MAX_AFFIX:
            raise StructureError(f"tokenizer.json: model, {name}: expected at most {MAX_AFFIX} bytes")
    if getattr(model, "max_input_chars_per_word", 0) > MAX_WORD:
        raise StructureError(f"tokenizer.json: model, max_input_chars_per_word: expected at most {MAX_WORD}")


def _check(name: str, component: Any, known: tuple[str, ...]) -> None:
    """Check a component and those inside it by their state, which is their part of tokenizer.json."""
    if component is None:
        return
    parts = list(_parts(json.loads(component.__getstate__())))
    if len(parts) > MAX_COMPONENTS:
        raise StructureError(f"tokenizer.json: {name}: expected at most {MAX_COMPONENTS} parts, got {len(parts)}")
    growth = 1.0
    for part in parts:
        if part["type"] not in known:
            raise StructureError(f"tokenizer.json: {name}: expected a type that rkf knows, got {part['type']!r}")
        if part["type"] == "Strip" and part.get("stop"):  # the library panics on tokens that are shorter
            raise StructureError(f"tokenizer.json: {name}, Strip: expected stop 0, got {part['stop']}")
        growth *= _growth(part)
    if growth > MAX_GROWTH:
        raise StructureError(f"tokenizer.json: {name}: expected at most {MAX_GROWTH} bytes for one, got {growth:.3g}")


def _parts(component: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if component["type"] != "Sequence":
        yield component
        return
    for inner in next(value for key, value in component.items() if key != "type"):
        yield from _parts(inner)


def _growth(part: dict[str, Any]) -> float:
    """The most bytes that a component makes of one. Unicode's own forms count as 1, which is what they nearly are."""
    if part["type"] == "Replace":
        pattern, content = part["pattern"], len(part["content"].encode())
        replaced = len(pattern["String"].encode()) if "String" in pattern else 0
        return max(1.0, content / replaced) if replaced else 1.0 + content  # a regular expression may match nothing
    if part["type"] == "Prepend":
        return 1.0 + len(part["prepend"].encode())
    if part["type"] == "Precompiled":  # the length of a table in bytes, the table, and the replacements, ended by zeros
        charsmap = b64decode(part["precompiled_charsmap"])
        replacements = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
        return float(max(1, *map(len, replacements.split(b"\0")))) / 3
    return 1.0
