"""Sessions: keys and values in a file. The same bits as without, what other models and damage lead to, privacy."""

import stat
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rkf
from rkf.cli import cli
from rkf.cluster.recipe import Rule
from rkf.errors import BindingError, IntegrityError, RkfError, UsageError
from rkf.file.arrays import packed_arrays, read_arrays
from rkf.file.values import write_values
from rkf.runtime import session as sessions
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.engine import Engine
from rkf.runtime.session import Session
from tests.runtime import tiny
from tests.runtime.asking import Recorded, run
from tests.runtime.files import write_model
from tests.runtime.test_engine import KINDS, PROGRAMS, assert_as_alone, small_steps
from tests.spec.document import VECTORS

CONFIG = tiny.config(context_length=2048, eos_ids=())
LONG = "The capital of France is Paris. " * 60
FILES = sorted({*KINDS, *PROGRAMS[:2], *(file for file in PROGRAMS if "long" in file)})


@pytest.fixture(scope="module")
def backends():
    opened = {name: rkf.open(VECTORS / name) for name in FILES}
    yield {name: (container, CpuBackend(container, threads=1)) for name, container in opened.items()}
    for container in opened.values():
        container.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_texts_go_on_with_the_same_bits(backends, tmp_path_factory, data):
    container, backend = backends[data.draw(st.sampled_from(FILES))]
    path = tmp_path_factory.mktemp("session") / "s"
    vocab, longest = backend.metadata.vocab_size, min(backend.metadata.context_length, 64)
    stem = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=longest - 20))
    with small_steps(backend, data.draw(st.integers(2, 40))):
        for _ in range(3):
            engine = Engine(backend)
            session = Session(path, container, backend, engine)
            session.load()
            rest = data.draw(st.lists(st.integers(0, vocab - 1), max_size=8))
            request = Recorded(stem + rest, len(stem) + len(rest) + data.draw(st.integers(1, 8)))
            run(engine, request)
            assert_as_alone(backend, request)
            session.save()
            stem = data.draw(st.sampled_from([stem, request.ids[: longest - 20]]))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model") / "m.rkf", CONFIG, tiny.weights(CONFIG))


def ask(model, session, prompt, **options):
    """A text of a new process, as far as the model's memory goes; how many tokens of the prompt it knew."""
    with rkf.load(model, threads=1, **options) as ready:
        kept = ready.session(session)
        kept.load()
        generation = ready.stream(prompt, max_tokens=12)
        text = "".join(generation)
        kept.save()
    return text, generation.request.cached_tokens, len(generation.prompt)


