"""The generation loop: computing tokens, reuse of the cache, ends, stop strings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkf.errors import ContextLengthError, UsageError
from rkf.runtime.backend import Row
from rkf.runtime.chooser import Chooser
from rkf.runtime.engine import Engine
from rkf.runtime.generate import Generation, Limits, StopStrings
from rkf.runtime.sampling import Sampling
from rkf.text.tokenizer import Tokenizer
from tests.runtime import tiny
from tests.runtime.numpy_backend import NumpyBackend

CONFIG = tiny.config()
WEIGHTS = tiny.weights(CONFIG)
TOKENIZER = Tokenizer(tiny.byte_level_tokenizer().to_str().encode(), CONFIG)
PROMPT = TOKENIZER.encode("The capital of France")


class Counting(NumpyBackend):
    """Counts the tokens that are computed."""

    fed = 0

    def forward(self, rows, wanted="last"):
        self.fed += sum(len(row.tokens) for row in rows)
        return super().forward(rows, wanted)


@pytest.fixture
def backend():
    return Counting(CONFIG, WEIGHTS)


def generation(engine, prompt=PROMPT, sampling=None, **limits):
    limits = Limits(**{"max_tokens": 20, "eos_ids": (), **limits})
    return Generation(engine, prompt, Chooser(sampling or Sampling(), len(prompt)), limits, TOKENIZER.stream())


def greedy(prompt, n):
    """Greedy ids without any cache."""
    ids = list(prompt)
    for _ in range(n):
        backend = NumpyBackend(CONFIG, WEIGHTS)
        ids.append(int(np.argmax(backend.forward([Row(backend.new_sequence(len(ids)), np.array(ids))])[0])))
    return ids[len(prompt) :]


def test_greedy_equals_the_argmax_of_the_whole_each_time(backend):
    run = generation(Engine(backend))
    text = "".join(run)
    assert run.ids[len(PROMPT) :] == greedy(PROMPT, 20)
    assert text == TOKENIZER.decode(run.ids[len(PROMPT) :])
    assert (run.stats.prompt_tokens, run.stats.tokens, run.stats.finish) == (len(PROMPT), 20, "length")
    assert run.stats.prefill_s > 0 < run.stats.decode_s
    assert backend.fed == len(PROMPT) + 19


def test_the_next_turn_feeds_only_what_is_new(backend):
    engine = Engine(backend)
    first = generation(engine)
    "".join(first)
    backend.fed = 0
    second = generation(engine, [*first.ids, *TOKENIZER.encode(" and")], max_tokens=1)
    "".join(second)
    assert backend.fed == len(second.ids) - 1 - (len(first.ids) - 1)
    assert second.ids[-1:] == greedy(second.ids[:-1], 1)


def test_a_conversation_that_leaves_the_cached_path_is_right(backend):
    engine = Engine(backend)
    "".join(generation(engine))
    other = [*PROMPT[:2], *TOKENIZER.encode("river")]
    run = generation(engine, other, max_tokens=5)
    "".join(run)
    assert run.ids[len(other) :] == greedy(other, 5)
    again = generation(engine, PROMPT[:1], max_tokens=3)  # the cache already holds all of it
    "".join(again)
    assert again.ids[1:] == greedy(PROMPT[:1], 3)


def test_two_generations_in_turn_do_not_disturb_each_other(backend):
    engine = Engine(backend)
    other = TOKENIZER.encode("def add")
    runs = [generation(engine, max_tokens=6), generation(engine, other, max_tokens=6)]
    for _ in zip(*runs, strict=False):
        pass
    for run, prompt in zip(runs, (PROMPT, other), strict=True):
        made = run.ids[len(prompt) :]
        assert made == greedy(prompt, len(made))


def test_an_interrupted_step_leaves_an_engine_that_can_go_on(backend):
    engine = Engine(backend)
    "".join(generation(engine, max_tokens=3))
    whole = backend.forward

    def interrupted(rows, wanted):
        whole(rows, wanted)
        raise KeyboardInterrupt

    backend.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        "".join(generation(engine, PROMPT[:2]))
    backend.forward = whole
    run = generation(engine, max_tokens=4)
    "".join(run)
    assert run.ids[len(PROMPT) :] == greedy(PROMPT, 4)


def test_it_ends_at_an_eos_token_and_leaves_it_out_of_the_text(backend):
    made = greedy(PROMPT, 20)
    eos = made[5]
    run = generation(Engine(backend), eos_ids=(9999, eos))
    first = made.index(eos)
    assert "".join(run) == TOKENIZER.decode(made[:first])
    assert (run.stats.finish, run.stats.tokens) == ("eos", first + 1)


def test_it_ends_at_the_context(backend):
    prompt = PROMPT * 40
    prompt = prompt[: CONFIG.context_length - 3]
    run = generation(Engine(backend), prompt, max_tokens=None)
    "".join(run)
    assert (len(run.ids), run.stats.finish) == (CONFIG.context_length, "length")
    assert "".join(generation(Engine(backend), run.ids, max_tokens=0)) == ""
    with pytest.raises(ContextLengthError, match="256 tokens, the model's context 256"):
        generation(Engine(backend), run.ids)
    with pytest.raises(UsageError, match="max_tokens"):
        generation(Engine(backend), max_tokens=-1)
    with pytest.raises(UsageError, match="stop string is empty"):
        generation(Engine(backend), stop=("end", ""))


def test_nothing_to_continue_is_refused(backend):
    with pytest.raises(UsageError, match="empty"):
        generation(Engine(backend), [])


def test_no_tokens_asked_for_none_computed(backend):
    assert "".join(generation(Engine(backend), max_tokens=0)) == ""
    assert backend.fed == 0


def test_sampled_text_is_repeated_by_its_seed(backend):
    def text(seed):
        return "".join(generation(Engine(backend), sampling=Sampling(temperature=1.5, seed=seed)))

    assert text(1) == text(1) != text(2)


def test_a_stop_string_ends_the_text_before_it(backend):
    whole = TOKENIZER.decode(greedy(PROMPT, 20))
    middle = whole[len(whole) // 2 :][:3]
    run = generation(Engine(backend), stop=("never there", middle))
    assert "".join(run) == whole[: whole.index(middle)]
    assert run.stats.finish == "stop"
    assert run.stats.tokens < 20


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_against_the_whole_text(text, stops, data):
    """For any split of the text into pieces, the output is the text before the earliest stop string."""
    stop, out, rest = StopStrings(stops), "", text
    while rest and not stop.found:
        size = data.draw(st.integers(1, len(rest)))
        out += stop.push(rest[:size])
        rest = rest[size:]
    out += stop.finish()
    # Earliest by its end: a stream cannot wait for a longer one that started before.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    if not ends:
        assert (out, stop.found) == (text, False)
    else:
        assert stop.found
        assert out in {text[:start] for _, start in ends}


def test_stop_strings_hold_back_no_more_than_they_must():
    stop = StopStrings(["\nUser:"])
    assert stop.push("Paris.") == "Paris."
    assert stop.push(" It\nUs") == " It"
    assert stop.push("ually") == "\nUsually"
    assert stop.push("\n") == ""
    assert stop.finish() == "\n"
