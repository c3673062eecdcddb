"""One token of decoding as a CUDA graph: one launch instead of hundreds by the decoder. Knows no text.

The replay is compared with the decoder once, when it is captured. `TokenStep` is tested on CPUs; `TokenGraph` has not
run on a GPU yet.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rkf.model.ops import Experts
from rkf.model.program import Program
from rkf.runtime.torch_model import Decoder
from rkf.runtime.torch_past import KeysValues, TorchCache, is_recurrent

_WARM_UPS = 3  # before capture, kernels are compiled and libraries allocate their workspaces
_CLOSE = 0.02  # tolerance relative to the largest logit, in bf16


def has_fixed_shapes(program: Program) -> bool:
    """Whether a token's computation can be captured: its shapes do not depend on data, and repeating it changes
    nothing. Experts fail the first condition, recurrent states the second.
    """
    return not is_recurrent(program) and not any(isinstance(op, Experts) for kind in program.kinds for op in kind)


class StandingCache:
    """The whole allocation of a TorchCache with its position as a tensor, so that no shape changes."""

    def __init__(self, cache: TorchCache) -> None:
        self.rope_positions, self._slots, self._room = cache.rope_positions, cache.slots, cache.room
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
    """One token through a decoder, from buffers at fixed addresses to `logits: [1, vocab]`."""

    def __init__(self, decoder: Decoder, cache: TorchCache) -> None:
        self.slots = cache.slots
        self._decoder, self._cache = decoder, StandingCache(cache)
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=cache.device)

    def place(self, token: int, position: int) -> None:
        """Set the token for `compute` and the number of tokens before it."""
        self._token.fill_(token)
        self._cache.position.fill_(position)

    def compute(self) -> Tensor:
        logits: Tensor = self._decoder.head(self._decoder(self._token, self._cache)[:, -1])
        return logits


class TokenGraph:
    """A captured TokenStep. `replay` computes the token that `place` set last."""

    def __init__(self, step: TokenStep) -> None:
        self.step = step
        # A computation writes the cache only at its own position, so repeating it changes nothing.
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
        """Whether a replay gives the decoder's result from before the capture."""
        off = (self.replay() - self._expected).abs().max()
        return bool(off <= _CLOSE * self._expected.abs().max())


def captured(step: TokenStep) -> TokenGraph | None:
    """The graph of a step; None, with a warning, if it cannot be captured or gives another result."""
    try:
        graph = TokenGraph(step)
    except RuntimeError as error:  # torch raises this for every failure of CUDA
        reason = str(error).partition("\n")[0]
    else:
        if graph.faithful():
            return graph
        reason = "its replay differs from the decoder"
    warnings.warn(f"decoding continues without a CUDA graph, more slowly: {reason}", stacklevel=2)
    return None
