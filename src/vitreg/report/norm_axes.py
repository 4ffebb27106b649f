"""Distributions of norms side by side: one column a block, a training step or a model, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreg.common.words import percent
from vitreg.report.colors import OUTLIER, ColorScale
from vitreg.report.sheet import QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

REGISTER = "#0b7a3b"
MEDIAN = "#ffffff"
DASHES = (0, (3, 2))

Block = Mapping[str, Any]
"""One block of one diagnosis: histogram, threshold, quantiles around the median, register norms."""


def colors(outliers: bool = False) -> Colormap:
    """White where there is no patch; the lightest color is one that can be told from white."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["Oranges" if outliers else "Blues"](np.linspace(0.2, 0.95, 256)))


def share_scale(blocks: Sequence[Block]) -> ColorScale:
    """Logarithmic, from a single patch to the fullest bin: outliers are few."""
    from matplotlib.colors import LogNorm

    shares = np.concatenate([_shares(block) for block in blocks])
    low, high = float(shares[shares > 0].min()), float(shares.max())
    high = max(high, 1.01 * low)
    return ColorScale(LogNorm(low, high), colors(), log_ticks(low, high), "share of patches in a bin", percent=True)


def norm_limits(blocks: Sequence[Block]) -> tuple[float, float]:
    """From the smallest to the largest norm, with room for a word above.

    Registers begin near zero and may leave at the bottom, or patches would be squeezed at the top.
    """
    patches = [edge for block in blocks for edge in block["histogram"]["edges"]]
    registers = [norm for block in blocks for norm in block["register_norms"] or ()]
    low = max(min(patches + registers), min(patches) / 4)
    high = max(patches + registers)
    room = max(high / low, 2.0)
    return low / room**0.04, high * room**0.16


def draw_column(axes: Axes, left: float, right: float, block: Block, scale: ColorScale) -> None:
    """The distribution of the patch norms after one block, its median, and outliers in their own color."""
    edges, shares = np.array(block["histogram"]["edges"]), _shares(block)
    # A threshold lies on an edge, but both are rounded.
    split = len(shares)
    if block["threshold"] is not None:
        split = int(np.searchsorted(edges[:-1], block["threshold"] * 0.999))
        axes.plot([left, right], [block["threshold"]] * 2, color=OUTLIER, linewidth=1.1, solid_capstyle="butt")
    for outliers, part in ((False, slice(0, split)), (True, slice(split, len(shares)))):
        if shares[part].any():
            cells = np.ma.masked_equal(shares[part], 0)[:, None]
            corners = edges[part.start : part.stop + 1]
            axes.pcolormesh([left, right], corners, cells, norm=scale.norm, cmap=colors(outliers), zorder=0.5)
    median = block["quantiles"][len(block["quantiles"]) // 2]
    axes.plot([left, right], [median] * 2, color=MEDIAN, linewidth=1.2, solid_capstyle="butt")


def draw_registers(axes: Axes, places: Sequence[int], blocks: Sequence[Block]) -> None:
    """The norm of every register, joined from column to column."""
    norms = [block["register_norms"] or () for block in blocks]
    for row in zip(*norms, strict=True):
        axes.plot(places, row, color=REGISTER, linewidth=0.9, marker="o", markersize=2.4)


def mark(axes: Axes, place: float, text: str = "") -> None:
    """A line where something begins, and words beside it at the top, on the side that has room."""
    low, high = axes.get_xlim()
    late = place > (low + high) / 2
    axes.axvline(place, color=OUTLIER, linewidth=1, linestyle=DASHES)
    offset, side = (-4, "right") if late else (4, "left")
    style = {"ha": side, "va": "top", "fontsize": 8, "color": OUTLIER}
    axes.annotate(text, (place, 1), (offset, -1), ("data", "axes fraction"), "offset points", **style)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers, at least three however short the axis is."""
    from matplotlib.ticker import MaxNLocator

    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high))
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = sorted(t for t in np.outer(digits, powers).flatten().tolist() if low <= t <= high)
        if len(ticks) >= 3:
            return ticks
    return [float(t) for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]


def norm_axis(axes: Axes, limits: tuple[float, float], labeled: bool) -> None:
    """A logarithmic axis of norms."""
    from matplotlib.ticker import NullLocator

    axes.set_yscale("log")
    axes.set_ylim(limits)
    axes.yaxis.set_minor_locator(NullLocator())
    ticks = log_ticks(*limits)
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks] if labeled else [""] * len(ticks))
    if labeled:
        _label(axes, "patch norm")


def share_axis(axes: Axes, most: float, labeled: bool) -> None:
    """The share of the patches that are outliers, from zero to the largest."""
    top = max(most, 0.01)
    axes.set_ylim(0, 1.1 * top)
    axes.set_yticks([0, top], ["0", percent(top)] if labeled else ["", ""])
    if labeled:
        _label(axes, "outliers")


def _label(axes: Axes, text: str) -> None:
    """Beside the axis, at the same distance whatever its numbers are."""
    style = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 8.5, "color": QUIET}
    axes.annotate(text, (0, 0.5), (-39, 0), "axes fraction", "offset points", **style)


def _shares(block: Block) -> np.ndarray:
    counts = np.array(block["histogram"]["counts"], float)
    return counts / counts.sum()
