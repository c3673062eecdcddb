"""A GGUF's tokenizer as tokenizer.json: the same ids as the original, on mixed and on random text."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from rkf.converters.gguf_header import read_header
from rkf.converters.gguf_tokenizer import GgufTokenizer
from rkf.converters.pretokenizers import PRE_TOKENIZERS, name_of
from rkf.converters.pull import pull
from rkf.converters.source import open_source
from rkf.converters.tokenizer_export import gguf_fields
from rkf.errors import RkfError, SourceError, UnsupportedError
from rkf.model.metadata import ModelMetadata
from rkf.model.ops import Embed, Logits
from rkf.model.program import Program
from rkf.text.tokenizer import Tokenizer as TextTokenizer

from .conftest import CORPUS, SPECIALS

MIXED = (
    "<|im_start|>user\nIt's 12345.678 o'clock — isn't it? THEY'RE “here” ½ ² Ⅷ ٣٤\n\n\n"
    "def f(x: int) -> str:\n    return f'{x ** 2:>10}'  # sq\t\ttabs\r\n"
    "if (a<b && c>d) { x += 1; }   //      many    spaces     here     \n"
    "漢字かな交じり文。한국어 텍스트 नमस्ते दुनिया العربية עברית ไทย 😀👩‍👩‍👧‍👦🏳️‍🌈 Straße naïve "
    "a\u0301\u200d\ufeff\u00a0\u2003\u3000|"
    '{"key": [1, 2.5e3, null]} http://example.com/a?b=c&d=%20 snake_case CamelCase ALLCAPS $$\\frac{a}{b}$$ ...!!!???'
    "<|im_end|>\n<|endoftext|><repo_name>x<|im_start|>  "
)

# How the models' own tokenizer.json splits words.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OWN: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: split(LLAMA3),
    "qwen2": lambda: split(LLAMA3.replace("{1,3}", "")),
}


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def from_gguf(fields: dict[str, Any]) -> bytes:
    return GgufTokenizer(fields, "x").to_json()


def special_ids(fields: dict[str, Any]) -> dict[str, Any]:
    tokenizer = GgufTokenizer(fields, "x")
    return {"bos_id": tokenizer.bos_id, "eos_ids": tokenizer.eos_ids, "add_bos": tokenizer.add_bos}


def special_tokens(fields: dict[str, Any]) -> Any:
    return GgufTokenizer(fields, "x").special_tokens


def trained(pre: str) -> Tokenizer:
    built = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    built.pre_tokenizer = OWN[pre]()
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator([*CORPUS, MIXED] * 3, trainer)
    return built


def byte_level_fields(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    texts = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.token_type": [TokenType.CONTROL if text in SPECIALS else TokenType.NORMAL for text in texts],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


PAIRS = {pre: (trained(pre), Tokenizer.from_buffer(from_gguf(byte_level_fields(trained(pre), pre)))) for pre in OWN}
TEXT = st.lists(st.one_of(st.text(), st.sampled_from([*SPECIALS, "  ", "\n\n", "'s", "12", " x", "漢字"]))).map("".join)


@pytest.mark.parametrize("pre", OWN)
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_byte_level_encodes_like_the_original(pre: str, text: str) -> None:
    original, converted = PAIRS[pre]
    ids = original.encode(text, add_special_tokens=False).ids
    assert converted.encode(text, add_special_tokens=False).ids == ids
    assert converted.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", OWN)
def test_mixed_text(pre: str) -> None:
    original, converted = PAIRS[pre]
    assert converted.encode(MIXED, add_special_tokens=False).ids == original.encode(MIXED).ids
    shown = converted.decode(converted.encode("a<|im_end|>b", add_special_tokens=False).ids)
    assert shown == "ab"


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_has_a_name_that_cuts_the_same(pre: str) -> None:
    tokenizer = json.loads(from_gguf(byte_level_fields(trained("gpt-2"), pre)))
    found = name_of(tokenizer)
    assert found is not None
    assert PRE_TOKENIZERS[found].splits == PRE_TOKENIZERS[pre].splits
    assert PRE_TOKENIZERS[found].ignore_merges == PRE_TOKENIZERS[pre].ignore_merges


@pytest.mark.parametrize("pre", OWN)
def test_the_originals_own_form_is_recognised(pre: str) -> None:
    assert name_of(json.loads(trained(pre).to_str())) == pre


def sentencepiece_fields() -> dict[str, Any]:
    """A vocabulary as trained by SentencePiece: unknown, BOS, EOS, bytes, pieces by falling score, characters.

    As in SentencePiece, every character of a piece is a token. Other characters are not; they fall back to bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(
        [text.replace(" ", "▁") for text in CORPUS * 3], trainers.BpeTrainer(vocab_size=300, show_progress=False)
    )
    vocab = tokenizer.get_vocab()
    pieces = sorted((piece for piece in vocab if len(piece) > 1), key=vocab.__getitem__)
    rare = {"½", "²", "9", "*"} - set("".join(pieces))
    characters = sorted(piece for piece in vocab if len(piece) == 1 and piece not in rare)
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *characters, "<|user|>"]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    kinds += [TokenType.NORMAL] * (len(texts) - len(kinds) - 1) + [TokenType.USER_DEFINED]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(texts) - 259)],
        "tokenizer.ggml.token_type": kinds,
    }


