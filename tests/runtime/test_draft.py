"""A draft model guesses tokens: no text changes, whatever the sampling and form; guesses that do not pay are rare."""

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import rkf
from rkf.cli import cli
from rkf.errors import ContextLengthError, UsageError
from rkf.runtime import draft as drafts
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.draft import Costs, Draft
from rkf.runtime.engine import Engine
from rkf.runtime.guide import Form
from tests.runtime import tiny
from tests.runtime.asking import Recorded, run
from tests.runtime.test_engine import KINDS, assert_as_alone, small_steps
from tests.spec.document import VECTORS

CONFIG = tiny.config(context_length=512)
WEIGHTS = tiny.weights(CONFIG)
FORM = Form("json_schema", '{"type": "array", "items": {"enum": [12, 345, "The capital"]}, "maxItems": 5}')


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and as its draft one with nearly the same weights."""
    folder, random = tmp_path_factory.mktemp("files"), np.random.Generator(np.random.Philox(key=1))
    near = {name: each + 0.01 * random.standard_normal(each.shape).astype(np.float32) for name, each in WEIGHTS.items()}
    return tiny.write(folder / "model.rkf", CONFIG, WEIGHTS), tiny.write(folder / "draft.rkf", CONFIG, near)


@pytest.fixture(scope="module")
def plain(files):
    with rkf.load(files[0], threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def drafted(files):
    with rkf.load(files[0], threads=1, draft=files[1]) as model:
        yield model


@pytest.fixture
def always(monkeypatch):
    """Guesses of four tokens, whether they pay or not."""
    monkeypatch.setattr(Costs, "known", True)
    monkeypatch.setattr(Costs, "best", lambda costs, likely: 4)
    monkeypatch.setattr(drafts, "_PROMPT", 10_000)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 40),
    options=st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0])},
        optional={
            "top_k": st.integers(1, 50),
            "top_p": st.floats(0.1, 1),
            "min_p": st.floats(0, 0.2),
            "repetition_penalty": st.floats(0.7, 1.5),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "form": st.just(FORM),
            "stop": st.just("e"),
        },
    ),
    prompt=st.sampled_from(["The capital", "def add(a, b):\n", "1 2 3 1 2 3 1 2"]),
    count=st.integers(1, 8),
)
def test_no_text_changes(plain, drafted, seed, options, prompt, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Costs, "known", True)
        patch.setattr(Costs, "best", lambda costs, likely: count)
        found = drafted.stream(prompt, seed=seed, max_tokens=40, **options)
        text = "".join(found)
    wanted = plain.stream(prompt, seed=seed, max_tokens=40, **options)
    assert (text, found.ids, found.stats.finish) == ("".join(wanted), wanted.ids, wanted.stats.finish)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"form": FORM}])
def test_a_good_draft_saves_passes(drafted, always, monkeypatch, options):
    passes, forward = [], drafted.backend.forward
    monkeypatch.setattr(drafted.backend, "forward", lambda rows, *rest: passes.append(1) or forward(rows, *rest))
    generation = drafted.stream("The river", max_tokens=60, **options)
    assert "".join(generation) and len(passes) < 0.7 * generation.stats.tokens


def test_requests_in_a_crowd_and_one_after_another(files, always):
    with rkf.load(files[0], threads=1, draft=files[1]) as model:
        requests = []
        for n in range(6):
            request = Recorded([5 + n // 2, 6, 7, n], 40)
            request.guess = model.draft.text(model.stream("x", temperature=0).choose)
            requests.append(request)
        for request in requests[:2]:
            model.engine.submit(request)
        while not all(request.ended for request in requests[:2]):
            model.engine.step()
            [request.take() for request in requests]
        for request in requests[2:]:
            model.engine.submit(request)
        while not all(request.ended for request in requests):
            model.engine.step()
            [request.take() for request in requests]
        for request in requests:
            assert_as_alone(model.backend, request)


@pytest.fixture(scope="module")
def kinds():
    """Backends of models with windows or states, by name."""
    opened = {name: rkf.open(VECTORS / name) for name in KINDS}
    yield {name: CpuBackend(container, threads=1) for name, container in opened.items()}
    for container in opened.values():
        container.close()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_models_with_windows_take_guesses_and_any_model_makes_them(kinds, data):
    able = [backend for backend in kinds.values() if Engine(backend).takes_guesses]
    assert 0 < len(able) < len(kinds)
    model, other = data.draw(st.sampled_from(able)), data.draw(st.sampled_from(list(kinds.values())))
    vocab, longest = model.metadata.vocab_size, min(model.metadata.context_length, 48)
    prompt = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=longest // 2))
    request = Recorded(prompt, longest)
    with pytest.MonkeyPatch.context() as patch, small_steps(model, data.draw(st.integers(1, 9))):
        patch.setattr(Costs, "known", True)
        patch.setattr(Costs, "best", lambda costs, likely: 3)
        patch.setattr(drafts, "_PROMPT", 100)
        request.guess = Draft(other, vocab).text(GreedyChooser(len(prompt)))
        run(Engine(model), request)
    assert_as_alone(model, request)


class GreedyChooser:
    def __init__(self, prompt_tokens):
        self.prompt_tokens = prompt_tokens

    def __call__(self, logits, ids):
        return int(np.argmax(logits))

    def copy(self):
        return self


def test_a_draft_that_fails_or_forgets_costs_no_text(drafted, plain, always, monkeypatch):
    def fail(*_):
        raise ContextLengthError("no memory")

    wanted = plain.generate("The", max_tokens=30, temperature=0)
    monkeypatch.setattr(drafted.draft._backend, "forward", fail)
    assert drafted.generate("The", max_tokens=30, temperature=0) == wanted


def test_lengths_follow_what_guesses_cost():
    costs = Costs()
    for _ in range(4):
        assert not costs.known
        costs.passed(1, 0.1)
    assert costs.known
    for further, draft, likely, wanted in (
        (0.0, 0.01, 0.9, 8),
        (0.02, 0.01, 0.9, range(2, 8)),
        (0.02, 0.01, 0.2, 0),
        (0.05, 0.1, 0.9, 0),
    ):
        for _ in range(16):
            costs.passed(5, 0.1 + 4 * further)
            costs.draft.append(draft)
        found = costs.best(likely)
        assert found in wanted if isinstance(wanted, range) else found == wanted


def test_guesses_that_do_not_pay_become_rare(files, monkeypatch):
    monkeypatch.setattr(Costs, "known", True)
    monkeypatch.setattr(Costs, "best", lambda costs, likely: 2 * (likely == drafts._HOPE))
    with rkf.load(files[0], threads=1, draft=files[1]) as model:
        drafted, forward = [], model.draft._backend.forward
        monkeypatch.setattr(model.draft._backend, "forward", lambda *rest: drafted.append(1) or forward(*rest))
        generation = model.stream("The", max_tokens=400, temperature=1, seed=1, logit_bias={2: -100})
        assert "".join(generation) and generation.stats.tokens > 200
        assert 2 <= len(drafted) <= 2 * 5  # after 0, 32, 96, 224 and 480 tokens
        monkeypatch.setattr(Costs, "best", lambda costs, likely: 0)
        drafted.clear()
        assert model.generate("The", max_tokens=100, temperature=1, seed=2) and not drafted


def test_a_short_answer_does_not_wait_for_the_draft_to_read_a_long_prompt(files, monkeypatch):
    monkeypatch.setattr(Costs, "known", True)
    with rkf.load(files[0], threads=1, draft=files[1]) as model:
        read, forward = [], model.draft._backend.forward
        monkeypatch.setattr(
            model.draft._backend,
            "forward",
            lambda rows, *rest: read.append(len(rows[0].tokens)) or forward(rows, *rest),
        )
        monkeypatch.setattr(Costs, "best", lambda costs, likely: 2)
        options = {"temperature": 1, "seed": 1, "raw": True, "logit_bias": {2: -100}}
        model.generate("The capital " * 50, max_tokens=6, **options)
        assert not read
        model.generate("The capital " * 50, max_tokens=60, **options)
        assert read


def test_what_cannot_work_is_refused_in_one_line(files, tmp_path):
    other = tiny.write(tmp_path / "other.rkf", CONFIG, WEIGHTS, tokenizer=tiny.byte_level_tokenizer(300))
    with pytest.raises(UsageError, match=r"other\.rkf: expected the tokenizer of"):
        rkf.load(files[0], draft=other)
    done = CliRunner().invoke(cli, ["run", str(files[0]), "--prompt", "The", "--draft", str(other)])
    assert (done.exit_code, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    done = CliRunner().invoke(cli, ["serve", str(files[0]), str(files[1]), "--draft", str(files[1])])
    assert done.exit_code == 2 and "--draft is for one model" in done.stderr


def test_the_command_line_takes_a_draft(files):
    arguments = ["run", str(files[0]), "--prompt", "The", "--max-tokens", "20", "--temperature", "0"]
    plain, drafted = (CliRunner().invoke(cli, [*arguments, *more]) for more in ([], ["--draft", str(files[1])]))
    assert plain.exit_code == 0 and plain.stdout == drafted.stdout
