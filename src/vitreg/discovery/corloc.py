"""CorLoc, and how sure one can be of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Shaped

from vitreg.common.bootstrap import RESAMPLES, percentile_interval, resampled_sums

IOU = 0.5
"""Intersection over union from which on an object counts as found."""


def iou(box: Sequence[float | int], others: Shaped[np.ndarray, "n 4"]) -> Float64[np.ndarray, " n"]:
    """Intersection over union of a box with each of others, x0, y0, x1, y1; as `torchvision.ops.box_iou` in float64."""
    one, many = np.asarray(box, dtype=np.float64), np.asarray(others, dtype=np.float64)
    sides = np.clip(np.minimum(one[2:], many[:, 2:]) - np.maximum(one[:2], many[:, :2]), 0, None)
    shared = sides.prod(1)
    return shared / ((one[2:] - one[:2]).prod() + (many[:, 2:] - many[:, :2]).prod(1) - shared)


def is_found(box: Sequence[float | int], truth: Shaped[np.ndarray, "n 4"]) -> bool:
    """Whether the box has an IoU of at least 0.5 with any box of the truth.

    CorLoc (Deselaers et al. 2010; `valeoai/LOST`, `main_lost.py`) is the share of images where it does. Images
    without any true box are left out of it.
    """
    return bool((iou(box, truth) >= IOU).any())


def bootstrap_interval(
    values: Shaped[np.ndarray, "*rows n"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float64[np.ndarray, "2 ..."]:
    """The 95 % percentile interval of the mean over images, from resamples of the images.

    Rows are resampled together, so the difference of two rows is their paired bootstrap.

    Args:
        values: one column per image.
        resamples: how often as many images are drawn, with replacement.
        seed: of the draws.
    """
    columns = np.moveaxis(np.asarray(values, dtype=np.float64), -1, 0)
    return percentile_interval(resampled_sums(columns, resamples=resamples, seed=seed) / len(columns))


def half(num: int, *, seed: int = 0) -> Bool[np.ndarray, " n"]:
    """A random half of the images: True for those that a setting is chosen on, False for those it is judged on."""
    return np.random.default_rng(seed).permutation(num) < (num + 1) // 2
