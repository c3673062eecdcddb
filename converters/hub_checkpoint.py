"""A checkpoint on the Hugging Face hub, converted without a copy of its weights: hub:USER/REPO.

Its small files are fetched into a scratch folder. Its safetensors files stand there with their headers alone; the rest
is a hole, which takes no room on the disk. So everything that reads a folder reads this one, and tensors come by range
requests when they are read. One commit is used throughout.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from rkf.cache import cache_dir
from rkf.converters.hf import HfSource
from rkf.converters.hub import ANSWER_TIMEOUT_S, HubName, read_range, reported
from rkf.converters.pull import FROM_HUB, SMALL_FILES
from rkf.converters.shards import INDEX, SINGLE, listed_shards
from rkf.errors import SourceError, UsageError
from rkf.file import kept_json
from rkf.file.atomic import replacing
from rkf.file.private import private_folder, read_private
from rkf.file.scratch import scratch

_PIECE_BYTES = 64 << 20  # asked for at a time
_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_PAUSES_S = (1, 2, 4, 8)  # before a request that failed is sent again
_KIND, _MOST = "hash 1", 1 << 12  # of a kept hash


class HubCheckpoint:
    """The files of one commit. folder: as a folder in Hugging Face's layout, whose weights are holes. See
    `rkf.converters.shards.WeightReader`.

    Raises SourceError if the hub does not answer, or has no weights in safetensors there.
    """

    def __init__(self, name: HubName) -> None:
        from huggingface_hub import HfApi, snapshot_download

        with reported(name):
            commit = HfApi().model_info(name.repo).sha
        if commit is None:
            raise SourceError(f"{name}: the hub names no commit")
        self.commit, self._name = commit, name
        with ExitStack() as stack:
            self.folder = stack.enter_context(scratch())
            with reported(name):
                snapshot_download(
                    name.repo,
                    revision=commit,
                    allow_patterns=list(SMALL_FILES),
                    local_dir=self.folder,
                    etag_timeout=ANSWER_TIMEOUT_S,
                )
            self._sizes = {shard: self._stand_in(shard) for shard in self._shards()}
            finalize(self, stack.pop_all().close)

    def read_values(self, path: Path, dtype: np.dtype[Any], count: int, offset: int) -> NDArray[Any]:
        """`dtype[count]` at a byte offset of a shard."""
        values = np.empty(count * dtype.itemsize, np.uint8)
        for start in range(0, len(values), _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, len(values))
            values[start:stop] = np.frombuffer(self._bytes(path.name, offset + start, offset + stop), np.uint8)
        return values.view(dtype)

    def hash_file(self, path: Path) -> str:
        """BLAKE3 (hex) of a shard, which is read once through for it and not again: the hash is kept by the hub's own
        hash of the content, for later runs.
        """
        kept = cache_dir() / "hashes" / f"{blake3(self._content_id(path.name).encode()).hexdigest()[:32]}.json"
        try:
            return str(kept_json.opened(_KIND, read_private(kept, _MOST) or b"")["blake3"])
        except (ValueError, KeyError):
            found = self._hash(path.name)
        private_folder(kept.parent)
        with replacing(kept, force=True, private=True) as file:
            file.write(kept_json.sealed(_KIND, {"blake3": found}))
        return found

    def _hash(self, shard: str) -> str:
        digest, size = blake3(max_threads=blake3.AUTO), self._sizes[shard]
        for start in range(0, size, _PIECE_BYTES):
            digest.update(self._bytes(shard, start, min(start + _PIECE_BYTES, size)))
        return digest.hexdigest()

    def _content_id(self, shard: str) -> str:
        """What is another text for another content: the hub's hash of the file, and its size."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with reported(self._name):
            url = hf_hub_url(self._name.repo, shard, revision=self.commit)
            found = get_hf_file_metadata(url, timeout=ANSWER_TIMEOUT_S)
        return f"{found.etag or self.commit} {shard if found.etag is None else ''} {self._sizes[shard]}"

    def _shards(self) -> list[str]:
        """The names of the safetensors files, as `rkf.converters.shards.shards` finds them in a folder."""
        from huggingface_hub import HfApi

        with reported(self._name):
            files = HfApi().list_repo_files(self._name.repo, revision=self.commit)
        if SINGLE in files:
            return [SINGLE]
        if INDEX in files:
            return listed_shards(self.folder)
        raise SourceError(f"{self._name}: neither {SINGLE} nor {INDEX} is there")

    def _stand_in(self, shard: str) -> int:
        """Make the file of a shard: its header, and a hole in place of the tensors. Its size."""
        start, size = self._range(shard, 0, 8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MOST_HEADER_BYTES, size - 8):
            raise SourceError(f"{self._name}: {shard}: not a safetensors file")
        header = self._bytes(shard, 8, 8 + length) if length else b""
        with (self.folder / shard).open("wb") as file:
            file.write(start + header)
            file.truncate(size)
        return size

    def _bytes(self, shard: str, start: int, stop: int) -> bytes:
        """Bytes start … stop - 1 of a shard."""
        data, _ = self._range(shard, start, stop)
        if len(data) != stop - start:
            raise SourceError(f"{self._name}: {shard}: the hub sent {len(data)} of {stop - start} bytes")
        return data

    def _range(self, shard: str, start: int, stop: int) -> tuple[bytes, int]:
        """As `read_range`; tried again where the connection fails."""
        name = HubName(self._name.repo, shard)
        for pause_s in _PAUSES_S:
            try:
                return read_range(name, start, stop, self.commit)
            except SourceError:
                time.sleep(pause_s)
        return read_range(name, start, stop, self.commit)


class HubSource(HfSource):
    """A checkpoint on the hub as a source. Its label and hashes are those of the same commit in the hub's cache."""

    def __init__(self, name: str) -> None:
        found = HubName.parse(name.removeprefix(FROM_HUB))
        if found is None or found.file is not None:
            raise UsageError(f"{name}: expected {FROM_HUB}USER/REPO, a checkpoint in safetensors")
        checkpoint = HubCheckpoint(found)
        super().__init__(checkpoint.folder, checkpoint, f"{found.repo}@{checkpoint.commit[:12]}")
