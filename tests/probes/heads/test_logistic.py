"""Logistic regression against scikit-learn, on pixels: real features that are badly conditioned."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from peers import error
from probes.labeled import images_of
from vitreg.model import Preprocess
from vitreg.probes.heads.logistic import LogisticConfig, choose_logistic, fit_logistic

CLASSES = 6


def pixels(data: Path, part: str, each: int) -> tuple[Tensor, Tensor]:
    """6 x 6 colors of images, from 0 to 1, in float64."""
    images, preprocess = images_of(data, part, range(CLASSES), each), Preprocess(size=(64, 64), crop_pct=1.0)
    stack = torch.stack([preprocess.pixels(images.image(i)) for i in range(len(images))]).double() / 255
    return adaptive_avg_pool2d(stack, 6).flatten(1), torch.tensor(images.labels)


@pytest.fixture(scope="module")
def train(test_data) -> tuple[Tensor, Tensor]:
    return pixels(test_data, "train", 60)


@pytest.fixture(scope="module")
def val(test_data) -> tuple[Tensor, Tensor]:
    return pixels(test_data, "val", 40)


def peer(x: Tensor, y: Tensor, C: float, tolerance: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogisticRegression(C=C, tol=tolerance, max_iter=20000).fit(x.numpy(), y.numpy())


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
def test_the_optimum_is_that_of_scikit_learn(C, train):
    x, y = train
    ours, theirs = fit_logistic(x, y, CLASSES, C=C, tolerance=1e-8), peer(x, y, C, 1e-8)
    assert ours.converged
    assert error(ours.weight, torch.from_numpy(theirs.coef_)) < 1e-3
    # The bias is not penalised, so both are the same but for a common offset, which scikit-learn leaves at zero.
    assert error(ours.bias - ours.bias.mean(), torch.from_numpy(theirs.intercept_ - theirs.intercept_.mean())) < 1e-3
    if C > 0.1:
        assert ours.num_iterations < theirs.n_iter_[0] / 3


def test_float32_predicts_what_scikit_learn_does(train, val):
    (x, y), (queries, truth) = train, val
    x, queries = x.float(), queries.float()
    ours, theirs = fit_logistic(x, y, CLASSES, C=1.0).predict(queries), peer(x, y, 1.0, 1e-5).predict(queries.numpy())
    assert abs((ours == truth).double().mean().item() - np.mean(theirs == truth.numpy())) <= 0.005
    assert np.mean(ours.numpy() == theirs) > 0.99


def test_a_start_at_the_optimum_costs_nothing(train):
    x, y = train
    first = fit_logistic(x, y, CLASSES, tolerance=1e-6)
    again = fit_logistic(x, y, CLASSES, tolerance=1e-6, start=first)
    assert again.num_iterations <= 1 < first.num_iterations
    assert error(again.weight, first.weight) < 1e-3


def test_dependent_and_constant_columns_and_fewer_rows_than_columns(train):
    x, y = train
    x = torch.cat([x[::10], 2 * x[::10], torch.ones(len(x[::10]), 3, dtype=x.dtype)], 1)
    ours, theirs = fit_logistic(x, y[::10], CLASSES, tolerance=1e-8), peer(x, y[::10], 1.0, 1e-8)
    assert ours.converged
    assert error(ours.weight, torch.from_numpy(theirs.coef_)) < 1e-3
    # Rounding makes the Hessian indefinite where nearly nothing is penalised.
    loose = fit_logistic(100 * x.float() + 300, y[::10], CLASSES, C=1e6)
    assert torch.equal(loose.predict(100 * x.float() + 300), y[::10])


def test_a_fit_that_rounding_stops_before_the_tolerance_ends(train):
    x, y = train
    ours = fit_logistic(100 * x.float() + 1000, y, CLASSES, C=1e-3, tolerance=1e-12)
    assert ours.converged
    assert ours.num_iterations < 1000
    reference = fit_logistic(100 * x + 1000, y, CLASSES, C=1e-3, tolerance=1e-8)
    assert error(ours.weight, reference.weight.float()) < 0.05


def test_too_few_iterations_are_said(train):
    fitted = fit_logistic(*train, CLASSES, C=1e3, max_iter=40, tolerance=1e-8)
    assert not fitted.converged
    assert fitted.num_iterations == 40


def test_bad_rows(train):
    x, y = train
    with pytest.raises(ValueError, match="there are no rows of class 1, 2; leave such classes out"):
        fit_logistic(x[(y != 1) & (y != 2)], y[(y != 1) & (y != 2)], CLASSES)
    with pytest.raises(ValueError, match="a classifier needs two at least"):
        fit_logistic(x[y == 0], y[y == 0], 1)
    spoilt = x.clone()
    spoilt[17, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite in row 17"):
        fit_logistic(spoilt, y, CLASSES)


def test_c_is_the_best_on_what_is_held_back(train):
    x, y = train
    config = LogisticConfig(C=(1e3, 1e-4, 1e-2, 1.0), held_back=0.3, tolerance=1e-6)
    chosen = choose_logistic(x, y, CLASSES, config)
    # Scikit-learn on the same split.
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held, rest = order[: round(0.3 * len(y))], order[round(0.3 * len(y)) :]
    assert list(chosen.accuracies) == sorted(config.C)
    for C, accuracy in chosen.accuracies.items():
        theirs = 100 * peer(x[rest], y[rest], C, 1e-6).score(x[held].numpy(), y[held].numpy())
        assert accuracy == pytest.approx(theirs, abs=1.0)
    assert chosen.accuracies[chosen.C] == max(chosen.accuracies.values())
    assert error(chosen.logistic.weight, fit_logistic(x, y, CLASSES, C=chosen.C, tolerance=1e-6).weight) < 1e-6


def test_larger_c_are_left_out_after_several_that_did_worse(train):
    x, y = train
    steps = []
    config = LogisticConfig(C=tuple(10.0 ** np.arange(-4, 9)), held_back=0.3, patience=2)
    chosen = choose_logistic(x, y, CLASSES, config, on_progress=lambda *step: steps.append(step))
    tried = list(chosen.accuracies)
    assert tried == list(config.C[: len(tried)])
    assert len(tried) < len(config.C)
    best = max(chosen.accuracies.values())
    assert all(chosen.accuracies[C] < best for C in tried[-2:])
    assert steps[0] == (1, 14)
    assert steps[-1] == (14, 14)


def test_one_image_of_a_class_is_always_fitted(train):
    x, y = train
    few = torch.cat([(y == label).nonzero()[:1, 0] for label in range(1, CLASSES)])
    rows = torch.cat([(y == 0).nonzero()[:2, 0], few])
    assert choose_logistic(x[rows], y[rows], CLASSES, LogisticConfig(C=(0.1, 1.0), held_back=0.9)).C == 0.1
    with pytest.raises(ValueError, match="every class has one image only"):
        choose_logistic(x[rows[1:]], y[rows[1:]], CLASSES, LogisticConfig(C=(0.1, 1.0)))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"C": ()}, r"C is \(\); give at least one"),
        ({"C": (1.0, 0.0)}, "all above 0"),
        ({"held_back": 1.0}, "held_back is 1.0"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
    ],
)
def test_a_config_that_is_wrong(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(LogisticConfig(), **config)


def test_the_candidates_are_those_of_dinov2():
    C = LogisticConfig().C
    assert len(C) == 45
    assert (C[0], C[-1]) == pytest.approx((1e-6, 1e5))
