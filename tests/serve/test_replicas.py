"""Two replicas on a local Ray cluster: both answer, with the text of one model. Skipped without ray."""

from __future__ import annotations

import json
import random
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
from click.testing import CliRunner  # noqa: E402
from ray.serve import scripts  # noqa: E402

import rkf  # noqa: E402
from rkf.errors import RkfError  # noqa: E402
from tests.runtime import tiny  # noqa: E402
from tests.runtime.files import write_model  # noqa: E402
from tests.starting_ray import patiently  # noqa: E402

# Ray's own: sockets and files of the processes that it started.
pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = [f"The capital of {n}" for n in range(6)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.config(eos_ids=())
    found: Path = write_model(tmp_path_factory.mktemp("replicas") / "tiny.rkf", config, tiny.weights(config))
    return found


@pytest.fixture(scope="module")
def address(path: Path) -> Iterator[str]:
    port = unused_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patiently(lambda: ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False))
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            command = ["--non-blocking", "--name", "rkf", "rkf.serve.replicas:replicas"]
            done = CliRunner().invoke(scripts.run, [*command, f"models={path}", "replicas=2"])  # as docs/scale.md says
            assert done.exit_code == 0, done.output
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


def unused_port() -> int:
    """A port below those that the system gives to Ray's many sockets, one of which may take a higher one before it is
    used here.
    """
    for port in random.sample(range(20_000, 30_000), 100):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise OSError("no unused port")


def post(address: str, **body: Any) -> bytes:
    data = json.dumps({"model": "tiny", "max_tokens": 8, "temperature": 0, **body}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: bytes = answer.read()
    return found


def tokens_of(address: str) -> tuple[str, float]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    began = next(line for line in lines if line.startswith("rkf_generated_tokens_created"))
    count = next(line for line in lines if line.startswith("rkf_generated_tokens_total"))
    return began, float(count.split()[-1])


def test_two_replicas_answer_as_one_model(address: str, path: Path) -> None:
    states = serve.status().applications["rkf"].deployments["rkf"].replica_states
    assert dict(states) == {"RUNNING": 2}
    with rkf.load(path) as model:
        expected = [model.generate(prompt, raw=True, max_tokens=8, temperature=0) for prompt in PROMPTS]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda prompt: json.loads(post(address, prompt=prompt)), PROMPTS * 4))
    assert [each["choices"][0]["text"] for each in found] == expected * 4
    counts: dict[str, float] = {}  # of each replica: when it began to count, which tells them apart, and its tokens
    until = monotonic() + 60
    with ThreadPoolExecutor(6) as pool:  # requests one by one may all go to one replica
        while len(counts) < 2 and monotonic() < until:
            counts.update(pool.map(lambda _: tokens_of(address), range(12)))
    assert sum(counts.values()) == len(PROMPTS) * 4 * 8


def test_a_stream_arrives_in_pieces(address: str) -> None:
    events = [line for line in post(address, prompt=PROMPTS[0], stream=True).decode().splitlines() if line]
    assert len(events) > 4 and events[-1] == "data: [DONE]"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    from rkf.serve.replicas import ReplicaOptions, replicas

    with pytest.raises(RkfError, match=r"none\.rkf"):
        replicas(ReplicaOptions(models=str(tmp_path / "none.rkf")))
