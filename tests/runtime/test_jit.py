"""Compiled kernels: a cache filled by several processes, damaged or read-only, and the kernels that a wheel carries."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rkf.runtime import cpu_features, jit, objects, prebuild
from rkf.runtime.kernels import table

LOAD = (
    "import sys; from pathlib import Path; from rkf.runtime import cpu_features, jit, objects\n"
    "objects.PREBUILT = Path(sys.argv[1])\njit.addresses(sys.argv[2:], cpu_features.level())\n"
    "print('numba' in sys.modules)"
)
NOTHING = Path("/nonexistent")  # a package without compiled kernels, as a checkout is
NAMES = ["publish", "row:bf16"]
COMPILING = (
    f"rkf: compiling {len(NAMES)} kernels for this CPU ({cpu_features.level()}), once; this takes some seconds\n"
)


def start(cache, prebuilt=NOTHING):
    environment = os.environ | {"RKF_CACHE": str(cache)}
    command = [sys.executable, "-c", LOAD, str(prebuilt), *NAMES]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    message = process.communicate(timeout=120)[1]
    return process.returncode, message


def files(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_threads_link_at_once(tmp_path):
    load = "from concurrent.futures import ThreadPoolExecutor; from rkf.runtime import cpu_features, jit; import sys\n"
    load += "sys.setswitchinterval(1e-5)\nlink = lambda _: jit.addresses(sys.argv[1:], cpu_features.level())\n"
    load += "with ThreadPoolExecutor(8) as pool: assert len({tuple(x.items()) for x in pool.map(link, range(8))}) == 1"
    assert ended(start(tmp_path)) == (0, COMPILING)
    environment = os.environ | {"RKF_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", load, *NAMES], env=environment, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mappings as Linux places them")
def test_a_file_of_more_than_2_gb_may_lie_between():
    """With LLVM's older linker this aborts, every time."""
    subprocess.run([sys.executable, "-m", "tests.runtime.crowded_memory"], check=True)


def test_processes_that_start_at_once_fill_an_empty_cache(tmp_path):
    processes = [start(tmp_path) for _ in range(3)]
    assert [ended(process) for process in processes] == [(0, COMPILING)] * 3
    assert [path.name for path in files(tmp_path)] == ["publish.o", "row-bf16.o"]
    torn = files(tmp_path)[0]
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
    monkeypatch.setattr(objects, "PREBUILT", NOTHING)
    monkeypatch.setattr(table, "names", lambda level: NAMES)
    seen = []
    first, second = jit.warm_up(lambda *step: seen.append(step)), jit.warm_up()
    assert (first.kernels, first.compiled, second.compiled) == (2, 2, 0)
    assert seen == [(0, 2), (1, 2)]
    assert ended(start(tmp_path)) == (0, "")


# --- a wheel's kernels

PLATFORMS = [(level, triple) for triple, levels in prebuild.PLATFORMS.items() for level in levels]
# Another process, another order, and Numba told that the CPU is another.
BUILD = (
    "import sys; from pathlib import Path; from rkf.runtime import objects, prebuild\n"
    "objects.PREBUILT = Path(sys.argv[1])\n"
    "for platform in prebuild.PLATFORMS.items():\n"
    "    for level in platform[1]: prebuild.prebuild(level, platform[0], sys.argv[2:])"
)


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory):
    """Some kernels as a wheel carries them, compiled in another process."""
    folder = tmp_path_factory.mktemp("prebuilt")
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    command = [sys.executable, "-c", BUILD, folder, *NAMES, "serve"]
    subprocess.run(command, env=environment, check=True)
    return folder


@pytest.mark.parametrize(("level", "triple"), PLATFORMS)
def test_a_wheels_kernels_equal_freshly_compiled_ones(prebuilt, tmp_path, monkeypatch, level, triple):
    names = ["serve", *reversed(NAMES)]
    found = {}
    for folder in (prebuilt, tmp_path):
        monkeypatch.setattr(objects, "PREBUILT", folder)
        prebuild.prebuild(level, triple, names)
        found[folder] = [objects.read(objects.shipped(level, triple), name) for name in names]
    assert None not in found[prebuilt]
    assert found[prebuilt] == found[tmp_path]


def test_a_wheels_kernels_need_no_compiler_and_no_cache(prebuilt, tmp_path):
    ready = start(tmp_path / "none", prebuilt)
    assert ready.communicate(timeout=120) == ("False\n", "")
    assert files(tmp_path) == []


def test_a_damaged_kernel_of_a_wheel_is_compiled(prebuilt, tmp_path):
    copy = shutil.copytree(prebuilt, tmp_path / "copy")
    for damaged in copy.rglob("publish.o"):
        damaged.write_bytes(damaged.read_bytes()[:-1])
    assert ended(start(tmp_path / "cache", copy)) == (0, COMPILING.replace("2 kernels", "1 kernels"))


def test_kernels_of_other_sources_are_never_found(tmp_path, monkeypatch):
    room = Path(objects.__file__).parent
    for name in ("structs.py", "kernels/build.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(room / name, tmp_path / name)
    monkeypatch.setattr(objects, "_HERE", tmp_path)
    found = set()
    for name in ("structs.py", "kernels/build.py"):
        objects._digest.cache_clear()
        found |= {objects.shipped("avx2").name, objects.kept("avx2").name}
        with (tmp_path / name).open("a") as source:
            source.write("# one more byte\n")
    objects._digest.cache_clear()
    assert len(found | {objects.shipped("avx2").name, objects.kept("avx2").name}) == 6
    objects._digest.cache_clear()


@pytest.mark.parametrize("level", ["avx512", "avxvnni", "avx2", "neon", "portable"])
def test_every_listed_kernel_exists(level):
    names = table.names(level)
    assert len(names) == len(set(names))
    for name in names:
        function, arguments = table.kernel(name, level)
        assert callable(function) and len(arguments) in (3, 4, 8)
