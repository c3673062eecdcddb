"""A fuzz target for atheris, outside `make test`: a damaged file may only raise an RkfError.

    pip install atheris && python -m tests.hostile.fuzz_reader -max_total_time=600

Half of the inputs are damaged vectors with recomputed hashes; half are the raw bytes.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rkf"]):
    from rkf.errors import RkfError
    from rkf.file.verify import verify

from tests.hostile.mutations import damaged
from tests.spec.document import VECTORS

SOURCES = [path.read_bytes() for path in sorted(VECTORS.glob("*.rk[fv]"))]
FOLDER = tempfile.TemporaryDirectory()


def read_one(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    path = Path(FOLDER.name) / "fuzzed.rkf"
    if provider.ConsumeBool():
        source = SOURCES[provider.ConsumeIntInRange(0, len(SOURCES) - 1)]
        path.write_bytes(damaged(source, lambda n: provider.ConsumeIntInRange(0, n - 1)))
    else:
        path.write_bytes(provider.ConsumeBytes(provider.remaining_bytes()))
    with suppress(RkfError):
        verify(path)


if __name__ == "__main__":
    atheris.Setup(sys.argv, read_one)
    atheris.Fuzz()
