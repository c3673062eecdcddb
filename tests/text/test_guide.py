"""Answers of a given form: only allowed tokens, whole documents, refusals; a model's recommended options."""

import json
import re
from types import SimpleNamespace

import jsonschema
import pytest

import rkf
from rkf.errors import UsageError
from rkf.runtime.guide import MOST_CHARS, Form, Guides
from rkf.runtime.recommended import recommended, sampling_for
from tests.runtime import tiny

CONFIG = tiny.config(context_length=512)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "ages": {"type": "array", "items": {"enum": [1, 22]}}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}
TOKENIZER = tiny.byte_level_tokenizer().to_str()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("model") / "tiny.rkf", CONFIG, tiny.weights(CONFIG))
    with rkf.load(path, threads=1) as ready:
        yield ready


@pytest.mark.parametrize("seed", range(5))
def test_every_answer_is_of_its_schema_or_cut(model, seed):
    form = Form("json_schema", json.dumps(SCHEMA))
    made = model.stream("Who?", form=form, temperature=1.5, seed=seed, max_tokens=400)
    text = "".join(made)
    if made.stats.finish == "eos":
        jsonschema.validate(json.loads(text), SCHEMA)
    else:
        assert made.stats.finish == "length"


def test_a_regex_and_a_grammar_are_followed(model):
    made = model.generate("Who?", form=Form("regex", "(yes|no)+!"), temperature=2.0, seed=1)
    assert re.fullmatch("(yes|no)+!", made)
    assert model.generate("Who?", form=Form("grammar", 'start: "a" "b"')) == "ab"


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (Form("json_schema", "{"), "json_schema: "),
        (Form("json_schema", '{"type": "nothing"}'), "Invalid type"),
        (Form("json_schema", '{"$ref": "http://localhost/schema"}'), "not present"),
        (Form("json_schema", '{"allOf":[' * 200 + "]}" * 200), "recursion limit"),
        (Form("json_schema", " " * MOST_CHARS + "{}"), "characters, expected at most"),
        (Form("regex", "(a"), "unclosed group"),
        (Form("grammar", "start: nothing"), "unknown name"),
    ],
    ids=range(7),
)
def test_what_is_no_form_is_refused(form, why):
    with pytest.raises(UsageError, match=why) as refused:
        Guides(TOKENIZER, 400, (2,)).guide(form)
    assert "\n" not in str(refused.value)


def test_without_an_end_token_there_is_no_form():
    with pytest.raises(UsageError, match="a token that ends an answer"):
        Guides(TOKENIZER, 400, ()).guide(Form("regex", "a"))


def test_recommended_options_apply_unless_others_are_given(model):
    told = SimpleNamespace(generation={"temperature": 0.7, "top_k": 20.0, "top_p": 0.8, "repetition_penalty": 1.05})
    odd = SimpleNamespace(generation={"temperature": -3.0, "top_k": 0.0, "top_p": 1e300, "min_p": 0.0, "sizes": 3.0})
    assert recommended(told) == {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    assert recommended(odd) == {} == recommended(model.config)
    found = sampling_for(told, {"top_k": None, "seed": 5})
    assert (found.temperature, found.top_k, found.seed) == (0.7, None, 5)
    assert sampling_for(told, {}).seed != sampling_for(told, {"seed": None}).seed