def sentencepiece_encode(text: str, fields: dict[str, Any]) -> list[int]:
    """SentencePiece's algorithm: join the neighbours whose joint piece scores highest, leftmost first, to the end."""
    ids = {piece: index for index, piece in enumerate(fields["tokenizer.ggml.tokens"])}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(left + right, at) for at, (left, right) in enumerate(pairwise(symbols))]
        known = [(fields["tokenizer.ggml.scores"][ids[pair]], -at) for pair, at in pairs if pair in ids]
        if not known:
            break
        at = -max(known)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    out: list[int] = []
    for symbol in symbols:
        out += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out


SPM = sentencepiece_fields()
SPM_CONVERTED = Tokenizer.from_buffer(from_gguf(SPM))


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet=sorted(set("".join(CORPUS))))))
def test_sentencepiece_encodes_like_the_original(text: str) -> None:
    assume(not any(special in text for special in ("<unk>", "<s>", "</s>", "<|user|>")))
    ids = SPM_CONVERTED.encode(text, add_special_tokens=False).ids
    assert ids == sentencepiece_encode(text, SPM)
    if text.isprintable():
        assert SPM_CONVERTED.decode(ids) == text.replace("▁", " ")  # its sign for a space


def test_sentencepiece_mixed_text_and_special_tokens() -> None:
    mixed = MIXED.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert SPM_CONVERTED.encode(mixed, add_special_tokens=False).ids == sentencepiece_encode(mixed, SPM)
    user = len(SPM["tokenizer.ggml.tokens"]) - 1
    ids = SPM_CONVERTED.encode("ab<|user|>cd</s>", add_special_tokens=False).ids
    # llama.cpp and older transformers put a space before each piece of text between special tokens.
    assert ids == [*sentencepiece_encode("ab", SPM), user, *sentencepiece_encode("cd", SPM), 2]
    assert SPM_CONVERTED.encode("a").ids[0] == 1
    bare = Tokenizer.from_buffer(from_gguf(SPM | {"tokenizer.ggml.add_space_prefix": False}))
    assert bare.decode(bare.encode(" a b", add_special_tokens=False).ids) == " a b"


def test_sentencepiece_with_a_list_of_merges() -> None:
    """The kind of Gemma 4: the same as with scores and without a space before the text; always with BOS."""
    bare = from_gguf(SPM | {"tokenizer.ggml.add_space_prefix": False})
    merges = [" ".join(merge) for merge in json.loads(bare)["model"]["merges"]]
    fields = {key: each for key, each in SPM.items() if key != "tokenizer.ggml.scores"}
    fields |= {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": 1}
    assert json.loads(from_gguf(fields)) == json.loads(bare)
    assert special_ids(fields | {"tokenizer.ggml.add_bos_token": False})["add_bos"]
    texts = [*SPM["tokenizer.ggml.tokens"][:-1], "<|tool_response>"]  # beside it, </s> ends no answer
    assert special_ids(fields | {"tokenizer.ggml.tokens": texts})["eos_ids"] == (len(texts) - 1,)


def test_special_ids() -> None:
    assert special_ids(SPM) == {"bos_id": 1, "eos_ids": (2,), "add_bos": True}
    fields = byte_level_fields(trained("gpt-2"), "gpt-2")
    assert special_ids(fields) == {"bos_id": 1, "eos_ids": (2, 0), "add_bos": False}
    assert special_ids(fields | {"tokenizer.ggml.pre": "llama-bpe"})["add_bos"]
    assert not special_ids(fields | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False})[
        "add_bos"
    ]
    assert special_ids(fields | {"tokenizer.ggml.eot_token_id": 7})["eos_ids"] == (2, 7, 0)


def program_of(fields: dict[str, Any]) -> Program:
    """The least program with as many tokens."""
    count = len(fields["tokenizer.ggml.tokens"])
    stem, top = Embed(dst="x", table="e", rows=count, cols=1), Logits(dst="l", src="x", weight="h", rows=count)
    return Program((stem,), (), (), (top,))


