"""Encode, decode, and a stream that never breaks a character."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from rkf.errors import StructureError, UsageError
from rkf.text.tokenizer import Tokenizer
from rkf.text.tokenizer_json import around
from tests.runtime import tiny

BYTE_LEVEL = Tokenizer(tiny.byte_level_tokenizer().to_str().encode(), tiny.config())
SENTENCEPIECE = Tokenizer(tiny.sentencepiece_tokenizer().to_str().encode(), tiny.config(add_bos=True))
TEXTS = [*tiny.CORPUS, "日本", "a  b   c\n\n\td", "👩‍👩‍👧" * 3, "the the. 日 the", "   the  the", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
def test_round_trip_and_stream(tokenizer, text):
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.decode(ids) == text
    assert "".join(pieces(tokenizer, ids)) == text


def pieces(tokenizer, ids, context=()):
    stream = tokenizer.stream(context)
    given_out = [stream.push(token) for token in ids]
    assert all("\ufffd" not in piece for piece in given_out[:-1] if tokenizer.decode(ids).isprintable())
    return [*given_out, stream.finish()]


def test_stream_gives_each_word_as_soon_as_it_is_there():
    ids = SENTENCEPIECE.encode("the the. 日 the", bos=False)
    stream = SENTENCEPIECE.stream()
    # 日 is three byte tokens: it appears whole with the last of them.
    assert [stream.push(token) for token in ids] == ["the", " the", ".", " ", "", "", "日", " the"]


def test_stream_after_a_prompt_keeps_the_space_between():
    prompt, answer = SENTENCEPIECE.encode("the"), SENTENCEPIECE.encode("the", bos=False)
    assert "".join(pieces(SENTENCEPIECE, answer, prompt)) == " the"
    assert "".join(pieces(SENTENCEPIECE, answer)) == "the"


def test_stream_skips_special_tokens_and_keeps_the_spaces_around():
    the, end = SENTENCEPIECE.encode("the", bos=False)[0], 2
    ids = [the, end, the, end, end, the]
    assert "".join(pieces(SENTENCEPIECE, ids)) == SENTENCEPIECE.decode(ids) == "the the the"


@given(st.lists(st.sampled_from([0, 2, *SENTENCEPIECE.encode(" the a", bos=False)]), max_size=12))
def test_stream_keeps_the_spaces_at_the_start(ids):
    assert "".join(pieces(SENTENCEPIECE, ids)) == SENTENCEPIECE.decode(ids)


@given(st.lists(st.integers(0, 399), max_size=40))
def test_byte_level_stream_equals_the_decoded_whole_for_any_ids(ids):
    stream = BYTE_LEVEL.stream()
    assert "".join(stream.push(token) for token in ids) + stream.finish() == BYTE_LEVEL.decode(ids)


@given(st.binary(max_size=40))
def test_byte_level_stream_gives_a_character_with_its_last_byte(data):
    text = data.decode("utf-8", "ignore")
    stream, alphabet = BYTE_LEVEL.stream(), byte_tokens()
    for character in text:
        *first, last = [stream.push(alphabet[byte]) for byte in character.encode()]
        assert "".join(first) == ""
        # U+FFFD itself looks like an unfinished character until the next one arrives.
        assert character in last or character == "\ufffd" or "\ufffd" in text


def byte_tokens():
    """Byte -> the id of its one-byte token, in GPT-2's alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in printable)}
    vocab = tiny.byte_level_tokenizer().get_vocab()
    return [vocab[letters[byte]] for byte in range(256)]


@given(st.lists(st.integers(3, 258), max_size=30))
def test_byte_fallback_stream_survives_any_bytes(ids):
    stream = SENTENCEPIECE.stream()
    text = "".join(stream.push(token) for token in ids) + stream.finish()
    data = bytes(token - 3 for token in ids)
    try:
        # The decoder strips one space at the start of the text.
        assert text == data.decode().removeprefix(" ")
    except UnicodeDecodeError:
        assert "\ufffd" in text


