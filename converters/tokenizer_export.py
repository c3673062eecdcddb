"""tokenizer.json -> the tokenizer fields of a GGUF. The inverse of gguf_tokenizer.py, for the same two kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
from gguf.constants import TokenType

from rkf.converters.pretokenizers import name_of
from rkf.errors import UnsupportedError
from rkf.model.metadata import ModelMetadata


def token_text(tokenizer_json: bytes) -> dict[int, str]:
    """The text of every token in tokenizer.json, by id."""
    tokenizer = json.loads(tokenizer_json)
    vocab = tokenizer["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram's: pairs of a text and its score, by id
        texts = {index: text for index, (text, _) in enumerate(vocab)}
    else:
        texts = {index: text for text, index in vocab.items()}
    return texts | {token["id"]: token["content"] for token in tokenizer.get("added_tokens", ())}


def gguf_fields(writer: gguf.GGUFWriter, tokenizer_json: bytes, model: ModelMetadata) -> None:
    """Add the tokenizer to a GGUF; UnsupportedError if llama.cpp has no equivalent."""
    tokenizer = json.loads(tokenizer_json)
    if tokenizer["model"].get("type") != "BPE":
        raise UnsupportedError(f"tokenizer.json: kind {tokenizer['model'].get('type')!r} has no GGUF form here")
    texts = token_text(tokenizer_json)
    count = model.vocab_size
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"]]
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
    if model.bos_id is not None:
        writer.add_bos_token_id(model.bos_id)
    if model.eos_ids:
        writer.add_eos_token_id(model.eos_ids[0])
    writer.add_add_bos_token(model.add_bos)
    for name, add in (("unk_token", writer.add_unk_token_id), ("pad_token", writer.add_pad_token_id)):
        token = model.special_tokens.get(name)
        if token is not None and token.id is not None:
            add(token.id)


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
    steps = [step for step in (tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")) if step]
    steps += [inner for step in steps for inner in step.get("normalizers", ()) or step.get("pretokenizers", ())]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
