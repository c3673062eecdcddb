"""The torch backend: the Backend protocol over `torch_model.Decoder`, on a CPU or a GPU. Knows no text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

from rkf.errors import UsageError
from rkf.file.container import Container
from rkf.runtime import torch_parallel
from rkf.runtime.backend import F32, I64, NO_HIDDEN, Row, Wanted, checked, with_tokens_again
from rkf.runtime.threads import chosen
from rkf.runtime.torch_graph import TokenGraph, TokenStep, captured, has_fixed_shapes
from rkf.runtime.torch_model import Decoder
from rkf.runtime.torch_past import TorchCache

_TILE = 512  # tokens of one pass: bounds the memory of a long prompt


class TorchBackend:
    """A model ready to run on `device`, "cpu" or "cuda". It uses f32 on a CPU. On a GPU it uses bf16, because products
    of f32 do not use tensor cores, and, if Triton is installed, fused kernels and CUDA graphs.

    Rows are computed one after another. Logits may be rounded differently when a sequence's tokens are split into other
    calls. parallel: run with the other processes of torchrun, each with a share of the weights (torch_parallel.py).
    """

    def __init__(
        self, container: Container, device: str = "cpu", threads: int | None = None, parallel: bool = False
    ) -> None:
        if container.model is None:
            raise UsageError(f"{container.path}: expected a whole model, got a file without one")
        self.metadata = container.model
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device cuda: torch finds no GPU here: use cpu or cpu-torch")
        if threads is not None:
            torch.set_num_threads(chosen(threads))
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        program = container.model.program
        if parallel:
            torch_parallel.join(device)
            program = torch_parallel.divide(container)
        self._device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self._decoder = Decoder(container, program, dtype).to(self._device).requires_grad_(False)
        self._graph: TokenGraph | None = None
        fused = device == "cuda" and find_spec("triton") is not None
        self._graphs = fused and not parallel and has_fixed_shapes(self._decoder.program)
        if fused:
            from rkf.torch.fused import fuse  # needs Triton

            fuse(self._decoder)

    @property
    def pass_tokens(self) -> int:
        return _TILE

    @property
    def held_bytes(self) -> int:
        """Keys, values and states of all sequences."""
        return self._decoder.held.bytes

    def new_sequence(self, capacity: int) -> TorchCache:
        """An empty sequence that can grow to `capacity` tokens."""
        return self._decoder.new_cache(1, min(capacity, self.metadata.context_length))

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row], wanted: Wanted = "last") -> F32:
        """Compute each row's tokens in its sequence. Returns the wanted logits, `f32[wanted, vocab]` (backend.py)."""
        return self._computed(rows, wanted, partial(self._logits, alone=len(rows) == 1))

    @torch.inference_mode()
    def hidden(self, rows: Sequence[Row], wanted: Wanted = "last") -> F32:
        """As `forward`, with hidden states in place of logits: `f32[wanted, width]` (backend.py)."""
        if not self.metadata.program.final_norm:
            raise UsageError(NO_HIDDEN)
        return self._computed(rows, wanted, self._hidden)

    def _computed(self, rows: Sequence[Row], wanted: Wanted, fed: Callable[..., torch.Tensor]) -> F32:
        """What `fed` gives for the sequence, the tokens and the wanted places of each part of the rows."""
        rows, places = with_tokens_again(rows, checked(rows, wanted, self.metadata.vocab_size))
        found, done, at = list[F32](), 0, 0
        for sequence, tokens in rows:
            for part in np.split(tokens, range(_TILE, len(tokens), _TILE)):
                end = int(np.searchsorted(places, at + len(part)))
                found.append(fed(sequence, part, places[done:end] - at).float().cpu().numpy())
                done, at = end, at + len(part)
        return np.concatenate(found)

    def _hidden(self, sequence: TorchCache, tokens: I64, places: I64) -> torch.Tensor:
        """Compute at most _TILE tokens; the hidden states at some places."""
        return self._decoder.hidden(self._on_device(tokens)[None], sequence)[0][self._on_device(places)]

    def _logits(self, sequence: TorchCache, tokens: I64, places: I64, alone: bool) -> torch.Tensor:
        """Compute at most _TILE tokens; the logits at some places. alone: this is the only row of its call."""
        if self._graphs and alone and len(tokens) == 1:
            graph = self._captured(int(tokens[0]), sequence)
            if graph is not None:
                graph.step.place(int(tokens[0]), sequence.length)
                sequence.advance(1)
                return graph.replay()[: len(places)]
        rows = self._decoder(self._on_device(tokens)[None], sequence)[0]
        logits: torch.Tensor = self._decoder.head(rows[self._on_device(places)])
        return logits

    def _on_device(self, numbers: I64) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers, np.int64)).to(self._device)

    def _captured(self, token: int, sequence: TorchCache) -> TokenGraph | None:
        """The graph for the next token; a new one if the sequence is another, or its cache was reallocated."""
        sequence.reserve(sequence.length + 1)
        if self._graph is None or self._graph.step.slots is not sequence.slots:
            step = TokenStep(self._decoder, sequence)
            step.place(token, sequence.length)
            self._graph = None  # frees its memory
            self._graph = captured(step)
            self._graphs = self._graph is not None
        return self._graph
