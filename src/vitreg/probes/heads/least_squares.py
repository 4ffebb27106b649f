"""Exact linear regression from sums over any number of samples, with a penalty that the same sums choose."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_PENALTIES = tuple(10.0**exponent for exponent in range(-8, 3))
"""Of the weights' squares, in units of the mean variance of a feature."""


@dataclass(frozen=True)
class Moments:
    """Sums over samples of features x and targets y, all that least squares needs; they add up.

    Attributes:
        count: samples.
        x, y: sums.
        xx, xy: sums of products.
        yy: sum of the targets' squares.
    """

    count: int
    x: Float64[Tensor, " D"]
    y: Float64[Tensor, " K"]
    xx: Float64[Tensor, "D D"]
    xy: Float64[Tensor, "D K"]
    yy: Float64[Tensor, ""]

    @classmethod
    def of(cls, x: Float[Tensor, "n D"], y: Float[Tensor, "n K"]) -> Moments:
        """Those of some samples, summed in double precision."""
        x, y = x.double(), y.double()
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum())

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class LinearMap:
    """`x @ weight + bias`.

    Attributes:
        weight, bias: of the map.
        penalty: that was chosen, in units of the mean variance of a feature.
    """

    weight: Float64[Tensor, "D K"]
    bias: Float64[Tensor, " K"]
    penalty: float

    def __call__(self, x: Float[Tensor, "*batch D"]) -> Float64[Tensor, "*batch K"]:
        """The targets that follow from features."""
        return x.double() @ self.weight + self.bias


def fit_linear(moments: Moments) -> LinearMap:
    """Ridge regression with an intercept; generalized cross-validation chooses the penalty.

    Few samples of many features, as outliers are, need one. The criterion (Golub, Heath and Wahba 1979) follows from
    the same sums, so no sample has to be held out.
    """
    n = moments.count
    mean_x, mean_y = moments.x / n, moments.y / n
    values, vectors = torch.linalg.eigh(moments.xx / n - mean_x.outer(mean_x))
    values = values.clamp(min=0)
    rotated = vectors.T @ (moments.xy / n - mean_x.outer(mean_y))
    explained = rotated.square().sum(1)
    variance = moments.yy / n - mean_y.square().sum()
    # Features that do not vary have no scale, and no weights either.
    scale = values.mean().clamp(min=1e-30)

    def criterion(penalty: float) -> float:
        shrunk = values + penalty * scale
        error = variance - (explained * (2 / shrunk - values / shrunk.square())).sum()
        left = 1 - (1 + float((values / shrunk).sum())) / n
        return float(error) / left**2 if left > 0 else float("inf")

    penalty = min(_PENALTIES, key=criterion)
    weight = vectors @ (rotated / (values + penalty * scale).unsqueeze(1))
    return LinearMap(weight, mean_y - mean_x @ weight, penalty)
