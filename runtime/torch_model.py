"""The decoder as a torch module: any number of sequences, with a cache or (to learn) without. Knows no text.

Equations as in transformers' modeling_llama.py; families differ by which biases and norms their files have.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkf.errors import UsageError
from rkf.file.container import Container
from rkf.format.matrix import ClusteredMatrix
from rkf.model.first_form import ModelConfig
from rkf.model.rope import frequencies
from rkf.torch import ClusteredEmbedding, ClusteredLinear, ClusteredWeight
from rkf.torch.loading import dense

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class Past(Protocol):
    """What attention looks back at."""

    def span(self, tokens: int) -> tuple[Tensor, int]:
        """Positions of the next tokens, i64[tokens], and how many `extend` will give keys of."""
        ...

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put in those of the next tokens, [sequences, kv_heads, tokens, head_dim]; get all."""
        ...

    def advance(self, tokens: int) -> None:
        """All layers have put theirs in."""
        ...


class TorchCache:
    """Keys and values of a batch of sequences of one length: per layer [sequences, kv_heads, room, head_dim]."""

    def __init__(self, config: ModelConfig, sequences: int, capacity: int, like: Tensor) -> None:
        self.length, self.capacity = 0, capacity
        self._shape = (2, config.layers, sequences, config.kv_heads, 0, config.head_dim)
        self.store = like.new_empty(self._shape)

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens`."""
        if not 0 <= tokens <= self.length:
            raise UsageError(f"cache: cannot keep {tokens} of {self.length} tokens")
        self.length = tokens

    def span(self, tokens: int) -> tuple[Tensor, int]:
        end = self.length + tokens
        self.reserve(end)
        return torch.arange(self.length, end, device=self.store.device), end

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + keys.shape[2]
        self.store[0, layer, :, :, self.length : end] = keys
        self.store[1, layer, :, :, self.length : end] = values
        return self.store[0, layer, :, :, :end], self.store[1, layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def reserve(self, tokens: int) -> None:
        """Room for so many, or twice what there was: what is held is copied a constant number of times in all."""
        if tokens <= self.store.shape[4]:
            return
        room = min(max(2 * self.store.shape[4], tokens, 256), max(self.capacity, tokens))
        old, held = self.store, self.length
        # Zeros: whoever masks what is not held multiplies it by 0, and 0 times whatever was in memory may be NaN.
        self.store = old.new_zeros((*self._shape[:4], room, self._shape[5]))
        self.store[:, :, :, :, :held] = old[:, :, :, :, :held]


class Decoder(nn.Module):
    """ids: i64[sequences, tokens] -> last hidden states, normed, `[sequences, tokens, hidden]`; `head` makes logits."""

    frequencies: Tensor
    norm: nn.RMSNorm

    def __init__(self, container: Container, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        part = _Parts(container, dtype)
        self.embedding = part.embedding(EMBEDDING)
        self.blocks = nn.ModuleList(_Block(part, config, layer) for layer in range(config.layers))
        self.norm = part.norm("model.norm", config)
        self.head = part.linear(HEAD)
        self._clustered = part.clustered
        self.register_buffer("frequencies", torch.from_numpy(frequencies(config)), persistent=False)

    def clustered(self) -> dict[str, ClusteredWeight]:
        """Every clustered matrix by the name of its tensor; tied ones once."""
        return dict(self._clustered)

    def forward(self, ids: Tensor, cache: Past | None = None) -> Tensor:
        tokens = ids.shape[1]
        positions, end = (torch.arange(tokens, device=ids.device), tokens) if cache is None else cache.span(tokens)
        angles = positions.to(torch.float32)[:, None] * self.frequencies
        turn = angles.cos(), angles.sin()
        window = self.config.sliding_window
        plain = end == tokens and (window is None or tokens <= window)
        mask = None if plain else self._mask(positions, end)
        x = self.embedding(ids).to(self.norm.weight.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, turn, mask, None if cache is None else (cache, layer))
        if cache is not None:
            cache.advance(tokens)
        return self.norm(x)

    def _mask(self, positions: Tensor, end: int) -> Tensor:
        """Which of `end` positions a token sees, `bool[tokens, end]`."""
        window = self.config.sliding_window
        ago = positions[:, None] - torch.arange(end, device=positions.device)
        return (ago >= 0) if window is None else (ago >= 0) & (ago < window)


class _Parts:
    """The modules of a container by their Hugging Face names; tied tensors are shared."""

    def __init__(self, container: Container, dtype: torch.dtype) -> None:
        self.clustered: dict[str, ClusteredWeight] = {}
        self._dense: dict[str, nn.Parameter] = {}
        self._container, self._dtype = container, dtype

    def has(self, name: str) -> bool:
        return name in self._container.tensors

    def linear(self, name: str) -> nn.Module:
        weight = self._tensor(f"{name}.weight")
        bias = self._vector(f"{name}.bias") if self.has(f"{name}.bias") else None
        if isinstance(weight, ClusteredWeight):
            return ClusteredLinear(weight, bias)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = weight
        layer.register_parameter("bias", bias)
        return layer

    def embedding(self, name: str) -> nn.Module:
        weight = self._tensor(f"{name}.weight")
        return (
            ClusteredEmbedding(weight) if isinstance(weight, ClusteredWeight) else nn.Embedding.from_pretrained(weight)
        )

    def norm(self, name: str, config: ModelConfig) -> nn.RMSNorm:
        weight = self._vector(f"{name}.weight")
        layer = nn.RMSNorm(weight.shape, config.norm_epsilon, device="meta")
        layer.weight = weight
        return layer

    def _vector(self, name: str) -> nn.Parameter:
        """A tensor of one dimension, which is never clustered, nor tied."""
        values = torch.from_numpy(self._container.decode(name).copy())
        return nn.Parameter(values.to(self._dtype), requires_grad=False)

    def _tensor(self, name: str) -> nn.Parameter | ClusteredWeight:
        stored = self._container.tensors[name].target or name
        if stored in self.clustered:
            return self.clustered[stored]
        if stored in self._dense:
            return self._dense[stored]
        tensor = self._container.load(stored)
        if isinstance(tensor, ClusteredMatrix):
            return self.clustered.setdefault(stored, ClusteredWeight(tensor))
        return self._dense.setdefault(stored, nn.Parameter(dense(tensor).to(self._dtype), requires_grad=False))


class _Block(nn.Module):
    """One layer: attention over rotated queries and keys, then SwiGLU, each around a residual."""

    def __init__(self, part: _Parts, config: ModelConfig, layer: int) -> None:
        super().__init__()
        name = f"model.layers.{layer}."
        self._heads = config.head_dim
        self.before, self.between = (
            part.norm(f"{name}{norm}", config) for norm in ("input_layernorm", "post_attention_layernorm")
        )
        self.q, self.k, self.v, self.o = (part.linear(f"{name}self_attn.{p}_proj") for p in "qkvo")
        self.gate, self.up, self.down = (part.linear(f"{name}mlp.{p}_proj") for p in ("gate", "up", "down"))
        self.q_norm, self.k_norm = (
            part.norm(norm, config) if part.has(f"{norm}.weight") else nn.Identity()
            for norm in (f"{name}self_attn.{p}_norm" for p in "qk")
        )

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: tuple[Past, int] | None
    ) -> Tensor:
        x = x + self._attention(self.before(x), turn, mask, cache)
        h = self.between(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))

    def _attention(
        self, h: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: tuple[Past, int] | None
    ) -> Tensor:
        q, k, v = (self._split(project(h)) for project in (self.q, self.k, self.v))
        q, k = (_rotated(norm(part), *turn).transpose(1, 2) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        v = v.transpose(1, 2)
        if cache is not None:
            store, layer = cache
            k, v = store.extend(layer, k, v)
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def _split(self, projected: Tensor) -> Tensor:
        """[sequences, tokens, heads * head_dim] -> [sequences, tokens, heads, head_dim]."""
        return projected.unflatten(-1, (-1, self._heads))


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate x: [sequences, tokens, heads, head_dim]; pairs are (i, i + head_dim / 2). cosine, sine: f32[tokens,
    head_dim / 2].
    """
    a, b = x.float().chunk(2, dim=-1)
    cosine, sine = cosine[:, None, :], sine[:, None, :]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1).to(x.dtype)
