"""Figures of merit against torchmetrics, and their bootstrap against scipy's."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torchmetrics.functional.classification import multiclass_jaccard_index

from vitreg.probes.results.score import Score


def confusion(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    """Right, true and predicted pixels of each class, image by image."""
    hot, guessed = np.eye(classes)[truth], np.eye(classes)[guess]
    return np.stack([(hot * guessed).sum((1, 2)), hot.sum((1, 2)), guessed.sum((1, 2))], 1)


def test_intervals_are_the_percentile_bootstrap():
    right = np.random.default_rng(0).random(300) < 0.7
    score = Score.mean("top-1", right, unit="%")
    assert score.value == pytest.approx(100 * right.mean())
    theirs = scipy.stats.bootstrap((right,), np.mean, method="percentile", n_resamples=5000, rng=1).confidence_interval
    np.testing.assert_allclose(score.interval(), [100 * theirs.low, 100 * theirs.high], atol=0.6)


def test_a_ratio_weighs_images_by_their_tokens():
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


def drawn(rng: np.random.Generator, chance: np.ndarray, shifts: np.ndarray) -> Score:
    """A model's accuracy on images of these chances, with a classifier that is better or worse in every draw."""
    right = rng.random((len(shifts), len(chance))) < np.clip(chance + shifts[:, None], 0, 1)
    return Score.mean("top-1", right.mean(0), unit="%", draws=tuple((100 * right.mean(1)).tolist()))


def test_random_draws_are_in_the_interval_so_that_equal_models_are_not_marked():
    """Of equal models one in twenty is marked; without the draws, it was every third."""
    rng = np.random.default_rng(3)
    chance, marked = rng.beta(0.4, 0.8, 200), {True: 0, False: 0}
    for _ in range(25):
        shifts = rng.normal(0, 0.05, (2, 5))
        first, second = (drawn(rng, chance, shift) for shift in shifts)
        for with_draws in marked:
            pair = [score if with_draws else dataclasses.replace(score, draws=()) for score in (first, second)]
            difference = pair[0].minus(pair[1])
            assert difference is not None
            marked[with_draws] += difference.is_significant
    assert marked[True] <= 3
    assert marked[False] >= 6


def test_draws_with_equal_seeds_are_compared_in_pairs():
    rng = np.random.default_rng(4)
    chance, shifts = rng.random(1000), rng.normal(0, 0.05, 5)
    first, second = (drawn(rng, chance, shifts + better) for better in (0, 0.06))
    difference = second.minus(first)
    assert difference is not None
    assert difference.is_significant
    shuffled = second.minus(dataclasses.replace(first, draws=first.draws[::-1]))
    assert shuffled is not None
    assert not shuffled.is_significant


def test_a_single_random_draw_is_not_compared():
    once = Score.mean("top-1", np.ones(5), draws=(100.0,))
    assert once.deviation is None
    assert once.minus(once) is None
    several = Score.mean("top-1", np.ones(5), unit="%", draws=(99.0, 100.0, 101.0))
    assert several.deviation == 1
    assert several.minus(once) is None
    # Student's t with two degrees of freedom.
    assert several.interval() == pytest.approx((100 - 4.303 / 3**0.5, 100 + 4.303 / 3**0.5), abs=0.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["ratio", "mIoU"])
@pytest.mark.parametrize("counted", [0, 1])
def test_one_image_or_none_has_no_interval_and_no_mark(kind, counted):
    sums = np.zeros((4, 2) if kind == "ratio" else (4, 3, 5))
    sums[:counted] = 3
    better, worse = Score("figure", sums, kind), Score("figure", sums * (1 if kind == "mIoU" else (0.5, 1)), kind)
    assert math.isnan(better.value) == (not counted)
    assert all(map(math.isnan, better.interval()))
    assert better.minus(worse) is None


@pytest.mark.filterwarnings("error")
def test_images_without_a_pixel_that_counts_do_not_warn_or_count():
    rng = np.random.default_rng(5)
    sums = np.zeros((12, 3, 4))
    for row in (2, 5, 9):
        truth, guess = rng.integers(3, size=(2, 1, 5, 10))
        sums[row] = confusion(truth, guess, 4)[0]
    few, all_of_them = Score("mIoU", sums, "mIoU", "%"), Score("mIoU", sums[[2, 5, 9]], "mIoU", "%")
    assert few.value == all_of_them.value
    low, high = few.interval()
    assert low < few.value < high


def test_nothing_is_not_zero():
    none = Score.none("top-1", "3 outliers are too few", unit="%")
    assert math.isnan(none.value)
    assert math.isnan(none.interval()[0])
    assert Score.mean("top-1", np.ones(5), unit="%").minus(none) is None
    assert none.minus(Score.mean("top-1", np.ones(5), unit="%")) is None


def test_models_are_compared_on_the_same_images():
    with pytest.raises(ValueError, match="5 images and of 4"):
        Score.mean("top-1", np.ones(5)).minus(Score.mean("top-1", np.ones(4)))
    # The same images, but not the same patches of them.
    fewer = Score.mean("error", np.ones(3), np.array([4, 4, 3]))
    assert fewer.minus(Score.mean("error", np.ones(3), np.array([4, 4, 4]))) is None
    assert fewer.minus(fewer) is not None
