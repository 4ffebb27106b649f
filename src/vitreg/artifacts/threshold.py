"""Where the norms of artifacts begin, if there are any."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitreg.artifacts.histogram import BINS_PER_OCTAVE, BINS_PER_STEP, LogAxis

MIN_RATIO = 3.0
"""The upper mode's median is at least this many times the lower mode's; in the paper it is about 10."""

MAX_FRACTION = 0.2
"""Above this share the upper mode would be the image, not an exception."""

MIN_FRACTION, MIN_TOKENS = 1e-4, 3
"""A smaller share, or fewer tokens, are no mode but the end of a tail."""

MAX_VALLEY, MAX_VALLEY_CHANCE = 0.5, 0.05
"""Density at the cut as a share of the upper mode's peak, and the chance of so empty a cut without a valley."""

MIN_EXCESS, MAX_CHANCE = 4.0, 1e-4
"""How many times more tokens lie above the cut than the lower mode's tail explains, and the chance of that many."""

WINDOWS = BINS_PER_OCTAVE // 4, BINS_PER_OCTAVE
"""Densities are taken over a quarter of an octave, or a whole one, which shows a valley of few tokens if it is wide."""

TAIL, MIN_TAIL = 0.02, 20
"""The upper part of the lower mode whose decay is extrapolated: a share, but at least so many tokens."""

DECAYS = np.geomspace(1e-3, 500, 2000)
MEAN_AFTER_DECAYS = 1 / DECAYS - 1 / np.expm1(DECAYS)
"""The mean of an exponential that is cut off after so many decay lengths, as a share of the length."""


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
            "mean+sd": f"mean + {self.value:g} standard deviations of each block's norms, to 3 %",
            "median": f"{self.value:g} times each block's median norm, to 3 %",
        }[self.kind]


def parse_rule(threshold: float | int | str) -> Rule:
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
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)[x*]median", text)) and float(match[1]):
        return Rule("median", float(match[1]))
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(
            f"threshold {threshold!r} is unknown; use 'auto', a norm such as 150, 'mean+3sd' or '5xmedian'"
        )
    return Rule("fixed", value)


def threshold_step(rule: Rule, axis: LogAxis, counts: NDArray[np.int64], mean: float, sd: float) -> int | None:
    """The step of the axis from which norms count as outliers by a rule that was asked for; None for a norm of 0."""
    norm = {
        "fixed": rule.value,
        "mean+sd": mean + rule.value * sd,
        "median": rule.value * axis.quantile(counts, 0.5),
    }[rule.kind]
    return axis.step_of(norm) if norm > 0 else None


def two_modes(axis: LogAxis, counts: NDArray[np.int64]) -> int | None:
    """The step in the valley between two separated modes of the log-norms, or None where there is one mode.

    A cut is accepted where the tokens above it

    1. are at least `MIN_TOKENS` and `MIN_FRACTION`, and at most `MAX_FRACTION` of all;
    2. have a median of at least `MIN_RATIO` times the median of all;
    3. form a mode of their own: the density at the cut is at most `MAX_VALLEY` of the density at their peak, and a cut
       as empty has a chance of at most `MAX_VALLEY_CHANCE` where there is no valley;
    4. are no tail of the lower mode: an exponential fitted to its end (which decays more slowly than a normal
       distribution) would leave `MIN_EXCESS` times fewer, and so many by chance less often than `MAX_CHANCE`.

    Of the accepted cuts the middle of the emptiest stretch is taken. `docs/diagnosis.md` has the measured error rates.
    """
    from scipy.special import pdtr

    total = int(counts.sum())
    if total == 0:
        return None
    median = axis.quantile(counts, 0.5)
    densities = [np.convolve(counts, np.ones(window), mode="same") for window in WINDOWS]
    below = np.concatenate([[0], np.cumsum(counts)])
    accepted: dict[int, float] = {}
    for step in range(axis.step_of(median) + 1, len(counts) // BINS_PER_STEP):
        edge = step * BINS_PER_STEP
        above = total - below[edge]
        if not max(MIN_TOKENS, MIN_FRACTION * total) <= above <= MAX_FRACTION * total:
            continue
        upper = np.zeros_like(counts)
        upper[edge:] = counts[edge:]
        if axis.quantile(upper, 0.5) < MIN_RATIO * median:
            continue
        peaks = [density[edge + w // 2 :].max(initial=1.0) for density, w in zip(densities, WINDOWS, strict=True)]
        cuts = [density[edge] for density in densities]
        # With few tokens a valley may be chance: the density of the peak would have to leave it so rarely.
        if not any(
            cut <= MAX_VALLEY * peak and pdtr(cut, peak) <= MAX_VALLEY_CHANCE
            for cut, peak in zip(cuts, peaks, strict=True)
        ):
            continue
        if _exceeds_tail(counts[:edge], int(above)):
            accepted[step] = cuts[0] / peaks[0]
    return _middle_of_emptiest(accepted)


def _exceeds_tail(lower: NDArray[np.int64], above: int) -> bool:
    """Whether more tokens lie above a cut than the exponential tail of those below it leads one to expect.

    The tail ends at the cut, so it is fitted as a truncated exponential: on a length of x decay lengths, the mean is
    `1/x - 1/(e^x - 1)` of the length (maximum likelihood), and one token in `e^x - 1` is expected beyond the cut.
    """
    from scipy.special import pdtrc

    from_top = np.cumsum(lower[::-1])
    wanted = max(TAIL * from_top[-1], min(MIN_TAIL, from_top[-1]))
    length = int(np.searchsorted(from_top, wanted)) + 1
    tail = lower[len(lower) - length :]
    mean = float((tail * (np.arange(length) + 0.5)).sum() / tail.sum()) / length
    if mean >= 0.5:
        return False  # no decay before the cut
    x = float(np.interp(-mean, -MEAN_AFTER_DECAYS, DECAYS))
    expected = float(tail.sum() / np.expm1(x))
    return above >= MIN_EXCESS * expected and float(pdtrc(above - 1, expected)) < MAX_CHANCE


def _middle_of_emptiest(valleys: dict[int, float]) -> int | None:
    """The middle of the longest run of steps that share the lowest density."""
    if not valleys:
        return None
    lowest = min(valleys.values())
    steps = np.array(sorted(step for step, valley in valleys.items() if valley == lowest))
    longest = max(np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1), key=len)
    return int(longest[len(longest) // 2])
