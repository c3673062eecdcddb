"""The torch backend: the Backend protocol over `torch_model.Decoder`, on a processor or a GPU. Knows no text."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch

from rkf.errors import ContextLengthError, UsageError
from rkf.file.container import Container
from rkf.runtime.backend import F32, I64
from rkf.runtime.threads import chosen
from rkf.runtime.torch_graph import TokenGraph, TokenStep, captured, has_fixed_shapes
from rkf.runtime.torch_model import Decoder
from rkf.runtime.torch_past import TorchCache

_TILE = 512  # tokens of one pass: bounds the memory that a long prompt takes


class TorchBackend:
    """A model ready to run on `device`, "cpu" or "cuda". f32 on a processor. On a GPU bf16, because products of f32 go
    without tensor cores, and, where Triton is installed, fused kernels and CUDA graphs.
    """

    def __init__(self, container: Container, device: str = "cpu", threads: int | None = None) -> None:
        if container.model is None:
            raise UsageError(f"{container.path}: expected a whole model, got a file without one")
        self.config = container.model
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device cuda: torch finds no GPU here: use cpu or cpu-torch")
        if threads is not None:
            torch.set_num_threads(chosen(threads))
        self._device = torch.device(device)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._decoder = Decoder(container, dtype).to(self._device).requires_grad_(False)
        self._graph: TokenGraph | None = None
        fused = device == "cuda" and find_spec("triton") is not None
        self._graphs = fused and has_fixed_shapes(self._decoder.program)
        if fused:
            from rkf.torch.fused import fuse  # needs Triton

            fuse(self._decoder)

    def new_cache(self, tokens: int) -> TorchCache:
        """An empty cache that can grow to `tokens` positions."""
        return self._decoder.new_cache(1, min(tokens, self.config.context_length))

    @torch.inference_mode()
    def forward(self, tokens: I64, cache: TorchCache, last_only: bool) -> F32:
        """Feed `tokens: i64[n]` after what the cache holds; logits of all of them or of the last, `f32[n or 1,
        vocab]`.
        """
        self._check(tokens, cache)
        if self._graphs and len(tokens) == 1 and (graph := self._captured(int(tokens[0]), cache)):
            graph.step.place(int(tokens[0]), cache.length)
            cache.advance(1)
            return _on_host(graph.replay())
        found = []
        for part in np.split(tokens, range(_TILE, len(tokens), _TILE)):
            ids = torch.from_numpy(np.ascontiguousarray(part, np.int64)).to(self._device)
            hidden = self._decoder(ids[None], cache)[0]
            if not last_only:
                found.append(self._logits(hidden))
        return np.concatenate(found) if found else self._logits(hidden[-1:])

    def _captured(self, token: int, cache: TorchCache) -> TokenGraph | None:
        """The graph of the next token: a new one when the cache is another, or has moved to grow."""
        cache.reserve(cache.length + 1)
        if self._graph is None or self._graph.step.slots is not cache.slots:
            step = TokenStep(self._decoder, cache)
            step.place(token, cache.length)
            self._graph = None  # its memory can be used again
            self._graph = captured(step)
            self._graphs = self._graph is not None
        return self._graph

    def _logits(self, hidden: torch.Tensor) -> F32:
        return _on_host(self._decoder.head(hidden))

    def _check(self, tokens: I64, cache: TorchCache) -> None:
        if tokens.ndim != 1 or not len(tokens):
            raise UsageError(f"tokens: expected i64[n] with n >= 1, got shape {tokens.shape}")
        if cache.length + len(tokens) > cache.capacity:
            raise ContextLengthError(
                f"{cache.length + len(tokens)} tokens do not fit into a context of {cache.capacity}; shorten the prompt"
            )
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise UsageError(
                f"token ids must lie in 0..{self.config.vocab_size - 1}, got {tokens.min()}..{tokens.max()}"
            )


def _on_host(logits: torch.Tensor) -> F32:
    found: F32 = logits.float().cpu().numpy()
    return found
