"""How far a depth map is from the truth: the loss of training, and the figures of merit."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

_EPSILON = 1e-3
_MEAN_WEIGHT = 0.15


def sig_loss(
    predicted: Float[Tensor, " pixels"], truth: Float[Tensor, " pixels"], *, mean_only: bool
) -> Float[Tensor, ""]:
    """The scale-invariant loss as DINOv2 has it: `sqrt(var(g) + 0.15 mean(g)^2)` of differences of log meters.

    The variance is left out in the first steps.
    """
    if len(truth) < 2:
        return predicted.sum() * 0
    g = torch.log(predicted + _EPSILON) - torch.log(truth + _EPSILON)
    mean = _MEAN_WEIGHT * g.mean().square()
    return torch.sqrt(mean if mean_only else g.var() + mean)


def depth_errors(
    predicted: Float32[np.ndarray, " pixels"], truth: Float32[np.ndarray, " pixels"]
) -> tuple[float, float, float]:
    """RMSE in meters, AbsRel, and delta1, the part of pixels that are wrong by a factor of less than 1.25."""
    predicted_, truth_ = predicted.astype(np.float64), truth.astype(np.float64)
    difference = predicted_ - truth_
    factor = np.maximum(predicted_ / truth_, truth_ / predicted_)
    return (
        float(np.sqrt(np.square(difference).mean())),
        float((np.abs(difference) / truth_).mean()),
        float((factor < 1.25).mean()),
    )
