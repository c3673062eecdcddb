"""Every CPU level gives the same bits, forced in subprocesses; a level that this CPU lacks is refused, not tried."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rkf.cluster.recipe import Rule
from rkf.errors import UsageError
from rkf.runtime import cpu_features
from tests.runtime import tiny
from tests.runtime.files import write_model

ROOT = Path(__file__).parents[2]
HOST = [level for level, needs in cpu_features.LEVELS.items() if needs <= cpu_features.host_features()]
# One model with every index width, each in some matrix, on the grid and off it; 7 and 8 bits also without a table, 6
# bits also in groups.
CLUSTERS = {
    "layers.0.mlp.gate_proj": (64, True),
    "q_proj": (4, True),
    "k_proj": (8, True),
    "v_proj": (2, False),
    "o_proj": (32, True),
    "gate_proj": (64, False),
    "up_proj": (100, True),
    "down_proj": (200, True),
    "embed_tokens": (16, True),
}


@pytest.fixture(scope="module", params=["plain", "rotated"])
def model(tmp_path_factory, request):
    rotate = request.param == "rotated"
    sizes = {"hidden_size": 160, "intermediate_size": 288} if rotate else {}
    config = tiny.config(context_length=512, **sizes)

    def rule(name):
        found = [item for part, item in CLUSTERS.items() if part in name]
        k, grid = found[0] if found else (None, False)
        return Rule(k=k, grid=grid, affine="row" if grid else "none", exceptions=0.002)

    path = tmp_path_factory.mktemp("levels") / "m.rkf"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("rkf.cluster.grid._GROUPED_LOSS", float("inf"))  # so few weights are no Gaussian
        return write_model(path, config, tiny.weights(config), rule, rotate=rotate)


def run(model, level):
    environment = {**os.environ, "RKF_CPU": level, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.runtime.level_hash", str(model)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_all_levels_give_the_same_bits(model):
    hashes = {level: run(model, level) for level in HOST}
    assert len(set(hashes.values())) == 1, hashes


def test_a_level_is_checked_before_it_is_used(monkeypatch):
    monkeypatch.setattr(cpu_features, "host_features", lambda: frozenset({"avx2"}))
    monkeypatch.delenv("RKF_CPU", raising=False)
    assert cpu_features.level() == "portable"
    monkeypatch.setenv("RKF_CPU", "avx512")
    with pytest.raises(UsageError, match="lacks"):
        cpu_features.level()
    monkeypatch.setenv("RKF_CPU", "sse9")
    with pytest.raises(UsageError, match="expected one of"):
        cpu_features.level()
