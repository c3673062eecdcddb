"""A session: the keys, values and states of one text in a file, so that it is computed once across processes.

It is a file of kept arrays (rkf/file/arrays.py) that only its owner may read, since it holds the text's tokens. It is
bound to everything that decides the bits in it: the weights, the program and the runtime's arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rkf.errors import BindingError, IntegrityError, UsageError
from rkf.file.arrays import MAGIC, packed_arrays, read_arrays
from rkf.file.atomic import replacing
from rkf.file.fingerprint import fingerprint
from rkf.file.private import read_private
from rkf.runtime.paged_sequence import SEQUENCE_ARRAYS

if TYPE_CHECKING:
    from rkf.file.container import Container
    from rkf.runtime.cpu import CpuBackend
    from rkf.runtime.engine import Engine

_KIND = "session 1"
_ARRAYS = {"bound": ("U", 2), "ids": ("u4", 1), **SEQUENCE_ARRAYS}
_REMEDY = "remove it, or name another file"


class Session:
    """A session file of a model. The engine's texts go into it, and come from it."""

    def __init__(self, path: Path, container: Container, backend: CpuBackend, engine: Engine) -> None:
        self._path, self._backend, self._engine = path, backend, engine
        model = fingerprint([container], [container.metadata["model"], *container.changes])
        self._bound = {"model, or of other values": model, **backend.arithmetic}
        self._saved: list[int] = []  # the tokens in the file, as far as is known

    def load(self) -> int:
        """Give the text in the file to the engine; the number of its tokens, 0 if there is no file.

        BindingError: it is of another model, or of other arithmetic. IntegrityError: it is damaged. UsageError: it is
        not the user's own file or no session, or its folder is missing.
        """
        if not self._path.exists():
            if not self._path.parent.is_dir():
                raise UsageError(f"{self._path}: there is no folder {self._path.parent}: make it first")
            return 0
        most = self._most_bytes()
        data = read_private(self._path, most)
        if data is None:
            raise UsageError(f"{self._path}: expected a session of your own, of at most {most} bytes: {_REMEDY}")
        if not data.startswith(MAGIC):
            raise UsageError(f"{self._path}: expected a session, got a file of another kind: name another file")
        try:
            arrays = read_arrays(data, _KIND, _ARRAYS, most)
            self._check_bound(dict(arrays["bound"].tolist()))
            ids = arrays["ids"].astype(np.int64)
            sequence = self._backend.restored(self._engine.context, ids, arrays)
        except ValueError as error:
            raise IntegrityError(f"{self._path}: {error}; {_REMEDY}") from None
        self._saved = ids.tolist()
        self._engine.keep(sequence, list(self._saved))
        return len(ids)

    def save(self) -> None:
        """Write the text that ended last, unless it is there already. OutputError: it cannot be written."""
        held = self._engine.last_ended()
        if held is None:
            return
        held.sequence.truncate(held.sequence.reusable(held.sequence.length))  # a pass was interrupted
        ids = held.ids[: held.sequence.length]
        if not ids or ids == self._saved:
            return
        arrays = {
            "bound": np.array([*self._bound.items()], np.str_),
            "ids": np.array(ids, np.uint32),
            **held.sequence.to_arrays(),
        }
        with replacing(self._path, force=True, private=True) as file:
            file.write(packed_arrays(_KIND, arrays))
        self._saved = ids

    def _check_bound(self, found: Mapping[str, str]) -> None:
        for name, value in self._bound.items():
            if found.get(name) != value:
                raise BindingError(f"{self._path}: a session of another {name}: {_REMEDY}")

    def _most_bytes(self) -> int:
        """What the longest text takes, with everything beside pages and states."""
        return self._backend.most_sequence_bytes(self._engine.context) + (1 << 20)
