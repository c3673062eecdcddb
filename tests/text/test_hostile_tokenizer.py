"""A tokenizer.json from a stranger: refused in one line or harmless, and long texts in bounded memory."""

import json
import subprocess
import sys

import pytest

from rkf.calibrate.calibration import prompts
from rkf.errors import StructureError
from rkf.model.metadata import ModelMetadata
from rkf.text import tokenizer as module
from rkf.text.tokenizer import Tokenizer
from tests.format.first_form_metadata import metadata_of
from tests.runtime import tiny

SOUND = json.loads(tiny.byte_level_tokenizer().to_str())
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
ANYTHING = {"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 2000}
PADDING = {
    **{"strategy": {"Fixed": 10**8}, "direction": "Right", "pad_to_multiple_of": None},
    **{"pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
}
TWICE = [{"Sequence": {"id": "A", "type_id": 0}}] * 2


def made(**changes):
    return Tokenizer(json.dumps(SOUND | changes).encode(), tiny.config())


REFUSED = {
    "panic": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "chain": {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}},
    "everywhere": {"normalizer": ANYTHING},
    "prefixes": {"normalizer": {"type": "Prepend", "prepend": "a" * 2000}},
    "decoders": {"decoder": {"type": "Sequence", "decoders": [DOUBLE] * 40}},
    "many parts": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 100}},
    "strip": {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 9}},
    "affix": {"model": SOUND["model"] | {"end_of_word_suffix": "a" * 100}},
    "words": {
        "model": {
            **{"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": ""},
            "max_input_chars_per_word": 10**9,
        }
    },
    "type": {"normalizer": {"type": "Nothing"}},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line(changes, capfd):
    with pytest.raises(StructureError, match=r"^tokenizer\.json: [^\n]+$"):
        made(**changes)
    assert capfd.readouterr() == ("", "")


USES = {
    "ordinary text": lambda made: made.encode("a", special=False),
    "conversation": lambda made: made.encode_chat([{"role": "user", "content": "<|im_end|>"}]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize(
    ("token", "problem"), [(1 << 29, "expected ids of at most"), (398, "a text cannot be encoded")]
)
def test_a_vocabulary_that_cannot_be_written_again(use, token, problem):
    """The library took gigabytes for what lies before a large id; and errors for an id twice were no RkfError."""
    config = tiny.config()
    model = ModelMetadata.of_first_form(metadata_of(config), tiny.weights(config))
    vocab = SOUND["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    changed = SOUND | {"model": SOUND["model"] | {"vocab": vocab | {last: token}}}
    made = Tokenizer(json.dumps(changed).encode(), model, "{{ messages[0].content }}")
    with pytest.raises(StructureError, match=rf"^tokenizer\.json: [^\n]*{problem}"):
        use(made)


def test_what_changes_tokens_unsaid_has_no_effect():
    twice = {"type": "TemplateProcessing", "single": TWICE, "pair": TWICE, "special_tokens": {}}
    text = "The river that runs through it"
    wanted = made().encode(text)
    for changes in ({"padding": PADDING}, {"post_processor": twice}, {"model": SOUND["model"] | {"dropout": 0.5}}):
        assert made(**changes).encode(text) == wanted


def test_a_pattern_that_gives_up_is_one_line(capfd):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(StructureError, match=r"a text cannot be encoded: .*retry-limit"):
        made(pre_tokenizer=split).encode("a" * 40 + "!")
    assert capfd.readouterr() == ("", ""), "the library's own lines are dropped"


def test_what_others_write_meanwhile_is_kept(capfd):
    from rkf.text.tokenizer_json import one_line

    with one_line("tokenizer.json"):
        subprocess.run([sys.executable, "-c", "import sys; print('kept', file=sys.stderr)"], check=True)
    assert capfd.readouterr().err == "kept\n"


@pytest.mark.parametrize(
    "raw", [tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()], ids=["byte-level", "sentencepiece"]
)
def test_a_long_text_in_parts_has_the_tokens_of_the_whole(raw, monkeypatch):
    tokenizer = Tokenizer(raw.to_str().encode(), tiny.config())
    text = " ".join([*tiny.CORPUS * 3, " the  the\n\n the", "\tthe the\nthe " * 20])
    whole = tokenizer.encode(text)
    monkeypatch.setattr(module, "_PIECE", 40)
    assert len(list(tokenizer._pieces(text, tokenizer._encoding))) > 10
    assert tokenizer.encode(text) == whole
    assert len(tokenizer.encode(text, enough=5)) < len(whole) / 4
    found = tokenizer.decode(tokenizer.encode("x" * 300))  # no place to cut
    assert found.replace(" ", "") == "x" * 300


@pytest.mark.parametrize("template", ["{{ raise_exception('no system message') }}", "{% if %}"])
def test_a_template_that_refuses_leaves_calibration_without_conversations(template):
    config = tiny.config()
    model = ModelMetadata.of_first_form(metadata_of(config), tiny.weights(config))
    tokenizer = Tokenizer(json.dumps(SOUND).encode(), model, template)
    beginnings, (note,) = prompts(model, tokenizer)
    plain, notes = prompts(model, Tokenizer(json.dumps(SOUND).encode(), model))
    assert (beginnings, notes) == (plain, ())
    assert note.startswith("the calibration text has no conversations: chat template")


def test_a_template_is_utf8():
    with pytest.raises(StructureError, match=r"^chat_template\.jinja: expected UTF-8"):
        Tokenizer(json.dumps(SOUND).encode(), tiny.config(), b"\xff\xfe{{ messages }}")
