"""The cache of compiled kernels: filled by several processes at once, with incomplete files, and not writable."""

import os
import subprocess
import sys

import pytest

from rkf.runtime import cpu_features, jit
from rkf.runtime.kernels import table

LOAD = "import sys; from rkf.runtime import cpu_features, jit; jit.addresses(sys.argv[1:], cpu_features.level())"
NAMES = ["publish", "row:bf16"]
COMPILING = (
    f"rkf: compiling {len(NAMES)} kernels for this CPU ({cpu_features.level()}), once; this takes some seconds\n"
)


def start(cache):
    environment = os.environ | {"RKF_CACHE": str(cache)}
    command = [sys.executable, "-c", LOAD, *NAMES]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def ended(process):
    message = process.communicate(timeout=120)[1]
    return process.returncode, message


def objects(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_threads_link_at_once(tmp_path):
    load = "from concurrent.futures import ThreadPoolExecutor; from rkf.runtime import cpu_features, jit; import sys\n"
    load += "sys.setswitchinterval(1e-5)\nlink = lambda _: jit.addresses(sys.argv[1:], cpu_features.level())\n"
    load += "with ThreadPoolExecutor(8) as pool: assert len({tuple(x.items()) for x in pool.map(link, range(8))}) == 1"
    assert ended(start(tmp_path)) == (0, COMPILING)
    environment = os.environ | {"RKF_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", load, *NAMES], env=environment, check=True)


def test_processes_that_start_at_once_fill_an_empty_cache(tmp_path):
    processes = [start(tmp_path) for _ in range(3)]
    assert [ended(process) for process in processes] == [(0, COMPILING)] * 3
    assert [path.name for path in objects(tmp_path)] == ["publish.o", "row-bf16.o"]
    torn = objects(tmp_path)[0]
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-1])
    assert ended(start(tmp_path)) == (0, COMPILING.replace("2 kernels", "1 kernels"))
    assert torn.read_bytes() == whole
    assert ended(start(tmp_path)) == (0, "")


def test_a_cache_that_cannot_be_written_costs_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    said = f"rkf: {blocked} cannot be written, so every start compiles again; set RKF_CACHE\n"
    assert ended(start(blocked)) == (0, COMPILING + said)


def test_warming_up_leaves_nothing_to_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("RKF_CACHE", str(tmp_path))
    monkeypatch.setattr(table, "names", lambda level: NAMES)
    jit._folder.cache_clear()
    seen = []
    first, second = jit.warm_up(lambda *step: seen.append(step)), jit.warm_up()
    jit._folder.cache_clear()
    assert (first.kernels, first.compiled, second.compiled) == (2, 2, 0)
    assert seen == [(0, 2), (1, 2)]
    assert ended(start(tmp_path)) == (0, "")


@pytest.mark.parametrize("level", ["avx512", "avx2", "neon", "portable"])
def test_every_listed_kernel_exists(level):
    names = table.names(level)
    assert len(names) == len(set(names))
    for name in names:
        function, arguments = table.kernel(name, level)
        assert callable(function) and len(arguments) in (3, 4, 8)
