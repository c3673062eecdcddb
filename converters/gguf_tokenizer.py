"""A GGUF's tokenizer -> tokenizer.json (Hugging Face `tokenizers`) that encodes like the original.

Knows the three kinds that the supported families use: "gpt2" (byte-level BPE), "llama" (SentencePiece BPE with scores
and byte fallback) and "gemma4" (the same with a list of merges). Field names and defaults: llama.cpp,
src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from rkf.converters.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from rkf.errors import SourceError, StructureError, UnsupportedError
from rkf.model.metadata import SpecialToken
from rkf.text.tokenizer_json import load

# Texts that end a turn in some model. llama.cpp stops at each of them, regardless of the file's eos id.
END_OF_TURN = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
    *("<eos>", "<turn|>", "<|tool_response>"),
)
# Beside the first of these, the second is an ordinary token and ends nothing.
_NO_END = ("<|tool_response>", "</s>")
# tokenizer.ggml.*_token_id -> Hugging Face's names; GGUF spells it "seperator".
_TEMPLATE_NAMES = {"unknown": "unk_token", "padding": "pad_token", "seperator": "sep_token", "mask": "mask_token"}
_PREFIX = "tokenizer.ggml.add_space_prefix"
_SPACE = "▁"  # SentencePiece's visible space


def from_gguf(fields: Mapping[str, Any], label: str) -> bytes:
    """The tokenizer.json of the file. Raises SourceError or UnsupportedError that names the missing or unknown part."""
    texts = _texts(fields, label)
    kind = fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        built = _byte_level(fields, texts, _pre_tokenizer(fields, label), label)
    elif kind == "llama":
        built = _sentencepiece(fields, texts, _score_merges(fields, texts, label), label)
    elif kind == "gemma4":
        vocab = {text: index for index, text in enumerate(texts)}
        built = _sentencepiece({**fields, _PREFIX: False}, texts, _merges(fields, vocab, label), label)
    else:
        raise UnsupportedError(f"{label}: tokenizer kind {kind!r} is not supported; known: gpt2, llama, gemma4")
    _add_tokens(built, texts, _types(fields, texts, label))
    ids = special_ids(fields, label)
    if ids["add_bos"]:
        bos = texts[ids["bos_id"]]
        built.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids["bos_id"])]
        )
    return built.to_str(pretty=False).encode()


def special_ids(fields: Mapping[str, Any], label: str) -> dict[str, Any]:
    """bos_id, eos_ids and add_bos for ModelMetadata, with llama.cpp's defaults."""
    texts = _texts(fields, label)
    kind = fields.get("tokenizer.ggml.model")
    sentencepiece = kind == "llama"
    bos = _token_id(fields, "bos", 1 if sentencepiece else None, len(texts), label)
    ends = [_token_id(fields, key, None, len(texts), label) for key in ("eot", "eom")]
    ordinary = _NO_END[1:] if _NO_END[0] in texts else ()
    ends += [index for index, text in enumerate(texts) if text in END_OF_TURN and text not in ordinary]
    eos = _token_id(fields, "eos", 2 if sentencepiece else None, len(texts), label)
    others = sorted({end for end in ends if end is not None and end != eos})
    if kind == "gemma4":  # llama.cpp adds it there, whatever the field says
        add_bos = True
    else:
        default = sentencepiece or _pre_tokenizer(fields, label).add_bos
        add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", default))
    return {
        "bos_id": bos,
        "eos_ids": tuple(others if eos is None else [eos, *others]),
        "add_bos": bos is not None and add_bos,
    }


def special_tokens(fields: Mapping[str, Any], label: str) -> dict[str, SpecialToken]:
    """The tokens that the file names, by the names that chat templates use."""
    texts = _texts(fields, label)
    ids = {name: _token_id(fields, key, None, len(texts), label) for key, name in _TEMPLATE_NAMES.items()}
    known = special_ids(fields, label)
    ids["bos_token"] = known["bos_id"]
    ids["eos_token"] = _token_id(fields, "eos", next(iter(known["eos_ids"]), None), len(texts), label)
    return {name: SpecialToken(texts[each], each) for name, each in sorted(ids.items()) if each is not None}


