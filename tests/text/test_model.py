"""Model: prompts, messages, options, over the numpy backend; other tests cover files and kernels."""

import numpy as np
import pytest

import rkf
from rkf.errors import ContextLengthError, StructureError, UsageError
from rkf.runtime.model import Model
from rkf.text.tokenizer import Tokenizer
from tests.runtime import tiny
from tests.runtime.numpy_backend import NumpyBackend

CONFIG = tiny.config()
WEIGHTS = tiny.weights(CONFIG)


@pytest.fixture
def path(tmp_path):
    return tiny.write(tmp_path / "tiny.rkf", CONFIG, WEIGHTS)


def model(path, template=tiny.CHAT_TEMPLATE, config=CONFIG):
    container = rkf.open(path)
    backend = NumpyBackend(config, WEIGHTS)
    return Model(container, backend, Tokenizer(container.blob("tokenizer.json"), backend.metadata, template))


def test_a_tokenizer_of_another_model_is_refused_with_the_file(tmp_path):
    config = tiny.config(vocab_size=300)
    path = tiny.write(tmp_path / "small.rkf", config, tiny.weights(config))
    with pytest.raises(StructureError, match=rf"^{path}: tokenizer\.json: 400 tokens, expected at most 300"):
        rkf.load(path)


def test_a_prompt_is_a_conversation_of_one_message(path):
    with model(path) as ready:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The capital?"}]
        answer = ready.generate("The capital?", system="Be brief.", max_tokens=9)
        assert answer == ready.chat(messages, max_tokens=9) == "".join(ready.stream(messages, max_tokens=9))
        stream = ready.stream("The capital?", system="Be brief.")
        prompt = ready.tokenizer.decode(stream.ids, special=True)
        assert prompt == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nThe capital?<|im_end|>\n<|im_start|>assistant\n"
        )


def test_the_next_turn_of_a_conversation_feeds_nothing_that_was_fed(path):
    with model(path) as ready:
        messages = [{"role": "user", "content": "The capital?"}]
        first = ready.stream(messages, max_tokens=9)
        messages += [{"role": "assistant", "content": "".join(first)}, {"role": "user", "content": "And then?"}]
        fed, forward = [], ready.backend.forward
        ready.backend.forward = lambda tokens, *rest, **options: (
            fed.append(len(tokens)) or forward(tokens, *rest, **options)
        )
        second = ready.stream(messages, max_tokens=1)
        "".join(second)
        known = first.stats.prompt_tokens
        assert second.ids[:known] == first.ids[:known]
        assert sum(fed) <= second.stats.prompt_tokens - known


def test_raw_continues_the_prompt(path):
    with model(path) as ready, model(path, template=None) as bare:
        assert ready.stream("The capital", raw=True).ids == ready.tokenizer.encode("The capital")
        assert ready.generate("The capital", raw=True) == bare.generate("The capital")


def test_greedy_is_the_default_and_256_tokens_the_most(path):
    with model(path, config=tiny.config(context_length=512, eos_ids=())) as ready:
        stream = ready.stream("The capital", raw=True)
        text = "".join(stream)
        assert stream.stats.tokens == 256
        assert text == ready.generate("The capital", raw=True, temperature=0.0, seed=9)
        assert text.startswith(ready.generate("The capital", raw=True, max_tokens=5))


def test_options_reach_the_sampler(path):
    with model(path) as ready:
        one = ready.generate("The", raw=True, max_tokens=20, temperature=2.0, seed=1)
        assert one == ready.generate("The", raw=True, max_tokens=20, temperature=2.0, seed=1)
        assert one != ready.generate("The", raw=True, max_tokens=20, temperature=2.0, seed=2)
        greedy = ready.generate("The", raw=True, max_tokens=20)
        assert greedy == ready.generate("The", raw=True, max_tokens=20, temperature=2.0, top_k=1)
        stopped = ready.generate("The", raw=True, max_tokens=20, stop=greedy[4:6])
        assert stopped == greedy[: greedy.index(greedy[4:6])]
        with pytest.raises(UsageError, match="temperature: expected >= 0"):
            ready.generate("The", temperature=-1.0)
        with pytest.raises(TypeError, match="temperatur"):
            ready.generate("The", temperatur=1.0)


def test_bos_is_written_once_by_template_or_tokenizer(path):
    config = tiny.config(add_bos=True)
    with model(path, "{{ bos_token }}{{ messages[0].content }}", config) as ready:
        assert ready.stream("The").ids.count(1) == 1
        assert ready.stream("The", raw=True).ids[0] == 1
        assert ready.stream("The", raw=True).ids.count(1) == 1


def test_logits_of_every_position(path):
    with model(path) as ready:
        ids = ready.tokenizer.encode("The capital of France")
        logits = ready.logits(ids)
        assert logits.shape == (len(ids), CONFIG.vocab_size)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits[:2], ready.logits(ids[:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ids", [[], [400], [-1], [0] * 257, [1.5], ["1"], "1", [[1]], [10**30]])
def test_ids_out_of_range_are_refused(path, ids):
    with model(path) as ready, pytest.raises(UsageError, match="ids: expected"):
        ready.logits(ids)


def test_what_cannot_be_prompted_is_refused(path):
    with model(path) as ready, model(path, template=None) as bare:
        with pytest.raises(UsageError, match="no chat template"):
            bare.chat([{"role": "user", "content": "hi"}])
        with pytest.raises(UsageError, match="no chat template"):
            bare.generate([{"role": "user", "content": "hi"}])
        with pytest.raises(UsageError, match="system message needs the model's chat template"):
            bare.generate("hi", system="Be brief.")
        with pytest.raises(UsageError, match="raw: expected one text"):
            ready.generate([{"role": "user", "content": "hi"}], raw=True)
        with pytest.raises(UsageError, match="the prompt is empty"):
            bare.generate("")
        with pytest.raises(ContextLengthError, match="context 256"):
            ready.generate("capital " * 300)
