"""Values in colors: one scale for a map, for the bar beside it and for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from vitreg.common.words import number
from vitreg.common.words import percent as in_percent

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize

OUTLIER = "#ff5a3c"


@dataclass(frozen=True)
class ColorScale:
    """What values are drawn with.

    Attributes:
        norm: takes values to 0..1.
        colors: of 0..1, a colormap of matplotlib or its name.
        ticks: the values that the bar names.
        label: of the bar.
        percent: the values are shares.
        mark: a value to draw a line at, across the bar.
    """

    norm: Normalize
    colors: str | Colormap
    ticks: Sequence[float]
    label: str
    percent: bool = False
    mark: float | None = None

    @property
    def tick_labels(self) -> list[str]:
        """The ticks in words."""
        return [in_percent(tick) if self.percent else number(tick) for tick in self.ticks]

    def paint(self, values: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
        """A pixel for every value."""
        import matplotlib

        return matplotlib.colormaps.get_cmap(self.colors)(self.norm(values), bytes=True)[..., :3]


def norm_scale(norms: Float[np.ndarray, "*shape"], threshold: float | None = None) -> ColorScale:
    """Logarithmic, from the smallest to the largest norm; it reaches the threshold even where the norms do not."""
    from matplotlib.colors import LogNorm

    high = max(float(norms.max()), threshold or 0.0)
    low = max(float(norms.min()), high * 1e-4, 1e-12)
    high = max(high, low * 1.01)
    ticks = sorted({low, math.sqrt(low * high) if threshold is None else threshold, high})
    return ColorScale(LogNorm(low, high), "viridis", ticks, "norm (log scale)", mark=threshold)


def attention_scale(highest: float, label: str, brightness: Sequence[float] = (0.0, 0.5, 0.75, 1.0)) -> ColorScale:
    """That of the square root, from zero to the highest share: a few patches often hold most of the attention.

    Args:
        highest: of the shares.
        label: of the bar.
        brightness: of the ticks, from 0 to 1.
    """
    from matplotlib.colors import PowerNorm

    ticks = [highest * t**2 for t in brightness]
    return ColorScale(PowerNorm(0.5, 0, highest or 1.0), "magma", ticks, label, percent=True)


@cache
def color_table(name: str) -> UInt8[np.ndarray, "256 3"]:
    """The colors of a colormap of matplotlib."""
    import matplotlib

    return matplotlib.colormaps[name](range(256), bytes=True)[:, :3]


def css_gradient(colors: str | Colormap) -> str:
    """The stops of a CSS gradient of the same colors."""
    import matplotlib

    stops = matplotlib.colormaps.get_cmap(colors)(np.linspace(0, 1, 17), bytes=True)
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b, _ in stops)
