"""The mixer of Mamba 2, which several families have: its ops, and its form in checkpoints. Knows no family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from rkf.converters.families.blocks import Layer, linear
from rkf.converters.families.layout import Layout, Origin, fused_rows
from rkf.converters.families.layout_transforms import Flattened, MinusExp, Squeezed
from rkf.errors import SourceError, UnsupportedError
from rkf.model.ops import Conv, Gate, Norm, Scan

# Size of a mixer -> GGUF key, after "<architecture>.".
_FIELDS = {
    "heads": "ssm.time_step_rank",
    "inner": "ssm.inner_size",
    "groups": "ssm.group_count",
    "state_dim": "ssm.state_size",
    "taps": "ssm.conv_kernel",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaMixer:
    """name: of its module in a layer. hidden: the width of the stream. taps: positions that the convolution sees.

    limits: the least and the greatest time step. bias: of the products; conv_bias: of the convolution.
    """

    name: str
    hidden: int
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    taps: int
    limits: tuple[float, float]
    bias: bool
    conv_bias: bool
    act: str
    epsilon: float

    @property
    def inner(self) -> int:
        """The width of all heads."""
        return self.heads * self.head_dim

    @property
    def _parts(self) -> dict[str, int]:
        """The parts of in_proj in order, with their rows: the gate; x, B and C; the time steps."""
        rows = {"z": self.inner, "xbc": self.inner + 2 * self.groups * self.state_dim, "dt": self.heads}
        return {f"{self.name}.in_proj_{part}": count for part, count in rows.items()}

    def ops(self) -> Layer:
        """The mixer on h, written to o."""
        name, (least, most) = self.name, self.limits
        return (
            *(linear("h", part.rpartition("_")[2], part, rows, self.bias) for part, rows in self._parts.items()),
            Conv(
                src="xbc",
                dst="xbc",
                weight=f"{name}.conv1d.weight",
                bias=f"{name}.conv1d.bias" if self.conv_bias else None,
                taps=self.taps,
                act=self.act,
            ),
            Scan(
                src="xbc",
                dt="dt",
                dst="y",
                a_log=f"{name}.A_log",
                dt_bias=f"{name}.dt_bias",
                d=f"{name}.D",
                heads=self.heads,
                head_dim=self.head_dim,
                groups=self.groups,
                state_dim=self.state_dim,
                dt_min=least,
                dt_max=None if most == inf else most,
            ),
            Gate(a="z", b="y", dst="y", act="silu"),
            Norm(
                src="y",
                dst="y",
                weight=f"{name}.norm.weight",
                epsilon=self.epsilon,
                group=self.inner // self.groups if self.groups > 1 else None,
                by_group=self.groups > 1,
            ),
            linear("y", "o", f"{name}.out_proj", self.hidden, self.bias),
        )

    def layout(self, rest: Layout) -> Layout:
        """In a Hugging Face checkpoint, in_proj is one matrix. rest: the layout of other modules."""
        return self._layout({"conv1d.weight": Origin((f"{self.name}.conv1d.weight",), steps=(Squeezed(1),))}, rest)

    def gguf_layout(self, rest: Layout) -> Layout:
        """llama.cpp stores -exp(A_log), and an axis of heads or groups more (`Mamba2Model` in conversion/mamba.py)."""
        name, by_head = self.name, Flattened(self.heads)
        own = {
            "A_log": Origin((f"{name}.A_log",), steps=(by_head, MinusExp())),
            "D": Origin((f"{name}.D",), steps=(by_head,)),
            "dt_bias": Origin((f"{name}.dt_proj.bias",)),
            "norm.weight": Origin((f"{name}.norm.weight",), steps=(Flattened(self.groups),)),
        }
        return self._layout(own, rest)

    def _layout(self, own: Mapping[str, Origin], rest: Layout) -> Layout:
        fused, prefix = fused_rows({f"{self.name}.in_proj": self._parts}), f"{self.name}."

        def origins(name: str) -> tuple[Origin, ...]:
            if name.startswith(prefix) and name.removeprefix(prefix) in own:
                return (own[name.removeprefix(prefix)],)
            return fused(name) if name.rpartition(".")[0] in self._parts else rest(name)

        return origins

    def to_fields(self) -> dict[str, Any]:
        """The fields of a GGUF; UnsupportedError for what llama.cpp does not compute."""
        for holds, problem in (
            (self.bias, "biases of the mixer's products: llama.cpp has none"),
            (not self.conv_bias, "a convolution without bias: llama.cpp needs one"),
            (self.limits != (0, inf), "time_step_limit: llama.cpp has no limits of time steps"),
        ):
            if holds:
                raise UnsupportedError(f"{problem}, so a GGUF cannot store this model")
        return {field: getattr(self, size) for size, field in _FIELDS.items()}


def mixer_sizes(own: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a GGUF's mixers: those of MambaMixer, and expand, the width of all heads over that of the stream."""
    sizes: dict[str, int] = {}
    for size, field in {**_FIELDS, "hidden": "embedding_length"}.items():
        value = own.get(field)
        if not isinstance(value, int) or value < 1:
            raise SourceError(f"{field}: expected a positive integer, got {value!r}")
        sizes[size] = value
    inner, hidden = sizes.pop("inner"), sizes.pop("hidden")
    if inner % sizes["heads"] or inner % hidden:
        expected = f"a multiple of {_FIELDS['heads']} and of embedding_length"
        raise SourceError(f"{_FIELDS['inner']}: expected {expected}, got {inner}")
    return {**sizes, "head_dim": inner // sizes["heads"], "expand": inner // hidden}
