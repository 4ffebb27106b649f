"""Are there artifacts, are there none, or are there too few patches to tell?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from vitreg.artifacts.histogram import BINS_PER_STEP, LogAxis
from vitreg.artifacts.threshold import two_modes

EVIDENT = 5.0
"""An upper mode with a median of so many medians counts in a single image."""

ENOUGH_IMAGES = 100
"""From so many on a nearer mode counts too. Patches of one image resemble each other: a few bright ones look like a
mode until other images fill the valley (`docs/diagnosis.md` has the rates)."""

MULTIPLES = (2, 4, 8, 16, 32, 64)
"""Of the images, which are tried to find out how many would do."""


@dataclass(frozen=True)
class Undecided:
    """What looks like artifacts, but is too little to tell.

    Attributes:
        block: after which it was seen.
        num_patches: how many patches stand out.
        ratio: their median norm as a multiple of the median of all.
        num_images_needed: with so many images like these there would be enough.
    """

    block: int
    num_patches: int
    ratio: float
    num_images_needed: int


@dataclass(frozen=True)
class Decision:
    """Of each block, the step of the axis from which norms count as outliers; None of all blocks where undecided."""

    steps: list[int | None]
    undecided: Undecided | None = None


def decide(axis: LogAxis, counts: Int[np.ndarray, "L bins"], num_images: int) -> Decision:
    """Judge the norms after every block by `two_modes`.

    There are artifacts where a block has two modes, and the upper one is `EVIDENT` or the images are `ENOUGH_IMAGES`.
    Otherwise it is asked whether there would be if more images had the same norms. If so, it cannot be told from these.
    """
    steps = [two_modes(axis, block) for block in counts]
    if _strongest(axis, counts, steps, num_images) is not None:
        return Decision(steps)
    nothing: list[int | None] = [None] * len(counts)
    if not any(_suspicious(axis, *pair) for pair in zip(counts, steps, strict=True)):
        return Decision(nothing)
    for multiple in MULTIPLES:
        more = counts * multiple
        steps = [two_modes(axis, block) for block in more]
        block = _strongest(axis, more, steps, num_images * multiple)
        if block is not None:
            step = steps[block]
            assert step is not None
            above = int(counts[block, step * BINS_PER_STEP :].sum())
            return Decision(nothing, Undecided(block, above, _ratio(axis, counts[block], step), num_images * multiple))
    return Decision(nothing)


def _strongest(
    axis: LogAxis, counts: Int[np.ndarray, "L bins"], steps: Sequence[int | None], num_images: int
) -> int | None:
    """The block whose upper mode is farthest from its median; None where no mode counts."""
    ratios = {i: _ratio(axis, counts[i], step) for i, step in enumerate(steps) if step is not None}
    best = max(ratios, key=lambda i: ratios[i], default=None)
    return best if best is not None and (num_images >= ENOUGH_IMAGES or ratios[best] >= EVIDENT) else None


def _suspicious(axis: LogAxis, counts: Int[np.ndarray, " bins"], step: int | None) -> bool:
    """Whether there is a mode, or a patch of more than `EVIDENT` medians."""
    median = axis.quantile(counts, 0.5)
    return step is not None or bool(median and counts[axis.step_of(EVIDENT * median) * BINS_PER_STEP :].any())


def _ratio(axis: LogAxis, counts: Int[np.ndarray, " bins"], step: int) -> float:
    """The median from a step on, as a multiple of the median of all."""
    upper = counts.copy()
    upper[: step * BINS_PER_STEP] = 0
    return axis.quantile(upper, 0.5) / axis.quantile(counts, 0.5)
