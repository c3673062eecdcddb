"""One token of decoding as a CUDA graph: one launch where the decoder makes hundreds. Knows no text.

The replay is compared with the decoder once, when it is captured. `TokenStep` is tested on processors; `TokenGraph` has
not run on a GPU yet.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rkf.model.ops import Experts
from rkf.model.program import Program
from rkf.runtime.torch_model import Decoder
from rkf.runtime.torch_past import KeysValues, TorchCache, is_recurrent

_WARM_UPS = 3  # kernels are compiled, and libraries take their workspaces, before anything is captured
_CLOSE = 0.02  # of the largest logit, in bf16


def has_fixed_shapes(program: Program) -> bool:
    """Whether a token's computation can be captured: its shapes do not depend on data, and doing it again changes
    nothing. Experts fail the first, recurrent states the second.
    """
    return not is_recurrent(program) and not any(isinstance(op, Experts) for kind in program.kinds for op in kind)


class StandingCache:
    """The whole room of a TorchCache, and a position in it that is a tensor: nothing here changes its shape."""

    def __init__(self, cache: TorchCache) -> None:
        self.capacity, self._slots, self._room = cache.capacity, cache.slots, cache.room
        self.position = torch.zeros(1, dtype=torch.int64, device=cache.device)

    def span(self, tokens: int) -> tuple[Tensor, int]:
        return self.position, self._room

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> KeysValues:
        for store, new in zip(self._slots[layer], (keys, values), strict=True):
            store.index_copy_(2, self.position, new)
        return self._slots[layer]

    def held(self, layer: int) -> KeysValues:
        return self._slots[layer]

    def state(self, layer: int, name: str) -> Tensor | None:
        raise TypeError("a recurrent program has no standing cache")

    def keep(self, layer: int, name: str, state: Tensor) -> None:
        raise TypeError("a recurrent program has no standing cache")

    def advance(self, tokens: int) -> None:
        """The owner sets the position."""


class TokenStep:
    """One token through a decoder, from buffers that stay where they are to `logits: [1, vocab]`."""

    def __init__(self, decoder: Decoder, cache: TorchCache) -> None:
        self.slots = cache.slots
        self._decoder, self._cache = decoder, StandingCache(cache)
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=cache.device)

    def place(self, token: int, position: int) -> None:
        """What `compute` is to be of: a token, and how many come before it."""
        self._token.fill_(token)
        self._cache.position.fill_(position)

    def compute(self) -> Tensor:
        logits: Tensor = self._decoder.head(self._decoder(self._token, self._cache)[:, -1])
        return logits


class TokenGraph:
    """A TokenStep, captured. Whatever `place` was told last is computed by `replay`."""

    def __init__(self, step: TokenStep) -> None:
        self.step = step
        # A computation writes the cache at its own position alone, so that doing it again changes nothing.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._expected = step.compute()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = step.compute()

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._logits

    def faithful(self) -> bool:
        """Whether a replay gives what the decoder gave before it was captured."""
        off = (self.replay() - self._expected).abs().max()
        return bool(off <= _CLOSE * self._expected.abs().max())


def captured(step: TokenStep) -> TokenGraph | None:
    """The graph of a step, or None, with a warning, where it cannot be captured or gives something else."""
    try:
        graph = TokenGraph(step)
    except RuntimeError as error:  # what torch raises for every failure of CUDA
        reason = str(error).partition("\n")[0]
    else:
        if graph.faithful():
            return graph
        reason = "its replay differs from the decoder"
    warnings.warn(f"decoding goes on without a CUDA graph, and slower: {reason}", stacklevel=2)
    return None
