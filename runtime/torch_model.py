"""A model's program as a torch module: any number of sequences, with a past, or without for training. Knows no text."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from rkf.errors import UsageError
from rkf.file.container import Container
from rkf.model.program import Program
from rkf.runtime.held_bytes import HeldBytes
from rkf.runtime.torch_ops import TorchHead, TorchOps
from rkf.runtime.torch_pass import RopeTables, TorchPass
from rkf.runtime.torch_past import NoPast, Past, TorchCache
from rkf.runtime.torch_tensors import TensorSource, TorchTensors
from rkf.torch import ClusteredWeight


class Decoder(nn.Module):
    """ids: i64[sequences, tokens] -> the input of the head, `[sequences, tokens, width]`; `head` computes logits from
    it. dtype: that of dense matrices and activations.
    """

    def __init__(self, source: TensorSource, program: Program, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.program, self.dtype = program, dtype
        tensors = TorchTensors(source, dtype)
        self.ropes = RopeTables(self.program.ropes)
        self.stem = TorchOps(self.program.stem, tensors)
        self.layers = nn.ModuleList(
            TorchOps(self.program.layer(number), tensors.at(number)) for number in range(self.program.layers)
        )
        norm = self.program.final_norm
        self.final_norm = TorchOps(norm, tensors)
        self.before_head = TorchOps(self.program.top[len(norm) : -1], tensors)
        self.head = TorchHead(self.program.logits, tensors)
        self._clustered = tensors.clustered
        self.held = HeldBytes()  # by all caches

    @classmethod
    def of(cls, container: Container, dtype: torch.dtype = torch.float32) -> Decoder:
        """The model of a file. Raises UsageError if it has none."""
        if container.model is None:
            raise UsageError(f"{container.path}: expected a whole model, got a file without one")
        return cls(container, container.model.program, dtype)

    def clustered(self) -> dict[str, ClusteredWeight]:
        """Every clustered matrix by the name of its tensor; tied ones once."""
        return dict(self._clustered)

    @property
    def width(self) -> int:
        """The width of the head's input."""
        return cast(int, self.head.matrix.in_features)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def new_cache(self, sequences: int, capacity: int) -> TorchCache:
        """The empty past of new sequences that may grow to `capacity` positions."""
        return TorchCache(self.program, sequences, capacity, self.dtype, self.device, self.held)

    def forward(self, ids: Tensor, past: Past | None = None) -> Tensor:
        run, values = self._through_layers(ids, past)
        self.before_head(run, values)
        return values[self.program.logits.src]

    def hidden(self, ids: Tensor, past: Past | None = None) -> Tensor:
        """What the last norm writes, `[sequences, tokens, width]`; the program must have one."""
        _, values = self._through_layers(ids, past)
        return values[self.program.final_norm[-1].dst]

    def _through_layers(self, ids: Tensor, past: Past | None) -> tuple[TorchPass, dict[str, Tensor]]:
        """All values after the last norm."""
        tokens = ids.shape[1]
        run = TorchPass(self.ropes, ids, NoPast(tokens, ids.device) if past is None else past)
        values: dict[str, Tensor] = {}
        self.stem(run, values)
        for layer in self.layers:
            inside = dict(values)
            layer(run, inside)
            values = {name: inside[name] for name in values}  # values of the stem live on
        run.past.advance(tokens)
        self.final_norm(run, values)
        return run, values
