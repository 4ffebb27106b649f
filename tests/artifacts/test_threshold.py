"""The automatic threshold against distributions whose modes are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitreg.artifacts.histogram import NUM_BINS, LogAxis
from vitreg.artifacts.threshold import parse_rule, threshold_step, two_modes


def count(axis: LogAxis, norms: np.ndarray) -> np.ndarray:
    return np.bincount(axis.bins(torch.from_numpy(norms)).numpy(), minlength=NUM_BINS)


def found(norms: np.ndarray) -> float | None:
    axis = LogAxis()
    step = two_modes(axis, count(axis, norms))
    return None if step is None else axis.step_edge(step)


@settings(deadline=None, max_examples=60)
@given(
    median=st.floats(0.5, 500),
    spread=st.floats(0.02, 0.3),
    ratio=st.floats(5, 40),
    fraction=st.floats(0.001, 0.05),
    seed=st.integers(0, 2**16),
)
def test_separated_modes_are_split_between_them(median, spread, ratio, fraction, seed):
    rng = np.random.default_rng(seed)
    num_outliers = max(5, int(fraction * 6000))
    lower = median * 2 ** rng.normal(0, spread, 6000)
    upper = median * ratio * 2 ** rng.normal(0, 0.1, num_outliers)
    threshold = found(np.concatenate([lower, upper]))
    assert threshold is not None
    assert (upper >= threshold).all()
    assert (lower < threshold).mean() > 0.9999


@pytest.mark.parametrize("num_tokens", [2000, 50000])
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: 2 ** rng.normal(3, 0.4, n),
        lambda rng, n: rng.uniform(0.05, 1, n),
        lambda rng, n: rng.exponential(1, n),
        lambda rng, n: np.sqrt(rng.chisquare(3, n)),
        lambda rng, n: rng.normal(10, 0.1, n),
        lambda rng, n: np.where(rng.random(n) < 0.5, rng.normal(1, 0.05, n), rng.normal(2, 0.2, n)),
        lambda rng, n: np.full(n, 7.0),
    ],
    ids=["log-normal", "uniform", "exponential", "chi", "narrow", "two near modes", "constant"],
)
def test_one_mode_has_no_threshold(draw, num_tokens):
    alarms = [found(np.abs(draw(np.random.default_rng(seed), num_tokens)) + 1e-9) for seed in range(10)]
    assert alarms == [None] * 10


def test_a_majority_is_no_exception():
    rng = np.random.default_rng(0)
    assert found(np.concatenate([rng.normal(1, 0.05, 600), rng.normal(10, 0.5, 400)])) is None


def test_an_empty_histogram_has_no_threshold():
    assert two_modes(LogAxis(), np.zeros(NUM_BINS, dtype=np.int64)) is None


def test_quantiles_match_numpy():
    norms = 2 ** np.random.default_rng(0).normal(3, 0.7, 20000)
    axis = LogAxis()
    for q in (0.01, 0.5, 0.99):
        assert axis.quantile(count(axis, norms), q) == pytest.approx(np.quantile(norms, q), rel=0.01)


@given(st.floats(0.02, 1e5))
def test_a_fixed_threshold_splits_exactly(threshold):
    axis = LogAxis(threshold)
    step = threshold_step(parse_rule(threshold), axis, np.ones(NUM_BINS, dtype=np.int64), 1.0, 1.0)
    assert step is not None
    assert axis.step_edge(step) == pytest.approx(threshold, rel=1e-9)
    norms = torch.tensor([threshold * 0.9999, threshold, threshold * 1.0001], dtype=torch.float64)
    assert ((axis.bins(norms) // 8) >= step).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("auto", "auto", 0), (150, "fixed", 150), ("mean + 3 sd", "mean+sd", 3), ("5xmedian", "median", 5)],
)
def test_rules_are_read(text, kind, value):
    rule = parse_rule(text)
    assert (rule.kind, rule.value) == (kind, value)


@pytest.mark.parametrize("text", ["p98", "-1", "nan", "inf", "0", "", "mean+sd", "0xmedian"])
def test_unknown_rules_say_what_is_known(text):
    with pytest.raises(ValueError, match="mean\\+3sd"):
        parse_rule(text)


def test_asked_for_rules_follow_their_formula():
    norms = 2 ** np.random.default_rng(0).normal(3, 0.3, 5000)
    axis = LogAxis()
    for text, exact in (("mean+3sd", norms.mean() + 3 * norms.std()), ("4xmedian", 4 * np.median(norms))):
        step = threshold_step(parse_rule(text), axis, count(axis, norms), norms.mean(), norms.std())
        assert step is not None
        assert axis.step_edge(step) == pytest.approx(exact, rel=0.031)
