"""CorLoc, and how sure one can be of it."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float64, Shaped
from torchvision.ops import box_iou

from vitreg.common.bootstrap import RESAMPLES, percentile_interval, resampled_sums

IOU = 0.5
"""Intersection over union from which on an object counts as found."""


def are_found(boxes: Shaped[np.ndarray, "boxes 4"], truth: Shaped[np.ndarray, "n 4"]) -> Bool[np.ndarray, " boxes"]:
    """Whether each box (x0, y0, x1, y1) has an IoU of at least 0.5 with any box of the truth.

    CorLoc (Deselaers et al. 2010; `valeoai/LOST`, `main_lost.py`) is the share of images where it does. Images
    without any true box are left out of it.
    """
    found = box_iou(torch.as_tensor(boxes, dtype=torch.float64), torch.as_tensor(truth, dtype=torch.float64))
    return (found >= IOU).any(1).numpy()


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
