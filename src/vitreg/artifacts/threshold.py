"""Where the norms of artifacts begin, if there are any."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitreg.artifacts.histogram import BINS_PER_OCTAVE, BINS_PER_STEP, LogAxis

MIN_RATIO = 3.0
"""The upper mode's median is at least this many times the lower mode's: in the paper it is about 10."""

MIN_SPREADS = 4.0
"""... and at least this many half-widths of the lower mode away from it (in log-norm), so that a tail is no mode."""

MAX_FRACTION = 0.2
"""Above this share the upper mode would be the picture, not an exception."""

MIN_TOKENS = 3
"""Fewer tokens are no mode."""

MAX_VALLEY = 0.5
"""Density between the modes, as a share of the upper mode's peak."""

WINDOW = BINS_PER_OCTAVE // 4
"""Densities are taken over a quarter of an octave."""


@dataclass(frozen=True)
class Rule:
    """How outliers are told from the rest; see `parse_rule`."""

    kind: str
    value: float = 0.0

    def describe(self) -> str:
        """One sentence for the report."""
        return {
            "auto": "automatic: two separated modes in the log-norms of each block, or none",
            "fixed": f"fixed: norms of {self.value:g} and more",
            "mean+sd": f"mean + {self.value:g} standard deviations of each block's norms",
            "median": f"{self.value:g} times each block's median norm",
        }[self.kind]


def parse_rule(threshold: float | str) -> Rule:
    """Read what `diagnose(threshold=...)` accepts.

    `"auto"`; a number (150 for DINOv2-g, Darcet et al.); `"mean+3sd"` (Jiang et al.); `"5xmedian"`.

    Raises:
        ValueError: anything else.
    """
    text = str(threshold).replace(" ", "").lower()
    if text == "auto":
        return Rule("auto")
    if match := re.fullmatch(r"mean\+(\d+(?:\.\d+)?)\*?(?:sd|std)", text):
        return Rule("mean+sd", float(match[1]))
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)[x*]median", text):
        return Rule("median", float(match[1]))
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(f"threshold {threshold!r} is unknown; use 'auto', a norm such as 150, 'mean+3sd' or '5xmedian'")
    return Rule("fixed", value)


def threshold_step(rule: Rule, axis: LogAxis, counts: NDArray[np.int64], mean: float, sd: float) -> int | None:
    """The step of the axis from which norms count as outliers; None where the rule finds no second mode."""
    if rule.kind == "auto":
        return two_modes(axis, counts)
    norm = {
        "fixed": rule.value,
        "mean+sd": mean + rule.value * sd,
        "median": rule.value * axis.quantile(counts, 0.5),
    }[rule.kind]
    return axis.step_of(norm) if norm > 0 else None


def two_modes(axis: LogAxis, counts: NDArray[np.int64]) -> int | None:
    """The step in the valley between two separated modes of the log-norms, or None where there is one mode.

    A cut is accepted where the tokens above it (1) are at least `MIN_TOKENS` and at most `MAX_FRACTION`, (2) have a
    median of at least `MIN_RATIO` times the median of those below, (3) which is also `MIN_SPREADS` half-widths of the
    lower mode away, and (4) form a mode: the density at the cut is at most `MAX_VALLEY` of the density at their peak.
    Of the accepted cuts the middle of the emptiest stretch is taken. `docs/diagnosis.md` has the measured error rates.
    """
    total = int(counts.sum())
    if total == 0:
        return None
    median, half_width = _lower_mode(axis, counts)
    density = np.convolve(counts, np.ones(WINDOW), mode="same")
    above = total - np.concatenate([[0], np.cumsum(counts)])
    first = axis.step_of(median) + 1
    accepted: dict[int, float] = {}
    for step in range(first, len(counts) // BINS_PER_STEP):
        edge = step * BINS_PER_STEP
        if not MIN_TOKENS <= above[edge] <= MAX_FRACTION * total:
            continue
        upper = np.zeros_like(counts)
        upper[edge:] = counts[edge:]
        octaves = np.log2(axis.quantile(upper, 0.5) / median)
        if octaves < np.log2(MIN_RATIO) or octaves < MIN_SPREADS * half_width:
            continue
        valley = density[edge] / density[edge + WINDOW // 2 :].max(initial=1.0)
        if valley <= MAX_VALLEY:
            accepted[step] = valley
    return _middle_of_emptiest(accepted)


def _middle_of_emptiest(valleys: dict[int, float]) -> int | None:
    """The middle of the longest run of steps that share the lowest density."""
    if not valleys:
        return None
    lowest = min(valleys.values())
    runs: list[list[int]] = []
    for step in sorted(step for step, valley in valleys.items() if valley == lowest):
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    longest = max(runs, key=len)
    return longest[len(longest) // 2]


def _lower_mode(axis: LogAxis, counts: NDArray[np.int64]) -> tuple[float, float]:
    """Median and half-width in octaves, from the second and third quartile.

    Both are taken over everything: at most `MAX_FRACTION` of outliers moves them little, and up only. The distance
    between the quartiles is 0.674 standard deviations of a normal distribution.
    """
    median = axis.quantile(counts, 0.5)
    return median, float(np.log2(axis.quantile(counts, 0.75) / median)) / 0.674
