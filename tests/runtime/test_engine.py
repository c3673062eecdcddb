"""Many requests at once: the same bits as alone for any schedule, shared beginnings, memory, turns, ends."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rkf
from rkf.cluster.recipe import Rule
from rkf.errors import ContextLengthError, SemanticsError, UsageError
from rkf.runtime import beginnings, engine
from rkf.runtime.backend import Row
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.engine import Engine, Request
from rkf.runtime.lookup import PromptLookup
from tests.runtime import tiny
from tests.runtime.asking import Recorded, run
from tests.runtime.files import write_model
from tests.spec.document import VECTORS

PROGRAMS = [entry["file"] for entry in json.loads((VECTORS / "manifest.json").read_text())["logits"]]
KINDS = sorted({file for file in PROGRAMS if any(kind in file for kind in ("recurrent", "windows", "scan", "latent"))})
CONFIG = tiny.config(context_length=1024)
PAGE = 256


@pytest.fixture(scope="module")
def paged(tmp_path_factory):
    """A backend whose texts take several pages."""
    path = tmp_path_factory.mktemp("paged") / "m.rkf"
    with rkf.open(write_model(path, CONFIG, tiny.weights(CONFIG), Rule(k=16))) as container:
        yield CpuBackend(container, threads=1)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    with rkf.open(VECTORS / request.param) as container:
        yield CpuBackend(container, threads=1)


@contextmanager
def small_steps(backend, size):
    """Passes of a few tokens, and beginnings that are shared from two tokens on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "pass_tokens", size)
        patch.setattr(engine, "_OPENING", 2)
        patch.setattr(engine, "_CROWDED", max(size // 2, 1))
        for module in (engine, beginnings):
            patch.setattr(module, "WORTHWHILE", 2)
        yield


def alone(backend, request):
    """The greedy tokens of a request and their logits, from a sequence of its own."""
    ids, logits = request.ids[: request.prompt_tokens], []
    sequence = backend.new_sequence(backend.metadata.context_length)
    new = ids
    for _ in range(request.tokens):
        logits.append(backend.forward([Row(sequence, np.array(new))])[0])
        new = [int(np.argmax(logits[-1]))]
        ids = ids + new
    return ids, logits


def assert_as_alone(backend, request):
    ids, logits = alone(backend, request)
    assert request.ids == ids
    assert np.array_equal(request.logits[-request.tokens :], logits)


@st.composite
def schedules(draw, vocab, longest):
    """Prompts, most of which share beginnings, with the step at which each comes, and for some the one of its end."""
    stems = draw(
        st.lists(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=longest // 2), min_size=1, max_size=2)
    )
    found = []
    for _ in range(draw(st.integers(2, 6))):
        stem = draw(st.sampled_from(stems))
        rest = draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=longest // 4))
        tokens = draw(st.integers(1, longest // 4 - 1))
        comes, goes = draw(st.integers(0, 12)), draw(st.none() | st.integers(1, 12))
        found.append((Recorded(stem + rest, len(stem + rest) + tokens), comes, goes))
    return found


def play(together, schedule):
    """Submit and cancel by the schedule until all have ended."""
    for step in range(10_000):
        for request, comes, goes in schedule:
            if step == comes:
                together.submit(request)
            if goes is not None and step == comes + goes:
                together.cancel(request)
        moved = together.step()
        if not moved and step > 24 and all(request.ended for request, *_ in schedule):
            return
        for request, *_ in schedule:
            request.take()
    raise AssertionError("it never ends")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_each_request_the_bits_that_it_has_alone(kind, data):
    model = kind.metadata
    schedule = data.draw(schedules(model.vocab_size, min(model.context_length, 32)))
    with small_steps(kind, data.draw(st.integers(1, 9))):
        parallel, kept = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
        play(Engine(kind, parallel=parallel, kept=kept), schedule)
    for request, _, goes in schedule:
        assert goes is not None or request.finish == "length"
        assert_as_alone(kind, request)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_bits_stay_when_pages_run_out(paged, data):
    random = np.random.Generator(np.random.Philox(key=data.draw(st.integers(0, 99))))
    stem = random.integers(0, 400, 400).tolist()
    schedule = []
    for _ in range(4):
        prompt = (
            stem[: data.draw(st.integers(1, 400))] + random.integers(0, 400, data.draw(st.integers(1, 200))).tolist()
        )
        schedule.append(
            (Recorded(prompt, len(prompt) + data.draw(st.integers(1, 9))), data.draw(st.integers(0, 9)), None)
        )
    page = paged._plan.layout.groups[0].page_bytes
    pages = data.draw(st.integers(3, 8))
    together, before = Engine(paged, memory_bytes=pages * page + paged.held_bytes), paged.held_bytes
    play(together, schedule)
    assert paged.held_bytes - before <= pages * page
    for request, *_ in schedule:
        assert request.finish == "length"
        assert_as_alone(paged, request)


def fed(backend, patch):
    """A list that gets the tokens of each pass, by row."""
    found, forward = [], backend.forward
    patch.setattr(
        backend, "forward", lambda rows, *rest: found.append([len(r.tokens) for r in rows]) or forward(rows, *rest)
    )
    return found


def test_a_common_beginning_is_computed_once_and_held_once(paged, monkeypatch):
    system = np.random.Generator(np.random.Philox(key=2)).integers(0, 400, 600).tolist()
    requests = [Recorded([*system, n, n + 1], 610) for n in range(8)]
    passes, before = fed(paged, monkeypatch), paged.held_bytes
    together = Engine(paged, kept=0)
    for request in requests:
        together.submit(request)
    while sum(request.tokens for request in requests) < 40:
        together.step()
        [request.take() for request in requests]
        most = (paged.held_bytes - before) // paged._plan.layout.groups[0].page_bytes
        assert most <= 2 + 8  # two whole pages together, a third begun by each
    while together.step():
        [request.take() for request in requests]
    assert sum(map(sum, passes)) == 600 + 8 * (2 + 7)
    assert [request.cached_tokens for request in requests] == [0, *[600] * 7]
    monkeypatch.undo()
    for request in requests:
        assert_as_alone(paged, request)


def test_prompts_do_not_stop_answers_and_long_ones_do_not_stop_short_ones(paged):
    random = np.random.Generator(np.random.Philox(key=3))
    answering, long, short = (Recorded(random.integers(0, 400, n).tolist(), n + 20) for n in (1, 900, 40))
    requests, together = (answering, long, short), Engine(paged)
    for request in requests:
        together.submit(request)
    passes = 0
    while not short.tokens:
        together.step()
        passes += 1
        [request.take() for request in requests]
    assert not long.tokens
    assert answering.tokens == passes
    while together.step():
        [request.take() for request in requests]
    assert_as_alone(paged, long)


def test_a_reader_that_waits_holds_up_nobody(paged):
    together = Engine(paged, parallel=1)
    unread, other = Recorded([5, 6], 9), Recorded([7], 6)
    together.submit(unread)
    while together.step():
        pass
    assert unread.tokens == 1
    assert len(run(together, other)) == 5
    assert unread.tokens == 1
    unread.take()
    together.step()
    assert unread.tokens == 2


def test_a_cancelled_request_leaves_its_beginning(paged):
    together = Engine(paged)
    first = Recorded([3, 4, 5, 6], 300)
    together.submit(first)
    for _ in range(20):
        together.step()
        first.take()
    together.cancel(first)
    assert (first.finish, together.running, together.waiting) == ("cancelled", 0, 0)
    second = Recorded([*first.ids, 9], 40)
    run(together, second)
    assert second.cached_tokens == len(first.ids) - 1
    assert_as_alone(paged, second)


def test_ended_texts_are_kept_while_memory_lasts(paged, monkeypatch):
    page, before = paged._plan.layout.groups[0].page_bytes, paged.held_bytes
    monkeypatch.setattr(engine, "default_memory_bytes", lambda: before + 5 * page)
    together = Engine(paged, kept=9)
    for n in range(5):
        run(together, Recorded([n] * 300, 302))  # two pages each
    assert paged.held_bytes - before == 4 * page
    again = Recorded([4] * 300, 900)  # alone it takes what it needs
    run(together, again)
    assert (again.cached_tokens, len(again.ids)) == (299, 900)


def test_an_error_of_one_request_is_its_own(paged):
    def refuse(logits, ids):
        raise SemanticsError("not a number")

    together, good = Engine(paged), Recorded([1, 2], 6)
    bad = Request([1, 2, 3], refuse)
    together.submit(bad)
    run(together, good)
    with pytest.raises(SemanticsError):
        bad.take()
    assert_as_alone(paged, good)


def test_what_never_fits_is_refused_or_cut(paged):
    page = paged._plan.layout.groups[0].page_bytes
    before = paged.held_bytes
    together = Engine(paged, context=700, memory_bytes=before + 2 * page)
    for ids, error in (([], UsageError), ([1] * 700, ContextLengthError)):
        with pytest.raises(error):
            together.submit(Request(ids, max))
    with pytest.raises(ContextLengthError, match="no memory"):
        run(together, Recorded([1] * 600, 601))
    cut = Recorded([1] * 510, 600)
    run(together, cut)
    assert (len(cut.ids), cut.finish) == (513, "length")
    assert paged.held_bytes - before <= 2 * page


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_guesses_change_no_text_and_right_ones_save_passes(paged, data):
    prompt = data.draw(st.lists(st.integers(0, 399), min_size=1, max_size=8))
    plain = Recorded(prompt, len(prompt) + 24)
    run(Engine(paged, kept=0), plain)
    right = data.draw(st.lists(st.booleans(), min_size=30, max_size=30))

    def guess(ids):
        following = plain.ids[len(ids) : len(ids) + 5]
        return [token if right[len(ids) % 30 - n] else (token + 1) % 400 for n, token in enumerate(following)]

    with pytest.MonkeyPatch.context() as patch:
        passes = fed(paged, patch)
        guessing, other = Recorded(prompt, len(prompt) + 24, guess=guess), Recorded([3], 20, guess=lambda ids: [7, 7])
        together = Engine(paged, kept=0)
        together.submit(other)
        run(together, guessing)
    assert (guessing.ids, guessing.finish) == (plain.ids, "length")
    assert np.array_equal(guessing.logits, plain.logits)
    assert not all(right) or len(passes) <= 8
    assert_as_alone(paged, other)


def test_a_text_that_repeats_itself_is_guessed():
    text, lookup, saved = [1, 2, 3, 4, 5, 6, 7] * 8 + [9, 9, 1, 5], PromptLookup(), 0
    ids = text[:7]
    while len(ids) < len(text):
        for token in lookup(ids):
            if token != text[len(ids)] or len(ids) == len(text) - 1:
                break
            ids, saved = [*ids, token], saved + 1
        ids = [*ids, text[len(ids)]]
    assert saved > 30
    ids = [*ids, 1, 2, 3]
    assert lookup(ids)[:2] == [4, 5]
    assert lookup([*ids, 9]) == []  # it came otherwise
    assert lookup([*ids, 9, 1, 2, 3]) == []  # so guesses pause
    assert PromptLookup()([1, 2]) == []


def test_logits_of_a_prompt_are_given_from_the_asked_position(paged):
    ids = np.random.Generator(np.random.Philox(key=4)).integers(0, 400, 300)
    wanted = paged.forward([Row(paged.new_sequence(300), ids)], "all")
    together, found = Engine(paged), {}
    run(together, Recorded(ids, 301))
    request = Recorded(ids, 300, scores=lambda position, logits: found.update({position: logits.copy()}), scored=150)
    run(together, request)
    assert (sorted(found), request.cached_tokens, request.finish) == ([*range(150, 299)], 150, "length")
    assert np.array_equal([found[n] for n in range(150, 299)], wanted[150:299])


def test_an_interrupted_pass_changes_no_text(kind, monkeypatch):
    requests = [Recorded([1, 7, 3], 12), Recorded([9, 2], 12)]
    together = Engine(kind)
    for request in requests:
        together.submit(request)
    work, passes = kind._pool.run, []

    def interrupted():
        work()
        passes.append(1)
        if len(passes) % 3 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(kind._pool, "run", interrupted)
    while not all(request.ended for request in requests):
        try:
            together.step()
        except KeyboardInterrupt:
            continue
        [request.take() for request in requests]
    monkeypatch.undo()
    for request in requests:
        assert_as_alone(kind, request)