@pytest.mark.parametrize("kv_cache", ["int16", "int16-int8", "int8", "f32"])
def test_a_prompt_is_computed_once(model, tmp_path, kv_cache):
    path = tmp_path / "s"
    with rkf.load(model, threads=1, kv_cache=kv_cache) as ready:
        wanted, other = (ready.generate(prompt, max_tokens=12) for prompt in (LONG, LONG + " And?"))
    text, cached, _ = ask(model, path, LONG, kv_cache=kv_cache)
    assert (text, cached) == (wanted, 0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text, cached, tokens = ask(model, path, LONG, kv_cache=kv_cache)
    assert (text, cached) == (wanted, tokens - 1)
    text, cached, tokens = ask(model, path, LONG + " And?", kv_cache=kv_cache)
    assert text == other and tokens - cached < 20
    text, cached, tokens = ask(model, path, "Else", kv_cache=kv_cache)
    assert cached < 10


def test_a_session_of_another_model_or_other_arithmetic_is_refused_and_stays(model, tmp_path, monkeypatch):
    path = tmp_path / "s"
    ask(model, path, LONG)
    before = path.read_bytes()
    changed = tiny.write(tmp_path / "changed.rkf", CONFIG, tiny.weights(CONFIG, seed=1))
    other = tiny.config(context_length=2048, eos_ids=(), rope_theta=500.0)
    turned = tiny.write(tmp_path / "turned.rkf", other, tiny.weights(CONFIG))
    for file, options, what in (
        (changed, {}, "model, or of other values"),
        (turned, {}, "model, or of other values"),
        (model, {"kv_cache": "int8"}, "number format"),
        (model, {"exact": True, "kv_cache": "int16"}, "arithmetic"),
    ):
        with pytest.raises(BindingError, match=f"a session of another {what}"):
            ask(file, path, LONG, **options)
    monkeypatch.setattr("rkf.runtime.objects.edition", lambda: "later")
    with pytest.raises(BindingError, match="version of rkf"):
        ask(model, path, LONG)
    assert path.read_bytes() == before


def test_values_are_bound_too(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    file, values = write_model(tmp_path / "k.rkf", CONFIG, tiny.weights(CONFIG), Rule(k=8)), tmp_path / "v.rkv"
    with rkf.open(file) as container:
        old = container.values(name)
        write_values(values, container, {name: replace(old, centroids=old.centroids * np.float32(2))})
    ask(file, tmp_path / "s", "The capital")
    with pytest.raises(BindingError):
        ask(file, tmp_path / "s", "The capital", values=values)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_one_line_and_what_is_sealed_again_is_checked(backends, tmp_path_factory, data):
    container, backend = backends[data.draw(st.sampled_from(FILES))]
    path = tmp_path_factory.mktemp("damage") / "s"
    engine = Engine(backend)
    run(engine, Recorded([1, 2, 3, 1, 2], 8))
    Session(path, container, backend, engine).save()
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:at] + (bytes([whole[at] ^ 1]) + whole[at + 1 :] if data.draw(st.booleans()) else b""))
    else:
        arrays = read_arrays(whole, sessions._KIND, sessions._ARRAYS)
        name = data.draw(st.sampled_from(sorted({*arrays} - {"bound"})))
        array = arrays[name].copy()
        if data.draw(st.booleans()) or not array.size:
            array = np.concatenate([array, array[:1]]) if len(array) else np.zeros((1, *array.shape[1:]), array.dtype)
        elif array.dtype.kind == "f":
            array = array[..., :-1]
        else:
            flat = array.reshape(-1)
            flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.sampled_from([0, 1, 2, 255]))
            if array.dtype.kind == "i":
                flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.sampled_from([-1, 1 << 40, 5, 9]))
        path.write_bytes(packed_arrays(sessions._KIND, arrays | {name: array}))
    other = Engine(backend)
    try:
        Session(path, container, backend, other).load()
    except RkfError as error:
        assert isinstance(error, IntegrityError | UsageError) and "\n" not in str(error)
        assert str(error).startswith(str(path))
    else:
        run(other, Recorded([1, 2, 3, 1, 2], 8))  # another text, but no crash


def test_what_is_not_the_users_own_file_is_refused(model, tmp_path):
    own, link = tmp_path / "s", tmp_path / "link"
    ask(model, own, "The")
    link.symlink_to(own)
    with pytest.raises(UsageError, match="expected a session of your own"):
        ask(model, link, "The")


def test_a_file_of_another_kind_is_not_to_be_removed(model, tmp_path):
    (tmp_path / "notes").write_text("mine")
    for path in (model, tmp_path / "notes"):
        before = path.read_bytes()
        with pytest.raises(UsageError, match="expected a session, got a file of another kind: name another file"):
            ask(model, path, "The")
        assert path.read_bytes() == before


def test_the_commands_take_a_session(model, tmp_path):
    prompt, path = tmp_path / "p", tmp_path / "s"
    prompt.write_text(LONG)

    def answer(*more, code=0):
        done = CliRunner().invoke(cli, ["run", str(model), "--prompt-file", str(prompt), "--max-tokens", "8", *more])
        assert done.exit_code == code, done.stderr
        return done

    wanted = answer("--stats")
    assert "known" not in wanted.stderr
    for known in (False, True):
        done = answer("--stats", "--session", str(path))
        assert done.stdout == wanted.stdout and ("of them known" in done.stderr) == known
    lines = "The capital?\nAnd?\n"
    plain = CliRunner().invoke(cli, ["chat", str(model), "--max-tokens", "8"], input=lines)
    for _ in range(2):
        kept = CliRunner().invoke(cli, ["chat", str(model), "--max-tokens", "8", "--session", str(path)], input=lines)
        assert (kept.exit_code, kept.stdout) == (0, plain.stdout)
    assert "got a folder" in answer("--session", str(tmp_path), code=2).stderr
    assert "there is no folder" in answer("--session", str(tmp_path / "none" / "s"), code=2).stderr
    path.write_bytes(path.read_bytes()[:-9])
    assert answer("--session", str(path), code=3).stderr.count("\n") == 1
