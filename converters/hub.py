"""Models on the Hugging Face hub: USER/REPO:FILE. Their structure by ranges; fetched and pushed with their parts.

All requests go through huggingface_hub, with its endpoint, token and cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkf.errors import CorruptError, SourceError, StructureError, UsageError, naming
from rkf.file.body import part_count, verify_part
from rkf.file.container import files_of, open_file
from rkf.file.structure import Structure
from rkf.format.constants import SUPERBLOCK_BYTES
from rkf.format.part_directory import index_name, part_name
from rkf.format.superblock import parse_superblock

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>[^:]+))?")
# Time limit for the hub's first answer; a download that has started is not limited.
ANSWER_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository on the hub, or with `file` one file in it. `str` gives the name as users write it."""

    repo: str
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """USER/REPO or USER/REPO:FILE; None for anything else."""
        found = _NAME.fullmatch(text)
        return None if found is None else cls(found["repo"], found["file"])

    def __str__(self) -> str:
        return self.repo if self.file is None else f"{self.repo}:{self.file}"


@contextmanager
def reported(name: HubName) -> Iterator[None]:
    """Turn the hub's errors into one SourceError, and keep its library from telling of every try."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import logging

    # The first base class of the hub's error is the base class of its HTTP library, which depends on the hub's version.
    # Not __base__: that is OSError.
    http_error: Any = HfHubHTTPError.__bases__[0]
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        yield
    except (OSError, ValueError, RuntimeError, http_error) as error:  # RuntimeError: of a thread of an upload
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise SourceError(f"{name}: the hub cannot be used ({reason[0]})") from error
    finally:
        logging.set_verbosity(verbosity)


def all_files(name: HubName) -> list[str]:
    """The files of a repository."""
    from huggingface_hub import HfApi

    with reported(name):
        return list(HfApi().list_repo_files(name.repo))


def rkf_files(files: list[str]) -> list[str]:
    """The .rkf files at the root of a repository with these files, in name order, without parts of others."""
    return sorted(file for file in files if file.endswith(".rkf") and "/" not in file and index_name(file) not in files)


def the_file(name: HubName) -> HubName:
    """The file of this name, or the only .rkf file of the repository. Raises UsageError unless there is one."""
    if name.file is not None:
        return name
    found = rkf_files(all_files(name))
    if len(found) == 1:
        return HubName(name.repo, found[0])
    choice = f"choose one of {', '.join(found)} as {name.repo}:FILE" if found else "it has no .rkf file"
    raise UsageError(f"{name}: {choice}")


def fetch_file(name: HubName, anew: bool = False) -> Path:
    """A file in the hub's cache, fetched if necessary, or in any case with `anew`."""
    from huggingface_hub import hf_hub_download

    with reported(name):
        path = hf_hub_download(name.repo, str(name.file), etag_timeout=ANSWER_TIMEOUT_S, force_download=anew)
        return Path(path)


def fetch_model(name: HubName) -> Path:
    """An .rkf file in the hub's cache, with its parts if it is their index. All hashes are checked. Parts that an
    earlier call has fetched stay; one that is damaged is fetched once more, alone.

    Raises SourceError if the hub does not answer, and the errors of opening a file.
    """
    path = fetch_file(name)
    count = part_count(path)
    for number in range(1, count + 1):
        part = HubName(name.repo, part_name(str(name.file), number, count))
        try:
            verify_part(fetch_file(part))
        except CorruptError:
            verify_part(fetch_file(part, anew=True))
    with open_file(path):
        return path


def remote_structure(name: HubName) -> Structure:
    """The structure of a .rkf file, by two requests: one for the superblock and one for the directory.

    Raises SourceError if the hub does not answer, and the errors of opening a file with check="structure".
    """
    with naming(Path(str(name))):
        head, file_bytes = read_range(name, 0, SUPERBLOCK_BYTES)
        superblock = parse_superblock(head)
        if superblock.file_bytes != file_bytes:
            raise StructureError(f"expected {superblock.file_bytes} bytes, the hub has {file_bytes}: upload it again")
        directory, _ = read_range(name, superblock.directory_offset, file_bytes)
        return Structure(Path(str(name)), superblock, directory)


def read_range(name: HubName, start: int, end: int, revision: str | None = None) -> tuple[bytes, int]:
    """Bytes start … end - 1 of a file, fewer at its end, and the file's size. Raises SourceError."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with (
        reported(name),
        get_session().stream(
            "GET", hf_hub_url(name.repo, str(name.file), revision=revision), headers=headers, follow_redirects=True
        ) as response,
    ):
        hf_raise_for_status(response)
        stated = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("content-range", ""))
        if response.status_code != 206 or stated is None or int(stated[1]) != start or int(stated[2]) >= end:
            raise SourceError(f"{name}: the hub does not answer range requests for it: use `rkf pull` first")
        data = bytearray()
        for piece in response.iter_bytes():
            data += piece
            if len(data) > end - start:
                raise SourceError(f"{name}: the hub sent more bytes than asked for")
        return bytes(data), int(stated[3])


def push(path: Path, name: HubName, card: str, *, private: bool = False) -> str:
    """Upload a .rkf file, its parts if it has any, and its card (README.md) in one commit; the repository is made if
    needed. Returns its address.

    Raises SourceError if the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with reported(name):
        api.create_repo(name.repo, private=private, exist_ok=True)
        as_index, (_, *parts) = name.file or path.name, files_of(path)
        files: dict[str, Path | bytes] = {as_index: path, "README.md": card.encode()}
        files |= {part_name(as_index, number, len(parts)): part for number, part in enumerate(parts, 1)}
        operations = [CommitOperationAdd(file, content) for file, content in files.items()]
        return str(api.create_commit(name.repo, operations, commit_message=f"Upload {path.name}").repo_url)
