"""Embeddings: pooled hidden states of transformers, over HTTP through the `openai` client, beside answers; refusals."""

import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import rkf
from rkf.cluster.recipe import Rule
from rkf.errors import ContextLengthError, UsageError
from rkf.runtime import engine
from rkf.runtime.backend import Row
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.embedding import Embedding
from rkf.runtime.engine import Engine
from rkf.runtime.torch_backend import TorchBackend
from tests.runtime import tiny
from tests.runtime.asking import Recorded
from tests.runtime.files import write_model
from tests.runtime.test_numpy_backend import reference
from tests.serve.running import call, running

CONFIG = tiny.config(context_length=1024)
TEXTS = ["The capital of France", "x", "def add(a, b):\n    return a + b\n" * 8, "Größe, naïve café"]
PATH = "/v1/embeddings"


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def theirs():
    return reference(CONFIG)


@pytest.fixture(scope="module")
def container(theirs, tmp_path_factory):
    weights = {name: value.detach().numpy() for name, value in theirs.state_dict().items() if name != "lm_head.weight"}
    with rkf.open(write_model(tmp_path_factory.mktemp("same") / "m.rkf", CONFIG, weights)) as found:
        yield found


@pytest.fixture
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.parametrize("device", ["cpu", "exact", "cpu-torch"])
def test_hidden_states_are_those_of_transformers(theirs, container, device):
    ids = np.random.Generator(np.random.Philox(key=3)).integers(0, 400, 600)
    with torch.no_grad():
        wanted = theirs.model(torch.from_numpy(ids)[None]).last_hidden_state[0].numpy()
    exact = device == "exact"
    backend = TorchBackend(container) if device == "cpu-torch" else CpuBackend(container, threads=2, exact=exact)
    sequence = backend.new_sequence(1024)
    found = np.concatenate([backend.hidden([Row(sequence, part)], "all") for part in np.split(ids, [1, 2, 300])])
    assert np.abs(found - wanted).max() < (1e-2 if device == "cpu" else 1e-5) * np.abs(wanted).max()
    for pooling, states in (("mean", wanted.mean(0)), ("last", wanted[-1])):
        each = Embedding(ids.tolist(), pooling)
        together = Engine(backend)
        together.submit(each.request)
        while together.step():
            pass
        assert each.request.finish == "read"
        assert np.dot(each.vector(), unit(states)) > 1 - (1e-4 if device == "cpu" else 1e-7)


def test_a_rotated_model_has_the_states_of_the_plain_one(tmp_path):
    weights, ids = tiny.weights(CONFIG), np.arange(50)
    found = []
    for rotate in (False, True):
        path = write_model(
            tmp_path / f"{rotate}.rkf", CONFIG, weights, None if not rotate else Rule(k=64), rotate=rotate
        )
        with rkf.open(path) as container:
            backend = CpuBackend(container, threads=1)
            assert len(container.model.program.final_norm) == 1
            found.append(backend.hidden([Row(backend.new_sequence(50), ids)], "all"))
    assert found[0].shape == found[1].shape


def test_texts_are_read_beside_answers_with_the_bits_that_they_have_alone(container, monkeypatch):
    backend = CpuBackend(container, threads=1)
    random = np.random.Generator(np.random.Philox(key=5))
    texts = [random.integers(0, 400, n).tolist() for n in (1, 2, 90, 300, 700)]
    texts.append([*texts[3], 7])
    alone = []
    for pooling in ("mean", "last"):
        for ids in texts:
            each, by_itself = Embedding(ids, pooling), Engine(backend)
            by_itself.submit(each.request)
            while by_itself.step():
                pass
            alone.append(each.vector())
    page = backend._plan.layout.groups[0].page_bytes
    for memory in (None, 6 * page):  # with so little, texts are read in turn, and some twice
        together = Engine(backend, memory_bytes=memory and memory + backend.held_bytes)
        answers = [Recorded(texts[2], 120), Recorded([5], 40)]
        found = [Embedding(ids, pooling) for pooling in ("mean", "last") for ids in texts]
        for request in (answers[0], *(each.request for each in found), answers[1]):
            together.submit(request)
        while together.step():
            [answer.take() for answer in answers]
        assert all(np.array_equal(each.vector(), wanted) for each, wanted in zip(found, alone, strict=True))
        assert [answer.finish for answer in answers] == ["length", "length"]
    assert found[-1].request.cached_tokens == 0 or found[-1].request.cached_tokens >= engine.WORTHWHILE


