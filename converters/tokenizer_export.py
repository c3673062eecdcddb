"""tokenizer.json -> the tokenizer fields of a GGUF. The inverse of gguf_tokenizer.py, for the same two kinds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gguf
from gguf.constants import TokenType
from tokenizers import Tokenizer

from rkf.converters.ends import ends
from rkf.converters.folder_tokenizer import some
from rkf.converters.pretokenizers import PRE_TOKENIZERS, name_of
from rkf.errors import StructureError, UnsupportedError
from rkf.model.metadata import ModelMetadata
from rkf.text.tokenizer_json import ending, load

# ModelMetadata.special_tokens -> the part of the name of its field, and of the writer's method.
_NAMES = {"unk_token": "unk", "pad_token": "pad", "sep_token": "sep", "mask_token": "mask"}
# Normalizers that SentencePiece's kind has in llama.cpp.
_SPACES = ("Prepend", "Replace")


def parsed(tokenizer_json: bytes, rows: int) -> dict[str, Any]:
    """The tokenizer.json of a file as the library writes it, so its older forms need no care.

    StructureError if it is invalid, has a token past the rows of the embedding, or one whose id the library changes.
    """
    tokenizer = load(tokenizer_json)
    for token in json.loads(tokenizer_json).get("added_tokens", ()):
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            expected = tokenizer.token_to_id(token["content"])
            raise StructureError(
                f"tokenizer.json: token {some([token['content']])} has id {token['id']}, not {expected}"
            )
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= rows:
        raise StructureError(f"tokenizer.json has id {largest}, expected ids below {rows}")
    found: dict[str, Any] = json.loads(tokenizer.to_str(pretty=False))
    return found


def token_text(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    """The text of every token of a parsed tokenizer.json, by id."""
    vocab = tokenizer["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram's: pairs of a text and its score, by id
        texts = {index: text for index, (text, _) in enumerate(vocab)}
    else:
        texts = {index: text for text, index in vocab.items()}
    return texts | {token["id"]: token["content"] for token in tokenizer["added_tokens"]}


def gguf_fields(writer: gguf.GGUFWriter, tokenizer_json: bytes, model: ModelMetadata) -> list[str]:
    """Add the tokenizer to a GGUF. Returns a line for each of its rules that llama.cpp does not have.

    UnsupportedError if llama.cpp has no equivalent of the whole.
    """
    count = model.vocab_size
    tokenizer = parsed(tokenizer_json, count)
    if tokenizer["model"]["type"] != "BPE":
        raise UnsupportedError(f"tokenizer.json: kind {tokenizer['model']['type']!r} has no GGUF form here")
    texts, merges = token_text(tokenizer), tokenizer["model"]["merges"]
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(count)])
    writer.add_token_types(_types(tokenizer, texts, count))
    if _is_sentencepiece(tokenizer):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(texts, merges, count))
        writer.add_add_space_prefix(_has_prefix(tokenizer))
    else:
        pre = name_of(tokenizer)
        if pre is None:
            raise UnsupportedError("tokenizer.json: no pre-tokenizer of llama.cpp splits words like it")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for name, field in _NAMES.items():
        token = model.special_tokens.get(name)
        if token is not None and token.id is not None:
            getattr(writer, f"add_{field}_token_id")(token.id)
    if model.bos_id is not None:
        writer.add_bos_token_id(model.bos_id)
    writer.add_add_bos_token(model.add_bos)
    return [
        *_lost(tokenizer),
        *_add_ends(writer, texts, model),
        *_add_ending(writer, load(tokenizer_json), texts, model),
    ]


def _add_ends(writer: gguf.GGUFWriter, texts: Mapping[int, str], model: ModelMetadata) -> list[str]:
    """Add the tokens that end an answer. Beside the three that a GGUF names, llama.cpp knows some by their texts."""
    first = next(iter(_first_end(model)), None)
    known = ends([], {text: index for index, text in texts.items()}.get)
    named = [] if first is None else [first]
    named += [index for index in model.eos_ids if index != first and index not in known]
    for index, add in zip(
        named, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False
    ):
        add(index)
    unnamed = [texts.get(index, str(index)) for index in named[3:]]
    return [f"a GGUF cannot name these tokens as ends of an answer: {some(unnamed)}"] if unnamed else []


def _first_end(model: ModelMetadata) -> tuple[int, ...]:
    """The token that a GGUF names EOS, or none."""
    eos = model.special_tokens.get("eos_token")
    return (eos.id,) if eos is not None and eos.id in model.eos_ids else tuple(model.eos_ids[:1])


def _add_ending(
    writer: gguf.GGUFWriter, tokenizer: Tokenizer, texts: Mapping[int, str], model: ModelMetadata
) -> Iterator[str]:
    """Say that a token stands behind each text, as models for embeddings want it. A GGUF knows only EOS there."""
    behind = ending(tokenizer)
    if behind and behind == _first_end(model):
        writer.add_add_eos_token(True)
    elif behind:
        yield f"a GGUF cannot put these tokens behind a text: {some([texts.get(each, str(each)) for each in behind])}"


def _lost(tokenizer: Mapping[str, Any]) -> Iterator[str]:
    """The rules of a tokenizer.json that llama.cpp does not have."""
    same = "so llama.cpp cuts some texts into other tokens"
    for step in _steps(tokenizer["normalizer"]):
        if step["type"] not in (_SPACES if _is_sentencepiece(tokenizer) else ()):
            yield f"tokenizer.json changes texts by {step['type']}, which a GGUF has not, {same}"
    for step in _steps(tokenizer["pre_tokenizer"]):
        if step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
            yield f"tokenizer.json puts spaces by Metaspace ({step['prepend_scheme']}), which a GGUF has not, {same}"
    pre = None if _is_sentencepiece(tokenizer) else name_of(tokenizer)
    if pre is not None and PRE_TOKENIZERS[pre].ignore_merges != bool(tokenizer["model"]["ignore_merges"]):
        yield f"tokenizer.json has another ignore_merges than pre-tokenizer {pre}, {same}"
    options = ("lstrip", "rstrip", "single_word")
    changed = [token["content"] for token in tokenizer["added_tokens"] if any(token[option] for option in options)]
    if changed:
        yield f"a GGUF has no {', '.join(options)} of tokens ({some(changed)}), {same}"


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those of sequences one by one."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
    for inner in (*step.get("normalizers", ()), *step.get("pretokenizers", ())):
        yield from _steps(inner)


def _types(tokenizer: Mapping[str, Any], texts: Mapping[int, str], count: int) -> list[TokenType]:
    types = [TokenType.NORMAL if index in texts else TokenType.UNUSED for index in range(count)]
    if tokenizer["model"].get("byte_fallback"):
        vocab = tokenizer["model"]["vocab"]
        for byte in range(256):
            if (index := vocab.get(f"<0x{byte:02X}>")) is not None:
                types[index] = TokenType.BYTE
    for token in tokenizer.get("added_tokens", ()):
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    unknown = tokenizer["model"].get("unk_token")
    for index, text in texts.items():
        if text == unknown:
            types[index] = TokenType.UNKNOWN
    return types


def _is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    return bool(tokenizer["model"].get("byte_fallback"))


def _scores(texts: Mapping[int, str], merges: Sequence[Sequence[str]], count: int) -> list[float]:
    """Minus the rank of the first merge that makes each token, so SentencePiece joins in the order of the merges."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(texts.get(index, ""), 0)) for index in range(count)]


def _has_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text, in either of Hugging Face's two forms."""
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        for step in (*_steps(tokenizer["normalizer"]), *_steps(tokenizer["pre_tokenizer"]))
    )
