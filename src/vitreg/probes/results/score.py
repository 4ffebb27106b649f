"""A probe's figures of merit, with what they follow from image by image, so that they can be resampled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import stdev
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Shaped

from vitreg.common.bootstrap import error_of_mean, percentile_interval, resampled_sums

Kind = Literal["ratio", "mIoU"]

NUM_SHOWN = 6
"""Of so many images, evenly spread over the set, predictions for every pixel are kept, for reports."""


@dataclass(frozen=True, eq=False)
class Score:
    """A figure of merit: of one probe, on one kind of token.

    Attributes:
        name: of the figure: `"top-1"`, `"mIoU"`, `"RMSE"`.
        sums: what the figure follows from, for each image of the validation set: `[N, 2]`, a sum and a count
            (`kind="ratio"`), or `[N, 3, C]`, pixels of each class that are right, in the truth, and predicted
            (`kind="mIoU"`).
        kind: how it follows from the sums over images.
        unit: `"%"` multiplies by 100.
        lower_is_better: of errors.
        subject: what the figure is of, where a probe has several: `"outlier"`, `"register 1"`, `"k = 10"`.
        draws: the figure of each of several random choices that a probe makes, whose mean it is; none where it makes
            no choice.
        missing: why there is no figure; empty where there is one.
    """

    name: str
    sums: Float64[np.ndarray, "N ..."]
    kind: Kind = "ratio"
    unit: str = ""
    lower_is_better: bool = False
    subject: str = ""
    draws: tuple[float, ...] = ()
    missing: str = ""

    @classmethod
    def mean(
        cls,
        name: str,
        values: Shaped[np.ndarray, " N"],
        counts: Shaped[np.ndarray, " N"] | None = None,
        **options: Any,
    ) -> Score:
        """The sum of values over the sum of counts (of tokens, of pixels), with one count an image by default.

        `options` are other attributes.
        """
        values = np.asarray(values, dtype=np.float64)
        counts = np.ones(len(values)) if counts is None else np.asarray(counts, dtype=np.float64)
        return cls(name, np.stack([values, counts], 1), **options)

    @classmethod
    def none(cls, name: str, reason: str, **options: Any) -> Score:
        """An empty place in a table, and why there is none, as a sentence."""
        return cls(name, np.zeros((0, 2)), missing=reason, **options)

    @property
    def value(self) -> float:
        """The figure; NaN where there is none."""
        return math.nan if self.missing else float(self._figure(self.sums.sum(0)[None])[0])

    @property
    def deviation(self) -> float | None:
        """Standard deviation over random choices; None where there are not several."""
        return stdev(self.draws) if len(self.draws) > 1 else None

    def interval(self) -> tuple[float, float]:
        """Its 95 % bootstrap interval over images, and over random choices where there are several.

        NaN where there is none: resamples of a single image are all the same, and say nothing of others.
        """
        if self._num_counted < 2:
            return math.nan, math.nan
        return _interval(self._figure(resampled_sums(self.sums)), self.draws)

    def minus(self, other: Score) -> Difference | None:
        """How much it differs from another model's on the same images, resampled in pairs.

        Random choices with equal seeds go together, too. None where one is missing, where the two are of other things
        (patches that are normal in one model are not those that are normal in the other), or where there is one image
        or one random choice, so that nobody knows what others would have given.

        Raises:
            ValueError: the two are not of the same images.
        """
        if self.missing or other.missing:
            return None
        if len(self.sums) != len(other.sums):
            raise ValueError(
                f"{self.name} is of {len(self.sums)} images and of {len(other.sums)}; they must be the same"
            )
        # Counts, and pixels of each class in the truth.
        if not np.array_equal(self.sums[:, 1], other.sums[:, 1]):
            return None
        if self._num_counted < 2 or len(self.draws) != len(other.draws) or len(self.draws) == 1:
            return None
        resampled = self._figure(resampled_sums(self.sums)) - other._figure(resampled_sums(other.sums))
        draws = [mine - theirs for mine, theirs in zip(self.draws, other.draws, strict=True)]
        return Difference(self.value - other.value, _interval(resampled, draws))

    @property
    def _num_counted(self) -> int:
        """Images that the figure is of: some have no outlier, or no pixel that counts."""
        return int(self.sums[:, 1].reshape(len(self.sums), -1).any(1).sum()) if len(self.sums) else 0

    def _figure(self, sums: Float64[np.ndarray, "R ..."]) -> Float64[np.ndarray, " R"]:
        """From sums over images, one row for every resample."""
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.kind == "mIoU":
                right, union = sums[:, 0], sums[:, 1] + sums[:, 2] - sums[:, 0]
                # Classes that are neither in the truth nor predicted do not count.
                figure = np.where(union > 0, right / union, 0).sum(1) / (union > 0).sum(1)
            else:
                figure = sums[:, 0] / sums[:, 1]
        return 100 * figure if self.unit == "%" else figure


def _interval(resampled: Float64[np.ndarray, " R"], draws: Sequence[float]) -> tuple[float, float]:
    """Of a figure on resamples, with what its random choices leave open, where there are several."""
    low, high = percentile_interval(resampled + error_of_mean(draws) if len(draws) > 1 else resampled)
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """A figure minus another model's, and its 95 % interval."""

    value: float
    interval: tuple[float, float]

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a probe says of one model.

    Attributes:
        probe: its name.
        scores: its figures, the one for a table of all probes first.
        details: what else is worth knowing, in JSON types: what was chosen, on how many images.
        predictions: maps of some images of the validation set, by position in the set: classes or meters.
    """

    probe: str
    scores: tuple[Score, ...]
    details: dict[str, Any] = field(default_factory=dict)
    predictions: Mapping[int, Shaped[np.ndarray, "H W"]] = field(default_factory=dict)
