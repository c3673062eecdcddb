"""Where the passes of a calibration run: in numpy on the CPU, or in torch. Knows no text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rkf.calibrate import passes, sensitivity
from rkf.calibrate.divergences import Coarse
from rkf.calibrate.moments import Moments
from rkf.calibrate.passes import U32, TensorReader
from rkf.model.program import Program
from rkf.numbers import eight_bits


class Device(Protocol):
    """The three passes. The same inputs give the same results on the same device, and nearly the same on another."""

    @property
    def name(self) -> str:
        """As `--device` takes it."""
        ...

    def write_text(
        self,
        program: Program,
        reader: TensorReader,
        prompts: Sequence[Sequence[int]],
        *,
        ctx: int,
        folder: Path,
        progress: Callable[[int, int], None] | None,
    ) -> U32:
        """The text that the model generates after each prompt (`rkf.calibrate.passes.write_text`). folder: for a
        temporary file of the source's size in 8 bits.
        """
        ...

    def moments(self, program: Program, reader: TensorReader, tokens: U32) -> Iterator[Mapping[str, Moments]]:
        """Second moments of matrices' inputs, one layer after the other (`rkf.calibrate.passes.moments`)."""
        ...

    def losses(self, program: Program, reader: TensorReader, coarse: Coarse, tokens: U32) -> dict[str, float]:
        """The loss of each matrix by its stored name (`rkf.calibrate.sensitivity.losses`)."""
        ...


class Cpu:
    """The CPU: numpy, with matrices in eight bits. The results do not depend on the machine."""

    name = "cpu"

    def write_text(
        self,
        program: Program,
        reader: TensorReader,
        prompts: Sequence[Sequence[int]],
        *,
        ctx: int,
        folder: Path,
        progress: Callable[[int, int], None] | None,
    ) -> U32:
        with eight_bits.mapped(folder) as keep:
            return passes.write_text(program, reader, prompts, ctx=ctx, keep=keep, progress=progress)

    def moments(self, program: Program, reader: TensorReader, tokens: U32) -> Iterator[Mapping[str, Moments]]:
        return passes.moments(program, reader, tokens)

    def losses(self, program: Program, reader: TensorReader, coarse: Coarse, tokens: U32) -> dict[str, float]:
        return sensitivity.losses(program, reader, coarse, tokens)


def device_of(name: str) -> Device:
    """The device of a name that `--device` takes: cpu, cpu-torch or cuda.

    Raises UsageError: torch or a GPU is missing.
    """
    if name == Cpu.name:
        return Cpu()
    import rkf.torch  # noqa: F401 - reports a missing torch in one line
    from rkf.calibrate.torch_passes import TorchDevice

    return TorchDevice(name)
