"""The values of one clustered matrix during training: their learning rates and bounds. Knows no loss.

Ranks keep their meaning: after every step, centroids ascend and a > 0.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rkf.format.matrix import Affine, MatrixValues, ascending
from rkf.torch import ClusteredWeight

# Adam's step times K, as a share of the matrix's deviation (centroids, b) or of the factor itself (a). The remaining
# error of clustering falls with 1 / K. Divergence recovered at K = 16 with one factor per matrix, after 8 steps: 30 %,
# at half of the rate 24 %. At K = 32 after 16 steps: 20 %, at twice the rate 17 %. Row factors were only tried at half.
_RATE, _RATE_ROWS = 0.128, 0.064
# A gap, and a factor, may shrink to this share of its old size.
_FLOOR = 1 / 16


class LiveValues:
    """The values of `weight`, trained in place. rows: give every row its own factors a and b."""

    def __init__(self, weight: ClusteredWeight, counts: NDArray[np.uint64], rows: bool) -> None:
        self.weight = weight
        device = weight.centroids.device
        if weight.a is None:
            weight.a = nn.Parameter(torch.ones(1, device=device) if weight.b is None else torch.ones_like(weight.b))
        if rows and weight.a.shape == (1,):
            weight.a = nn.Parameter(weight.a.detach().repeat(weight.rows))
            b = torch.zeros(1, device=device) if weight.b is None else weight.b.detach()
            weight.b = nn.Parameter(b.repeat(weight.rows))
        with torch.no_grad():
            self._least_gaps = weight.centroids.diff(dim=1) * _FLOOR
            self._least_factors = weight.a * _FLOOR
            self._deviation = _deviation(weight.centroids, torch.from_numpy(counts.astype(np.float32)).to(device))
        for value in self.learned:
            value.requires_grad_(True)

    @property
    def learned(self) -> list[nn.Parameter]:
        return list(self.weight.parameters(recurse=False))

    def groups(self) -> list[dict[str, object]]:
        """Parameter groups for Adam, each with its own rate."""
        weight, factor = self.weight, float(self._least_factors.mean()) / _FLOOR
        rates = [(weight.centroids, self._deviation), (weight.a, factor), (weight.b, self._deviation * factor)]
        rate = _RATE if self._least_factors.numel() == 1 else _RATE_ROWS
        return [{"params": [value], "rate": rate / weight.k * scale} for value, scale in rates if value is not None]

    @torch.no_grad()
    def restore_order(self) -> None:
        """Widen the gaps that have become too small, and raise the factors that have."""
        centroids, gaps = self.weight.centroids, self.weight.centroids.diff(dim=1)
        if (gaps <= self._least_gaps).any():
            rising = torch.maximum(gaps, self._least_gaps).cumsum(dim=1)
            centroids[:, 1:] = centroids[:, :1] + rising
            # `fill` extends a table of few distinct values by the next numbers. When it rises, those gaps round to
            # zero.
            strict = np.stack([ascending(table) for table in centroids.cpu().numpy()])
            centroids.copy_(torch.from_numpy(strict))
        if self.weight.a is not None:
            self.weight.a.copy_(torch.maximum(self.weight.a, self._least_factors))

    def to_matrix(self, old: MatrixValues) -> MatrixValues:
        """The values for the file, in f32; exception values are those of `old`."""
        a, b, group = _array(self.weight.a), _array(self.weight.b), self.weight.group
        one = "tensor" if a is not None and a.shape == (1,) else "row"
        affine = Affine(one if group is None else "group", group, a, b)
        centroids = self.weight.centroids.detach().cpu().numpy()
        return MatrixValues(centroids, affine, old.exceptions, old.exceptions_dtype)


def _deviation(centroids: Tensor, counts: Tensor) -> float:
    """The standard deviation of the clustered weights, before any factor."""
    shares = counts / counts.sum()
    mean = (shares * centroids).sum()
    return float((shares * (centroids - mean) ** 2).sum().sqrt())


def _array(value: Tensor | None) -> NDArray[np.float32] | None:
    return None if value is None else value.detach().cpu().numpy()
