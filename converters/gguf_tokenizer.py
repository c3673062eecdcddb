"""A GGUF's tokenizer: tokenizer.json (Hugging Face `tokenizers`) that encodes like the original, and special tokens.

Knows the three kinds that the supported families use: "gpt2" (byte-level BPE), "llama" (SentencePiece BPE with scores
and byte fallback) and "gemma4" (the same with a list of merges). Field names, defaults and corrections: llama.cpp,
src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from gguf.constants import TokenType
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from rkf.converters.ends import END_OF_TURN, FILL_ENDS, ends, not_ends
from rkf.converters.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from rkf.errors import SourceError, UnsupportedError
from rkf.model.metadata import SpecialToken

# tokenizer.ggml.*_token_id -> Hugging Face's names; GGUF spells it "seperator".
_TEMPLATE_NAMES = {"unknown": "unk_token", "padding": "pad_token", "seperator": "sep_token", "mask": "mask_token"}
# Ids that a SentencePiece vocabulary has unless fields say otherwise.
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
# Tokens of fill-in-the-middle. Unless a field names one, llama.cpp knows it by its text, as a control token.
_FILL = FILL_ENDS | {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
}
# The types of tokens that llama.cpp always shows, and of those that end nothing beside others.
_PLAIN = {"<|end|>": TokenType.USER_DEFINED, "</s>": TokenType.NORMAL}
_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_PREFIX = "tokenizer.ggml.add_space_prefix"
_SPACE = "▁"  # SentencePiece's visible space
# A piece of SentencePiece is cut at every letter, so a long one costs its square; the longest in use have about 100.
_MAX_PIECE = 1024


class GgufTokenizer:
    """The tokenizer in the fields of a GGUF. notes: a line for each of its values that llama.cpp replaces, as is done
    here.

    Raises SourceError or UnsupportedError that names the missing or unknown part.
    """

    def __init__(self, fields: Mapping[str, Any], label: str) -> None:
        self._fields, self._label = fields, label
        self.notes: list[str] = []
        self._kind = fields.get("tokenizer.ggml.model")
        if self._kind not in ("gpt2", "llama", "gemma4"):
            known = "gpt2, llama, gemma4"
            raise UnsupportedError(f"{label}: tokenizer kind {self._kind!r} is not supported; known: {known}")
        self._sentencepiece = self._kind == "llama"
        self._texts = self._read_texts()
        self._vocab = {text: index for index, text in enumerate(self._texts)}
        if len(self._vocab) != len(self._texts):
            count = len(self._texts) - len(self._vocab)
            raise SourceError(f"{label}: tokenizer.ggml.tokens: {count} tokens occur twice")
        self.bos_id = self._token_id("bos")
        self.eos_ids = self._ends()
        self.add_bos = self.bos_id is not None and self._adds_bos()
        self.special_tokens = self._special_tokens()

    def to_json(self) -> bytes:
        """The tokenizer.json."""
        if self._kind == "gpt2":
            built = self._byte_level()
        elif self._sentencepiece:
            built = self._pieces(self._score_merges(), prefix=bool(self._fields.get(_PREFIX, True)))
        else:
            built = self._pieces(self._merges(), prefix=False)
        self._add_tokens(built)
        before = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        eos = self._token_id("eos") if self._fields.get("tokenizer.ggml.add_eos_token") else None
        behind = [] if eos is None else [eos]
        if before or behind:
            built.post_processor = _around(self._texts, before, behind)
        return built.to_str(pretty=False).encode()

    def _ends(self) -> tuple[int, ...]:
        named = [index for key in ("eos", "eot", "eom", *FILL_ENDS) if (index := self._token_id(key)) is not None]
        unnamed = [key for key in FILL_ENDS if self._token_id(key) is None]
        return ends(named, self._vocab.get, unnamed)

    def _adds_bos(self) -> bool:
        if self._kind == "gemma4":  # llama.cpp adds it there, whatever the field says
            return True
        default = self._sentencepiece or self._pre_tokenizer.add_bos
        return bool(self._fields.get("tokenizer.ggml.add_bos_token", default))

    def _special_tokens(self) -> dict[str, SpecialToken]:
        """The tokens that the file names, by the names that chat templates use."""
        ids = {name: self._token_id(key) for key, name in _TEMPLATE_NAMES.items() if self._is_named(key)}
        ids["bos_token"] = self.bos_id
        ids["eos_token"] = next(iter(self.eos_ids), None) if (eos := self._token_id("eos")) is None else eos
        return {name: SpecialToken(self._texts[each], each) for name, each in sorted(ids.items()) if each is not None}

    def _is_named(self, key: str) -> bool:
        return f"tokenizer.ggml.{key}_token_id" in self._fields

    def _token_id(self, key: str) -> int | None:
        """The id of a special token. As in llama.cpp, one past the tokens is as if it were absent."""
        field, count = f"tokenizer.ggml.{key}_token_id", len(self._texts)
        default = _SENTENCEPIECE_IDS.get(key) if self._sentencepiece else None
        value = self._fields.get(field, default)
        if value is None or 0 <= value < count:
            return value
        note = f"{field}: {value} is past the {count} tokens, so it is ignored"
        if self._is_named(key) and note not in self.notes:
            self.notes.append(note)
        return default if default is not None and default < count else None

    @cached_property
    def _pre_tokenizer(self) -> PreTokenizer:
        name = self._fields.get("tokenizer.ggml.pre") or "default"
        if name not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise UnsupportedError(f"{self._label}: pre-tokenizer {name!r} is not known; known: {known}")
        return PRE_TOKENIZERS[name]

    def _read_texts(self) -> list[str]:
        given = self._fields.get("tokenizer.ggml.tokens")
        if not given:
            raise SourceError(f"{self._label}: tokenizer.ggml.tokens is missing; a model needs its tokenizer")
        return [text or f"[EMPTY_{index}]" for index, text in enumerate(given)]

    def _byte_level(self) -> Tokenizer:
        pre = self._pre_tokenizer
        built = Tokenizer(models.BPE(self._vocab, self._merges(), ignore_merges=pre.ignore_merges))
        built.pre_tokenizer = pre.build()
        built.decoder = decoders.ByteLevel()
        built.post_processor = processors.ByteLevel(trim_offsets=False)
        return built

    def _pieces(self, merges: list[tuple[str, str]], prefix: bool) -> Tokenizer:
        """SentencePiece's BPE. prefix: put a space before a text."""
        unknown = self._texts[self._token_id("unknown") or 0]
        built = Tokenizer(models.BPE(self._vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        replace = normalizers.Replace(" ", _SPACE)
        built.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        built.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
        return built

    def _score_merges(self) -> list[tuple[str, str]]:
        scores, count = self._fields.get("tokenizer.ggml.scores"), len(self._texts)
        numbers = np.asarray(() if scores is None else scores)
        if len(numbers) < count or numbers.dtype.kind not in "fi" or np.isnan(numbers).any():
            raise SourceError(f"{self._label}: tokenizer.ggml.scores: expected {count} numbers")
        longest = max(self._texts, key=len)
        if len(longest) > _MAX_PIECE:
            raise SourceError(
                f"{self._label}: tokenizer.ggml.tokens: token {self._vocab[longest]} has {len(longest)} characters, "
                f"expected at most {_MAX_PIECE}"
            )
        return score_merges(self._vocab, numbers)

    def _merges(self) -> list[tuple[str, str]]:
        """The merge list with only the first occurrence of a pair, which decides its rank."""
        merges: dict[tuple[str, str], None] = {}
        for line in self._fields.get("tokenizer.ggml.merges", ()):
            cut = line.find(" ", 1)
            left, right = line[:cut], line[cut + 1 :]
            if cut < 0 or left not in self._vocab or right not in self._vocab or left + right not in self._vocab:
                problem = f"{line!r} does not join two tokens into a third"
                raise SourceError(f"{self._label}: tokenizer.ggml.merges: {problem}")
            merges.setdefault((left, right))
        if not merges:
            raise SourceError(f"{self._label}: tokenizer.ggml.merges is missing; a BPE of this kind needs it")
        return list(merges)

    def _types(self) -> list[int]:
        """The type of each token, corrected as in llama.cpp: texts that look like control tokens are."""
        given, count = self._fields.get("tokenizer.ggml.token_type"), len(self._texts)
        if given is not None and len(given) < count:
            raise SourceError(f"{self._label}: tokenizer.ggml.token_type: expected {count} types, got {len(given)}")
        types = [int(TokenType.NORMAL)] * count if given is None else [int(each) for each in given[:count]]
        filling = [text for key, texts in _FILL.items() if self._token_id(key) is None for text in texts]
        kinds = dict.fromkeys((*END_OF_TURN, *filling), TokenType.CONTROL)
        kinds |= dict.fromkeys(_SHOWN, TokenType.USER_DEFINED)
        kinds |= {text: _PLAIN[text] for text in not_ends(self._vocab.get)}
        for text, kind in kinds.items():
            if text in self._vocab:
                types[self._vocab[text]] = kind
        return types

    def _add_tokens(self, built: Tokenizer) -> None:
        """Tokens that are split off the text before anything else; decoding hides the special ones."""
        special = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
        kinds: dict[int, bool] = {int(kind): hidden for kind, hidden in special.items()}
        added = [
            AddedToken(text, special=kinds[kind], normalized=False)
            for text, kind in zip(self._texts, self._types(), strict=True)
            if kind in kinds
        ]
        built.add_tokens(added)


def score_merges(vocab: Mapping[str, int], scores: Sequence[float] | NDArray[Any]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE, best first: every split of a piece into two pieces, by the piece's score.

    SentencePiece joins the neighbours whose joint piece scores highest, the leftmost of equals. A ranked list of pairs
    does the same if the pairs of each piece are adjacent.
    """
    ranked = sorted(vocab.items(), key=lambda item: (-float(scores[item[1]]), item[1]))
    return [
        (piece[:cut], piece[cut:])
        for piece, _ in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]


def _around(texts: Sequence[str], before: Sequence[int], behind: Sequence[int]) -> processors.PostProcessor:
    """Puts tokens before and behind each text. The library's own constructor takes a text with a space for two."""

    def framed(name: str, kind: int) -> list[dict[str, Any]]:
        first, last = (
            [{"SpecialToken": {"id": texts[each], "type_id": kind}} for each in ids] for ids in (before, behind)
        )
        return [*first, {"Sequence": {"id": name, "type_id": kind}}, *last]

    tokens = {texts[each]: {"id": texts[each], "ids": [each], "tokens": [texts[each]]} for each in (*before, *behind)}
    template = {"single": framed("A", 0), "pair": framed("A", 0) + framed("B", 1), "special_tokens": tokens}
    bare = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [], "version": "1.0"}
    post = {"type": "TemplateProcessing", **template}
    return Tokenizer.from_str(json.dumps(bare | {"post_processor": post})).post_processor
