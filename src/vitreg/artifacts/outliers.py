"""Where outliers are, from norms alone: what a diagnosis says of norms that were kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.artifacts.decision import decide
from vitreg.artifacts.histogram import BINS_PER_STEP, NUM_BINS, LogAxis, add_counts


@dataclass(frozen=True)
class OutlierNorms:
    """What of a `Diagnosis` follows from norms.

    Attributes:
        threshold: where outliers begin after `block`; None where there are none, or too few patches to tell.
        block: the block reported: the last, unless artifacts exist only further inside.
        onset_block: the first of the unbroken run of blocks with outliers that reaches `block`.
    """

    threshold: float | None
    block: int
    onset_block: int | None


def find_outliers(norms: Iterable[Float[Tensor, "depth _ h w"]]) -> OutlierNorms:
    """What `diagnose` finds on the images that norms are of, with its defaults.

    Args:
        norms: of the patches after every block, as in a `Trace`; at least one batch.
    """
    axis = LogAxis()
    summed = largest = torch.zeros(0)
    num_images = 0
    for batch in norms:
        bins = axis.bins(batch.flatten(1))
        if not len(summed):
            summed, largest = torch.zeros(len(batch), NUM_BINS, dtype=torch.int64), torch.zeros(len(batch))
        add_counts(summed, torch.arange(len(batch))[:, None].expand_as(bins), bins)
        num_images += batch.shape[1]
        largest = torch.maximum(largest, batch.flatten(1).amax(1))
    return outlier_norms(axis, summed.numpy(), largest.numpy(), num_images)


def outlier_norms(
    axis: LogAxis, counts: Int[np.ndarray, "depth bins"], largest: Float[np.ndarray, " depth"], num_images: int
) -> OutlierNorms:
    """The same from histograms of the norms after every block, and the largest of each."""
    steps = decide(axis, counts, num_images).steps
    above = [
        0 if step is None else int(of_block[step * BINS_PER_STEP :].sum())
        for step, of_block in zip(steps, counts, strict=True)
    ]
    excess = [float(most) / axis.quantile(of_block, 0.5) for most, of_block in zip(largest, counts, strict=True)]
    block = reported_block(above, excess)
    step = steps[block]
    return OutlierNorms(None if step is None else axis.step_edge(step), block, onset(above, block))


def reported_block(num_outliers: Sequence[int], excess: Sequence[float]) -> int:
    """The last block, which is what users read; where only inner blocks have outliers, the worst of those.

    Args:
        num_outliers: of each block.
        excess: the largest norm of each block, as a multiple of its median.
    """
    last = len(num_outliers) - 1
    if num_outliers[last] or not any(num_outliers):
        return last
    return max(range(last), key=lambda block: excess[block] if num_outliers[block] else 0.0)


def onset(has_outliers: Sequence[int], at: int) -> int | None:
    """Where the unbroken run of those with outliers begins that reaches `at`; None where that has none."""
    if not has_outliers[at]:
        return None
    while at > 0 and has_outliers[at - 1]:
        at -= 1
    return at
