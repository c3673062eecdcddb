"""Two rooms are outside `rkf/`: the guards that keep them one package, and the wheel that users get."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VECTORS = [path for path in sorted((ROOT / "spec" / "vectors").glob("*.rkf")) if "-of-" not in path.name]  # no parts
PLACES = {"rkf": "rkf", "runtime": "rkf/runtime", "converters": "rkf/converters"}  # folder -> its place in a wheel


def run(*command, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("room", ["runtime", "converters"])
def test_a_room_under_another_name_is_refused(room):
    done = run(sys.executable, "-c", f"import {room}", cwd=ROOT)
    assert done.returncode == 1
    assert f"as rkf.{room}, not {room}" in done.stderr


@pytest.mark.parametrize("room", ["runtime", "converters"])
def test_a_checkout_finds_its_own_rooms(room):
    done = run(sys.executable, "-c", f"import rkf.{room} as room; print(room.__file__)", cwd=ROOT)
    assert Path(done.stdout.strip()) == ROOT / room / "__init__.py"


def test_tests_run_in_importlib_mode(pytestconfig):
    assert pytestconfig.getoption("importmode") == "importlib"
    assert not (ROOT / "conftest.py").exists()


@pytest.mark.parametrize("compiler", ["numba", "llvmlite"])
def test_the_newest_allowed_compilers_are_the_tested_ones(compiler):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = [text for text in project["dependencies"] if text.startswith(compiler)]
    major, minor = version(compiler).split(".")[:2]
    assert needed.endswith(f",<{major}.{int(minor) + 1}")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("rkf_llm-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in PLACES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected


def test_the_sdist_holds_what_the_wheel_is_built_from(built):
    (sdist,) = built.glob("rkf_llm-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "LICENSE", "README.md", "runtime/model.py", "converters/pipeline.py", "rkf/cli.py"}
    assert wanted <= names


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of a fresh environment outside the checkout, with our wheel and this environment's libraries."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = built.glob("rkf_llm-*.whl")
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    done = run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, str(wheel), cwd=folder)
    assert done.returncode == 0, done.stderr
    # Only libraries are shared: .pth files there, such as an editable install's, have no effect from here.
    Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_wheel_works_outside_the_checkout(installed, tmp_path):
    code = "import rkf, rkf.runtime, rkf.converters; print(rkf.__file__, rkf.runtime.__file__, rkf.load)"
    done = run(installed, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout
    done = run(installed, "-m", "rkf", "info", str(VECTORS[0]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ranks_id" in done.stdout


def test_the_installed_package_is_typed(installed, tmp_path):
    """A caller's type checker sees the public surface, the two outer rooms included."""
    caller = tmp_path / "caller.py"
    caller.write_text(
        "import rkf\n"
        "with rkf.open('a.rkf') as container:\n    reveal_type(container.decode('x'))\n"
        "with rkf.load('a.rkf', threads=1) as model:\n"
        "    reveal_type(model.generate('hi', temperature=0.5))\n"
        "    reveal_type(model.logits([1]))\n"
        "    model.generate('hi', temperatur=0.5)\n"
    )
    python = ["--python-executable", str(installed), "--cache-dir", str(tmp_path / "cache")]
    done = run(sys.executable, "-m", "mypy", "--strict", *python, str(caller), cwd=tmp_path)
    revealed = [line.partition("Revealed type is ")[2] for line in done.stdout.splitlines() if "Revealed" in line]
    assert len(revealed) == 3, done.stdout
    assert all("Any" not in text.partition("[")[0] for text in revealed), done.stdout
    assert 'Unexpected keyword argument "temperatur"' in done.stdout
    assert "Found 1 error" in done.stdout, done.stdout