def test_special_tokens_in_text_are_tokens_and_are_left_out_of_it():
    ids = BYTE_LEVEL.encode("<|im_start|>Paris<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert BYTE_LEVEL.decode(ids) == "Paris"
    assert BYTE_LEVEL.decode(ids, special=True) == "<|im_start|>Paris<|im_end|>"


def test_special_tokens_are_text_where_they_are_not_wanted():
    text = "a <|im_end|>b\r\n" * 3000  # more than one piece
    ids = BYTE_LEVEL.encode(text, special=False)
    assert BYTE_LEVEL.decode(ids) == text and not {1, 2} & set(ids)
    assert BYTE_LEVEL.encode("no special", special=False) == BYTE_LEVEL.encode("no special")
    assert SENTENCEPIECE.encode("<s>the", special=False)[:2] != [1, 1]


def test_bos_comes_once_and_only_where_the_model_wants_one():
    assert SENTENCEPIECE.encode("the")[0] == 1
    assert SENTENCEPIECE.encode("<s>the").count(1) == 1
    assert 1 not in SENTENCEPIECE.encode("the", bos=False)
    assert BYTE_LEVEL.encode("the") == BYTE_LEVEL.encode("the", bos=False)


def test_what_stands_behind_a_text():
    raw = tiny.byte_level_tokenizer()
    for template, behind in (("<|im_start|> $A <|im_end|> <|endoftext|>", (2, 0)), ("<|im_end|> $A", ())):
        special = [(text, number) for number, text in enumerate(tiny.SPECIALS)]
        raw.post_processor = processors.TemplateProcessing(template, special_tokens=special)
        tokenizer = Tokenizer(raw.to_str().encode(), tiny.config())
        assert tokenizer.ending == behind
        assert tokenizer.encode("the") == BYTE_LEVEL.encode("the")
    raw.post_processor = processors.TemplateProcessing("$A <|past|>", special_tokens=[("<|past|>", 1 << 20)])
    assert Tokenizer(raw.to_str().encode(), tiny.config()).ending == ()


def test_what_stands_around_a_text_of_a_tokenizer_without_the_letter_a():
    digits = {"<s>": 0, "</s>": 1} | {digit: 2 + number for number, digit in enumerate("0123456789")}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(digits, []))
    assert around(raw) == ((), ())
    special = [("<s>", 0), ("</s>", 1)]
    for template, expected in (("<s> $A", ((0,), ())), ("$A </s>", ((), (1,))), ("<s> $A </s>", ((0,), (1,)))):
        raw.post_processor = processors.TemplateProcessing(template, special_tokens=special)
        assert around(raw) == expected
    assert around(tokenizers.Tokenizer(tokenizers.models.BPE({}, []))) == ((), ())


def test_a_tokenizer_that_truncates_or_pads_is_told_not_to():
    raw = tiny.byte_level_tokenizer()
    raw.enable_truncation(4)
    raw.enable_padding(length=8)
    assert Tokenizer(raw.to_str().encode(), tiny.config()).encode(tiny.CORPUS[0]) == BYTE_LEVEL.encode(tiny.CORPUS[0])


def test_refusals():
    with pytest.raises(StructureError, match=r"tokenizer\.json"):
        Tokenizer(b"{}", tiny.config())
    with pytest.raises(StructureError, match=r"tokenizer\.json"):
        Tokenizer(b"\xff", tiny.config())
    with pytest.raises(StructureError, match="400 tokens, expected at most 300"):
        Tokenizer(tiny.byte_level_tokenizer().to_str().encode(), tiny.config(vocab_size=300))
    with pytest.raises(UsageError, match="lone surrogate"):
        BYTE_LEVEL.encode("\udcff")
    with pytest.raises(UsageError, match="no chat template"):
        BYTE_LEVEL.render([{"role": "user", "content": "hi"}])
