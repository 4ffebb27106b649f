"""Figures of merit against torchmetrics, and their bootstrap against scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torchmetrics.functional.classification import multiclass_jaccard_index

from vitreg.probes.score import Score


def confusion(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    """Right, true and predicted pixels of each class, picture by picture."""
    hot, guessed = np.eye(classes)[truth], np.eye(classes)[guess]
    return np.stack([(hot * guessed).sum((1, 2)), hot.sum((1, 2)), guessed.sum((1, 2))], 1)


def test_intervals_are_the_percentile_bootstrap():
    right = np.random.default_rng(0).random(300) < 0.7
    score = Score.mean("top-1", right, unit="%")
    assert score.value == pytest.approx(100 * right.mean())
    theirs = scipy.stats.bootstrap((right,), np.mean, method="percentile", n_resamples=5000, rng=1).confidence_interval
    np.testing.assert_allclose(score.interval(), [100 * theirs.low, 100 * theirs.high], atol=0.6)


def test_a_ratio_weighs_pictures_by_their_tokens():
    score = Score.mean("distance", np.array([2.0, 0.0, 9.0]), np.array([1, 0, 3]))
    assert score.value == pytest.approx(11 / 4)


@pytest.mark.parametrize("absent", [False, True])
def test_miou_is_torchmetrics(absent):
    rng = np.random.default_rng(1)
    truth, guess = rng.integers(0, 5, (2, 6, 8, 8))
    if absent:
        truth[truth == 3], guess[guess == 3] = 2, 2
    score = Score("mIoU", confusion(truth, guess, 5), "mIoU", "%")
    # torchmetrics counts a class that is nowhere as zero unless it is left out.
    theirs = multiclass_jaccard_index(torch.tensor(guess), torch.tensor(truth), 5, average="none")
    present = [c for c in range(5) if not (absent and c == 3)]
    assert score.value == pytest.approx(100 * float(theirs[present].mean()), abs=1e-4)
    low, high = score.interval()
    assert low < score.value < high


def test_differences_are_paired():
    rng = np.random.default_rng(2)
    first = rng.random(400) < 0.5
    second = first.copy()
    second[np.flatnonzero(~first)[:20]] = True
    better, worse = Score.mean("top-1", second, unit="%"), Score.mean("top-1", first, unit="%")
    difference = better.minus(worse)
    assert difference is not None
    assert difference.value == pytest.approx(5)
    # Unpaired, the intervals overlap.
    assert worse.interval()[1] > better.interval()[0]
    assert difference.is_significant
    low, high = difference.interval
    assert (low, high) == pytest.approx((3, 7.2), abs=0.7)
    alike = worse.minus(worse)
    assert alike is not None
    assert not alike.is_significant


def test_nothing_is_not_zero():
    none = Score.none("top-1", "3 outliers are too few", unit="%")
    assert math.isnan(none.value)
    assert math.isnan(none.interval()[0])
    assert Score.mean("top-1", np.ones(5), unit="%").minus(none) is None
    assert none.minus(Score.mean("top-1", np.ones(5), unit="%")) is None


def test_models_are_compared_on_the_same_pictures():
    with pytest.raises(ValueError, match="5 pictures and of 4"):
        Score.mean("top-1", np.ones(5)).minus(Score.mean("top-1", np.ones(4)))
    # The same pictures, but not the same patches of them.
    fewer = Score.mean("error", np.ones(3), np.array([4, 4, 3]))
    assert fewer.minus(Score.mean("error", np.ones(3), np.array([4, 4, 4]))) is None
    assert fewer.minus(fewer) is not None
