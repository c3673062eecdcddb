"""Tensor parallelism: one model on several processes of torch.distributed, each with its share of every matrix.

All processes make the same calls with the same tokens and get the same logits: gloo and NCCL give every process the
same bits of a sum. `torchrun` starts them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rkf.errors import RkfError, UnsupportedError, UsageError
from rkf.file.container import Container, Load
from rkf.format.matrix import ClusteredMatrix, DenseTensor
from rkf.model.program import Program
from rkf.runtime.parallel_program import split
from rkf.runtime.shares import Share


def join(device: str) -> None:
    """Join the processes that torchrun started, once. device: torch's name. UsageError: it started none."""
    if dist.is_initialized():
        return
    if "LOCAL_RANK" not in os.environ:
        raise UsageError(
            "tensor parallelism: expected several processes: start them with "
            "`torchrun --nproc-per-node N -m rkf run … --tensor-parallel`"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise RkfError(f"tensor parallelism: the processes did not find each other: {reason}") from None


def leave() -> None:
    """Leave the processes of `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the process that speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def agreed(number: int) -> int:
    """The number that the first process gives."""
    found = torch.tensor([number])
    if dist.get_backend() == "nccl":
        found = found.cuda()
    dist.broadcast(found, 0)
    return int(found)


def divide(container: Container) -> Program:
    """Let `container` give this process's share of each tensor from now on; returns the program to run on them.

    Raises UnsupportedError for what cannot be divided, by the name of the tensor.
    """
    if container.model is None:
        raise UsageError(f"{container.path}: expected a whole model, got a file without one")
    try:
        found = split(container.model.program, dist.get_world_size())
    except UnsupportedError as error:
        raise UnsupportedError(f"{container.path}: {error}") from None
    shares: dict[str, Share] = {}
    for name, share in found.shares.items():
        stored = container.stored_name(name)
        if shares.setdefault(stored, share) != share:
            raise UnsupportedError(f"{container.path}: {name}: shared by ops that divide it in two ways")
    where = str(container.path)
    made: dict[str, Callable[[Load], DenseTensor | ClusteredMatrix]] = {
        name: partial(_part, where, name, share) for name, share in shares.items()
    }
    container.run_as(container.model, made, f"process {dist.get_rank()} of {dist.get_world_size()}")
    return found.program


def _part(where: str, name: str, share: Share, load: Load) -> DenseTensor | ClusteredMatrix:
    try:
        return share.of(load(name), dist.get_rank())
    except UnsupportedError as error:
        problem = f"{error}: it cannot be divided among {share.processes} processes"
        raise UnsupportedError(f"{where}: tensor {name!r}: {problem}") from None


def gathered(part: Tensor) -> Tensor:
    """The parts of all processes side by side. part: [..., width of a part]."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, dim=-1)


def summed(part: Tensor) -> Tensor:
    """The sum over all processes."""
    total = part.contiguous()
    dist.all_reduce(total)
    return total


def own_rows(ids: Tensor, table: nn.Module, rows: int) -> Tensor:
    """Rows of a table of which each process has so many: zeros for those of others. ids: i64[...]"""
    own = ids - rows * dist.get_rank()
    mine = (own >= 0) & (own < rows)
    found: Tensor = table(own.clamp(0, rows - 1))
    return found * mine[..., None]
