"""Conversion on a local Ray cluster of two machines, one of which is lost midway. Skipped without ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from rkf.calibrate.calibration import Calibrate  # noqa: E402
from rkf.converters import ray_tasks  # noqa: E402
from rkf.converters.pipeline import convert  # noqa: E402
from rkf.converters.progress import Step  # noqa: E402
from rkf.errors import SourceError, UsageError  # noqa: E402
from tests.families.models import model_of, save  # noqa: E402
from tests.starting_ray import patiently  # noqa: E402

# Ray's own: sockets and files of the processes that it started.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {"num_cpus": 0, "include_dashboard": False}
        found = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        try:
            yield found
        finally:
            ray.shutdown()
            found.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(model_of("llama"), tmp_path / "model")


def test_the_bytes_of_one_process_when_a_machine_is_lost(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    first, second = (patiently(lambda: cluster.add_node(num_cpus=1)) for _ in range(2))
    done: list[str] = []

    def lose_one(step: Step) -> None:
        done.append(step.name)
        if len(done) == 2:
            cluster.remove_node(first, allow_graceful=False)

    convert(folder, tmp_path / "one.rkf", k=16)
    ray.init(address=cluster.address, log_to_driver=False)
    with ray_tasks.ray_machines(cluster.address) as machines:
        assert (machines.machines, machines.cpus) == (2, 2)
    # Two tasks at a time, so that one of them is on the machine that is lost.
    convert(folder, tmp_path / "many.rkf", k=16, ray=cluster.address, workers=2, progress=lose_one)
    assert (tmp_path / "many.rkf").read_bytes() == (tmp_path / "one.rkf").read_bytes()
    assert len(done) > 12 and not first.any_processes_alive() and second.any_processes_alive()


def test_a_calibrated_conversion_gives_the_same_bytes(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the text of a calibration " * 40)
    for name, options in (("one.rkf", {}), ("many.rkf", {"ray": cluster.address})):
        convert(folder, tmp_path / name, bpw=5.0, calibrate=Calibrate(tmp_path / "text"), **options)
    assert (tmp_path / "many.rkf").read_bytes() == (tmp_path / "one.rkf").read_bytes()


def test_failures_are_one_line(cluster: Cluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ray_tasks, "_VERSIONS", "rkf 0.0")
        with pytest.raises(UsageError, match=r"ray: a worker has rkf .*, this process rkf 0\.0: install the same"):
            convert(folder, tmp_path / "m.rkf", ray=cluster.address)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError) as caught:
        convert(folder, tmp_path / "m.rkf", ray=cluster.address)
    assert "down_proj.weight: NaN or infinite weights" in str(caught.value) and "\n" not in str(caught.value)
    ray.shutdown()
    with pytest.raises(UsageError, match=r"ray 127\.0\.0\.1:1: no cluster answers"):
        convert(folder, tmp_path / "m.rkf", ray="127.0.0.1:1")
    assert not (tmp_path / "m.rkf").exists()


def test_a_cluster_that_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray 2.60 raises then; a cluster of this process's own would share its token."""

    def init(**_: object) -> None:
        cause = RuntimeError("Failed to connect to GCS. Last connection error: Traceback\n RPC error: InvalidAuthToken")
        raise ConnectionError("Failed to connect to Ray cluster") from cause

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UsageError, match=r"ray auto: the cluster asks for a token: set RAY_AUTH_MODE=token"):
        ray_tasks.ray_machines("auto").__enter__()