def load_tokenizer(tokenizer_json: bytes, label: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json; SourceError if it is invalid."""
    try:
        return load(tokenizer_json)
    except StructureError as error:
        raise SourceError(f"{label}: {error}") from None


def _byte_level(fields: Mapping[str, Any], texts: Sequence[str], pre: PreTokenizer, label: str) -> Tokenizer:
    vocab = {text: index for index, text in enumerate(texts)}
    merges = _merges(fields, vocab, label)
    built = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    built.pre_tokenizer = pre.build()
    built.decoder = decoders.ByteLevel()
    built.post_processor = processors.ByteLevel(trim_offsets=False)
    return built


def _sentencepiece(
    fields: Mapping[str, Any], texts: Sequence[str], merges: list[tuple[str, str]], label: str
) -> Tokenizer:
    vocab = {text: index for index, text in enumerate(texts)}
    unknown = texts[_token_id(fields, "unknown", 0, len(texts), label) or 0]
    built = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(fields.get(_PREFIX, True))
    replace = normalizers.Replace(" ", _SPACE)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    built.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return built


def _score_merges(fields: Mapping[str, Any], texts: Sequence[str], label: str) -> list[tuple[str, str]]:
    scores = fields.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(texts):
        raise SourceError(f"{label}: tokenizer.ggml.scores: expected {len(texts)} numbers")
    return score_merges({text: index for index, text in enumerate(texts)}, scores)


def score_merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
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


def _merges(fields: Mapping[str, Any], vocab: Mapping[str, int], label: str) -> list[tuple[str, str]]:
    """The merge list with only the first occurrence of a pair, which decides its rank."""
    merges: dict[tuple[str, str], None] = {}
    for line in fields.get("tokenizer.ggml.merges", ()):
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or left not in vocab or right not in vocab or left + right not in vocab:
            raise SourceError(f"{label}: tokenizer.ggml.merges: {line!r} does not join two tokens into a third")
        merges.setdefault((left, right))
    if not merges:
        raise SourceError(f"{label}: tokenizer.ggml.merges is missing; a BPE of this kind needs it")
    return list(merges)


def _pre_tokenizer(fields: Mapping[str, Any], label: str) -> PreTokenizer:
    name = fields.get("tokenizer.ggml.pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(f"{label}: pre-tokenizer {name!r} is not known; known: {', '.join(PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[name]


def _texts(fields: Mapping[str, Any], label: str) -> list[str]:
    texts = fields.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts:
        raise SourceError(f"{label}: tokenizer.ggml.tokens is missing; a model needs its tokenizer")
    if len(set(texts)) != len(texts):
        raise SourceError(f"{label}: tokenizer.ggml.tokens: {len(texts) - len(set(texts))} tokens occur twice")
    return texts


def _types(fields: Mapping[str, Any], texts: Sequence[str], label: str) -> Sequence[int]:
    types = fields.get("tokenizer.ggml.token_type")
    if types is None:
        return [TokenType.NORMAL] * len(texts)
    if len(types) != len(texts):
        raise SourceError(f"{label}: tokenizer.ggml.token_type: expected {len(texts)} types, got {len(types)}")
    return types


def _token_id(fields: Mapping[str, Any], key: str, default: int | None, count: int, label: str) -> int | None:
    value = fields.get(f"tokenizer.ggml.{key}_token_id", default)
    if value is not None and not 0 <= value < count:
        raise SourceError(f"{label}: tokenizer.ggml.{key}_token_id: {value} is past the {count} tokens")
    return value


def _add_tokens(built: Tokenizer, texts: Sequence[str], types: Sequence[int]) -> None:
    """Tokens that are split off the text before anything else; decoding hides the special ones."""
    kinds = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
    added = [
        AddedToken(text, special=kinds[TokenType(kind)], normalized=False)
        for text, kind in zip(texts, types, strict=True)
        if kind in kinds
    ]
    built.add_tokens(added)