def test_embeddings_over_http_are_those_of_this_process(client, port, model):
    for pooling in ("mean", "last"):
        wanted = model.embed(TEXTS, pooling=pooling)
        found = client.embeddings.create(model="tiny", input=TEXTS, extra_body={"pooling": pooling})
        assert np.array_equal([each.embedding for each in found.data], wanted)  # the client asks for base64
        assert [each.index for each in found.data] == [0, 1, 2, 3]
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))
    status, plain = call(port, PATH, {"model": "tiny", "input": ids, "encoding_format": "float"})
    assert status == 200
    assert np.array_equal(np.float32([each["embedding"] for each in plain["data"]]), model.embed(TEXTS))
    single = call(port, PATH, {"model": "tiny", "input": ids[0], "encoding_format": "base64"})[1]["data"]
    assert np.array_equal(np.frombuffer(base64.b64decode(single[0]["embedding"]), "<f4"), model.embed(TEXTS[:1])[0])
    assert client.embeddings.create(model="tiny", input="x").data[0].embedding == model.embed(["x"])[0].tolist()


def test_a_text_ends_as_its_tokenizer_ends_it(tmp_path):
    raw = tiny.byte_level_tokenizer()
    raw.post_processor = TemplateProcessing("$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    with rkf.load(tiny.write(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG), tokenizer=raw)) as ending:
        ids = ending.text_ids("The capital")
        assert ids[-1] != 0
        for given in ("The capital", "The capital<|endoftext|>", [*ids, 0]):
            assert np.array_equal(ending.embed([given], pooling="last"), ending.embed([[*ids, 0]], pooling="last"))
        with pytest.raises(UsageError):
            ending.embed([""])


def test_fewer_dimensions_are_the_first_ones_scaled_to_length_1(client, model):
    found = client.embeddings.create(model="tiny", input=TEXTS, dimensions=8)
    wanted = unit(model.embed(TEXTS)[:, :8])
    assert np.allclose([each.embedding for each in found.data], wanted, atol=1e-6)


def test_many_texts_and_clients_at_once(port, model):
    texts = [f"number {n}" for n in range(100)]
    wanted = model.embed(texts)

    def ask(_):
        return call(port, PATH, {"model": "tiny", "input": texts})[1]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(ask, range(4)):
            assert np.array_equal(np.float32([each["embedding"] for each in found["data"]]), wanted)


def test_the_server_may_pool_otherwise(paths, model):
    with running({"tiny": paths["tiny"]}, pooling="last") as port:
        found = call(port, PATH, {"model": "tiny", "input": "The capital"})[1]["data"][0]["embedding"]
    assert np.array_equal(np.float32(found), model.embed(["The capital"], pooling="last")[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": []}, "expected 1 to 2048 texts"),
        ({"input": ["x"] * 2049}, "expected 1 to 2048 texts"),
        ({"input": ["x", ""]}, "input.1: the prompt is empty"),
        ({"input": None}, "input"),
        ({"input": [["x"]]}, "input"),
        ({"input": [400]}, "input.0: expected token ids below 400"),
        ({"input": ["x", "capital " * 3000]}, "input.1: the prompt has at least"),
        ({"encoding_format": "int8"}, "encoding_format: "),
        ({"dimensions": 0}, "dimensions: "),
        ({"dimensions": 65}, "dimensions: expected 1 to 64"),
        ({"pooling": "cls"}, "pooling: "),
    ],
    ids=range(11),
)
def test_what_is_refused(port, change, message):
    status, found = call(port, PATH, {"model": "tiny", "input": "x"} | change)
    assert status == 400 and message in found["error"]["message"]


def test_what_is_refused_in_process(model):
    for texts, error in (([""], UsageError), ([[400]], UsageError), ([[1] * 1025], ContextLengthError)):
        with pytest.raises(error):
            model.embed(texts)
    with pytest.raises(UsageError, match="expected a list of texts"):
        model.embed("a text")  # its letters are no texts
    with pytest.raises(UsageError, match=r"expected integers, got \[1.5\]"):
        model.embed([[1.5]])
    assert model.embed([]).shape == (0, 64)