@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize("kind", ["spm", *OWN])
def test_export_gives_the_same_tokenizer(tmp_path: Path, kind: str, ending: bool) -> None:
    fields = SPM if kind == "spm" else byte_level_fields(trained(kind), kind)
    fields |= {"tokenizer.ggml.add_eos_token": ending}
    first = from_gguf(fields)
    ids = special_ids(fields)
    model = ModelMetadata(program_of(fields), 1, special_tokens=special_tokens(fields), **ids)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    assert TextTokenizer(first, model).ending == ((2,) if ending else ())
    gguf_fields(writer, first, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    again = read_header(tmp_path / "t.gguf").fields
    assert list(again["tokenizer.ggml.tokens"]) == fields["tokenizer.ggml.tokens"]
    assert list(again["tokenizer.ggml.token_type"]) == list(fields["tokenizer.ggml.token_type"])
    assert from_gguf(again) == first
    assert special_ids(again) == ids
    assert special_tokens(again) == model.special_tokens


def test_tokens_behind_a_text_that_a_gguf_cannot_name_are_told(tmp_path: Path) -> None:
    fields = byte_level_fields(trained("gpt-2"), "gpt-2") | {"tokenizer.ggml.add_eos_token": True}
    model = ModelMetadata(program_of(fields), 1, eos_ids=(1,))
    notes = gguf_fields(gguf.GGUFWriter(tmp_path / "t.gguf", "llama"), from_gguf(fields), model)
    assert any("behind a text" in note and SPECIALS[2] in note for note in notes)


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda fields: {name: value for name, value in fields.items() if name != key}


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[RkfError], str]] = {
    "no tokens": (without("tokenizer.ggml.tokens"), SourceError, "tokens is missing"),
    "no merges": (without("tokenizer.ggml.merges"), SourceError, "merges is missing"),
    "no kind": (without("tokenizer.ggml.model"), UnsupportedError, "kind None"),
    "another kind": (lambda f: f | {"tokenizer.ggml.model": "bert"}, UnsupportedError, "kind 'bert'"),
    "twice": (
        lambda f: f | {"tokenizer.ggml.tokens": [*f["tokenizer.ggml.tokens"][1:], SPECIALS[1]]},
        SourceError,
        "1 tokens occur twice",
    ),
    "types": (lambda f: f | {"tokenizer.ggml.token_type": [1]}, SourceError, "got 1"),
    "merge": (lambda f: f | {"tokenizer.ggml.merges": ["q zz"]}, SourceError, "'q zz' does not join two"),
    "half a merge": (lambda f: f | {"tokenizer.ggml.merges": ["q"]}, SourceError, "'q' does not join two"),
    "scores": (lambda f: f | {"tokenizer.ggml.model": "llama"}, SourceError, "scores: expected"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refusals(case: str) -> None:
    harm, error, message = BROKEN[case]
    with pytest.raises(error, match=message):
        from_gguf(harm(byte_level_fields(trained("gpt-2"), "gpt-2")))


# llama.cpp 0.3.36's (llama-cpp-python) tokens of MIXED with the default model's GGUF.
MIXED_IDS = [
    1, 4093, 198, 1589, 506, 216, 33, 34, 35, 36, 37, 30, 38, 39, 40, 263, 23, 17466, 1841, 3247, 982, 357, 47,
    6462, 73, 23, 3256, 619, 1531, 573, 216, 16738, 216, 19133, 216, 173, 223, 117, 216, 164, 113, 164, 114, 1116,
    198, 1604, 275, 24, 104, 42, 464, 25, 4722, 871, 42, 472, 1003, 275, 19225, 104, 1903, 216, 34, 42, 46, 33, 32,
    18292, 216, 907, 15375, 197, 197, 100, 7366, 201, 198, 342, 365, 81, 44, 82, 1456, 22, 265, 46, 84, 25, 1662,
    1792, 4519, 216, 33, 43, 4029, 256, 13241, 4444, 800, 333, 5600, 289, 1535, 4444, 198, 177, 137, 112, 36518,
    7365, 229, 7365, 120, 16736, 114, 7365, 242, 10391, 228, 29184, 19076, 33085, 246, 181, 130, 251, 183, 240, 129,
    48138, 223, 231, 183, 228, 114, 184, 228, 133, 12335, 118, 35090, 38770, 16525, 26293, 30581, 12335, 116, 42990,
    30658, 27011, 32932, 18075, 27819, 34966, 20602, 31462, 23339, 43463, 12960, 112, 37657, 30825, 28532, 120, 216,
    31933, 222, 10283, 241, 10283, 112, 40303, 218, 10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813,
    235, 117, 321, 231, 10813, 235, 116, 10813, 233, 128, 31752, 321, 231, 10813, 230, 226, 19144, 34878, 85, 15486,
    46494, 253, 151, 219, 321, 231, 186, 136, 140, 15442, 321, 221, 12109, 218, 108, 39428, 2393, 1799, 933, 33, 28,
    216, 34, 30, 37, 85, 35, 28, 10034, 28852, 3622, 1742, 7434, 30, 824, 31, 81, 47, 82, 45, 83, 22, 84, 23446, 34,
    32, 14321, 79, 7544, 5784, 299, 10802, 9206, 14837, 45918, 17410, 76, 18169, 107, 81, 15009, 82, 109, 9212,
    4563, 29646, 16693, 47, 2, 198, 0, 3, 104, 1, 256,
]  # fmt: skip


@pytest.mark.slow
def test_the_default_model_encodes_as_in_llama_cpp() -> None:
    tokenizer = Tokenizer.from_buffer(open_source(pull("smollm2-135m-instruct")).tokenizer_json)
    assert tokenizer.encode(MIXED, add_special_tokens=False).ids == MIXED_IDS
