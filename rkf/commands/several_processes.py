"""A command that torchrun runs in several processes: all do the same, and the first one speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from secrets import randbits

from rkf.errors import UsageError


@contextmanager
def one_of_several(device: str) -> Iterator[int]:
    """Join the processes of torchrun; only the first one prints. Gives a seed that is the same in all of them."""
    import rkf.torch  # noqa: F401 - reports a missing torch in one line
    from rkf.runtime import torch_parallel
    from rkf.runtime.model import TORCH_DEVICES

    if device not in TORCH_DEVICES:
        raise UsageError(f"--tensor-parallel: expected --device {' or '.join(TORCH_DEVICES)}, got {device}")
    torch_parallel.join(TORCH_DEVICES[device])
    try:
        with nullcontext() if torch_parallel.is_first() else _silent():
            yield torch_parallel.agreed(randbits(63))
    finally:
        torch_parallel.leave()


@contextmanager
def _silent() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
