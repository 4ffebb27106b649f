"""Histograms of norms on a logarithmic axis: all that a diagnosis keeps of its images."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

BINS_PER_OCTAVE = 96
"""Fine bins: 0.7 % wide, enough to read a median or a percentile off."""

BINS_PER_STEP = 8
"""Fine bins per step; thresholds lie on steps (6 % wide), so that per-position counts can be kept per step."""

OCTAVES = 24
NUM_BINS = OCTAVES * BINS_PER_OCTAVE
NUM_STEPS = NUM_BINS // BINS_PER_STEP
LOWEST = 2.0**-6


class LogAxis:
    """Bins from 2^-6 to 2^18 (norms beyond are counted in the outermost), shifted so that `anchor` is an edge.

    Args:
        anchor: a threshold that was asked for; being an edge, it splits the counts exactly.
    """

    def __init__(self, anchor: float | None = None) -> None:
        self.lowest = LOWEST
        if anchor is not None:
            steps = math.log2(anchor / LOWEST) * BINS_PER_OCTAVE / BINS_PER_STEP
            self.lowest = anchor / 2 ** (math.floor(steps) * BINS_PER_STEP / BINS_PER_OCTAVE)

    def bins(self, norms: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The fine bin of each norm."""
        # float64, or a norm on the anchor itself could fall on either side of it
        position = (norms.double() / self.lowest).clamp_min(2.0**-60).log2() * BINS_PER_OCTAVE
        return (position + 1e-9).floor().clamp_(0, NUM_BINS - 1).long()

    def edges(self) -> NDArray[np.float64]:
        """The `NUM_BINS + 1` edges of the fine bins."""
        return self.lowest * 2.0 ** (np.arange(NUM_BINS + 1) / BINS_PER_OCTAVE)

    def step_of(self, norm: float) -> int:
        """The step nearest to a norm, as a number of steps from the lowest edge."""
        return min(max(round(math.log2(norm / self.lowest) * BINS_PER_OCTAVE / BINS_PER_STEP), 0), NUM_STEPS)

    def step_edge(self, step: int) -> float:
        """The norm at which a step begins."""
        return self.lowest * 2.0 ** (step * BINS_PER_STEP / BINS_PER_OCTAVE)

    def quantile(self, counts: NDArray[np.int64], q: float) -> float:
        """A quantile of the counted norms, interpolated inside its bin; 0 where nothing was counted."""
        total = counts.sum()
        if total == 0:
            return 0.0
        below = np.cumsum(counts)
        bin_ = int(np.searchsorted(below, q * total))
        inside = (q * total - (below[bin_] - counts[bin_])) / max(counts[bin_], 1)
        return float(self.lowest * 2.0 ** ((bin_ + inside) / BINS_PER_OCTAVE))


def add_counts(
    into: Tensor,
    rows: Int[Tensor, "*shape"],
    bins: Int[Tensor, "*shape"],
    weights: Float[Tensor, "*shape"] | None = None,
) -> None:
    """`into[row, bin] += weight` for every element; `into` is `[rows, bins]`."""
    flat = (rows * into.shape[1] + bins).flatten()
    source = torch.ones_like(flat, dtype=into.dtype) if weights is None else weights.flatten().to(into.dtype)
    into.view(-1).scatter_add_(0, flat, source)
