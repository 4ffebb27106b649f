"""IoU and CorLoc against torchvision, intervals against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torchvision.ops import box_iou

from vitreg.discovery.corloc import are_found, bootstrap_interval, half


def random_boxes(num: int, rng: np.random.Generator) -> np.ndarray:
    corners = rng.integers(0, 60, (num, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1) + rng.integers(1, 30, (num, 2))], axis=1).astype(float)


def is_found(box: tuple[float, ...], truth: np.ndarray) -> bool:
    return bool(are_found(np.array([box]), truth)[0])


def test_corloc_is_by_torchvisions_iou():
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    for _ in range(300):
        box, truth = tuple(random_boxes(1, rng)[0].tolist()), random_boxes(int(rng.integers(1, 6)), rng)
        expected = box_iou(torch.tensor([box], dtype=torch.float64), torch.from_numpy(truth))[0].numpy()
        ours.append(is_found(box, truth))
        theirs.append(bool((expected >= 0.5).any()))
    assert ours == theirs
    assert 0.05 < np.mean(ours) < 0.95


def test_half_is_found_and_less_is_not():
    assert is_found((0, 0, 10, 10), np.array([[0, 0, 10, 20]]))
    assert not is_found((0, 0, 10, 10), np.array([[0, 0, 10, 20.001]]))
    assert is_found((0, 0, 10, 10), np.array([[50, 50, 60, 60], [0, 0, 10, 10]]))
    assert not is_found((0, 0, 10, 10), np.array([[10, 0, 20, 10]]))


def test_intervals_are_the_percentile_bootstrap():
    hits = np.random.default_rng(1).random((2, 150)) < np.array([[0.3], [0.6]])
    ours = bootstrap_interval(hits)
    for row, (low, high) in zip(hits, ours.T, strict=True):
        theirs = scipy.stats.bootstrap((row,), np.mean, method="percentile", n_resamples=2000, rng=2)
        assert low == pytest.approx(theirs.confidence_interval.low, abs=0.015)
        assert high == pytest.approx(theirs.confidence_interval.high, abs=0.015)
    np.testing.assert_array_equal(ours, bootstrap_interval(hits))


def test_rows_are_resampled_together():
    """What two settings have in common does not widen the interval of their difference."""
    first = np.random.default_rng(1).random(400) < 0.5
    second = first.copy()
    second[np.flatnonzero(~first)[:12]] = True
    low, high = bootstrap_interval(second.astype(float) - first)
    assert 0 < low < 0.03 < high < 0.06


@pytest.mark.parametrize("num", [1, 2, 7, 126])
def test_halves(num):
    chosen = half(num)
    assert chosen.shape == (num,)
    assert 0 <= chosen.sum() - (~chosen).sum() <= 1
    np.testing.assert_array_equal(chosen, half(num))
