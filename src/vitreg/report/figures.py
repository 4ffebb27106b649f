"""Pictures for papers, READMEs and slides: attention overlays and the norm maps of a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from vitreg.report.examples import ExampleMaps, check_examples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

OUTLIER = "#ff5a3c"
QUIET = "#59616b"
TITLE = {"fontsize": 12, "fontweight": "bold"}
CELL = 1.25  # inches, the width of one head


def overlay(
    photo: UInt8[np.ndarray, "H W 3"], attention: Float[np.ndarray, "h w"], *, highest: float | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Lay an attention map over a photograph, patches as sharp rectangles.

    The colour goes with the square root of the attention: a few patches often hold most of it, and on a linear scale
    everything else would be black.

    Args:
        photo: The photograph; the h x w patches tile it.
        attention: What each patch receives, not negative.
        highest: The attention of the brightest colour, to compare several maps; the map's own maximum by default.
    """
    import matplotlib

    highest = float(attention.max()) if highest is None else highest
    heat = np.sqrt(np.clip(attention / (highest or 1.0), 0, 1))
    rows, columns = (np.arange(n) * m // n for n, m in zip(photo.shape[:2], attention.shape, strict=True))
    colour = matplotlib.colormaps["magma"](heat[rows[:, None], columns])[..., :3]
    # A grey, half dark photograph: its own colours would be read as heat.
    grey = photo @ np.array([0.299, 0.587, 0.114]) / 255
    return (255 * (0.4 * grey[..., None] + 0.6 * colour)).round().astype(np.uint8)


def attention_figure(
    photo: UInt8[np.ndarray, "H W 3"], attention: Float[np.ndarray, "heads h w"], *, title: str, path: Path
) -> Path:
    """Write a PNG of a photograph, its attention averaged over heads, and the attention of every head.

    All maps share one colour scale; the colour bar gives the share of a query's attention that a patch receives.

    Returns:
        `path`.
    """
    heads, highest = len(attention), float(attention.max())
    # Two large pictures, then the heads at half their size: side by side over two rows, or stacked over four.
    rows = 2 if heads <= 8 else 4
    large, small = 2 if rows == 4 else 4, math.ceil(heads / rows)
    height = CELL * photo.shape[0] / photo.shape[1] + 0.24
    figure = _figure(CELL * (large + small) + 0.9, height * rows, [(title, 0.1, TITLE)])
    grid = figure.add_gridspec(rows, large + small)
    mean = overlay(photo, attention.mean(axis=0), highest=highest)
    panels = [
        (grid[:2, :2], photo, "photograph", 9),
        (grid[2:, :2] if rows == 4 else grid[:, 2:4], mean, f"mean of {heads} heads", 9),
    ]
    for i, head in enumerate(attention):
        picture = overlay(photo, head, highest=highest)
        panels.append((grid[i // small, large + i % small], picture, f"head {i}", 8))
    for place, picture, label, size in panels:
        axes = figure.add_subplot(place)
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(label, fontsize=size, color=QUIET, pad=3)
        axes.set_axis_off()
    _colour_bar(figure, figure.axes, _root_scale(highest), "magma", "attention a patch receives", percent=True)
    return _write(figure, path)


def diagnosis_figure(summary: dict, examples: Sequence[ExampleMaps], path: Path, max_examples: int = 4) -> Path:
    """Write a PNG of the diagnosis: photographs, norm maps and class-token attention after the reported block.

    Args:
        summary: `Diagnosis.to_dict()`.
        examples: The images; the first `max_examples` are drawn, at least one is needed.
        path: The file to write; its folder is made.
        max_examples: Number of columns at most.

    Returns:
        `path`.

    Raises:
        ValueError: No example, or one that does not fit the summary.
    """
    from matplotlib.colors import LogNorm

    if not examples:
        raise ValueError("diagnosis_figure needs at least one example, got none.")
    check_examples(summary, examples)
    shown, block, threshold = examples[:max_examples], summary["block"], summary["threshold"]
    norms = np.stack([example.norms[block] for example in shown])
    lowest = max(norms.min(), norms.max() * 1e-4, 1e-12)
    rows = [("patch norm", norms, LogNorm(lowest, max(norms.max(), lowest * 1.01)), "viridis")]
    query = next(iter(shown[0].attention), None)
    if query is not None:
        attention = np.stack([example.attention[query][block] for example in shown])
        rows.append((f"attention of\n{query}", attention, _root_scale(attention.max()), "magma"))

    height, width = shown[0].photo.shape[:2]
    inches = 2.0 * height / width * (1 + len(rows)) + 0.25
    figure = _figure(2.0 * len(shown) + 1.35, inches, _headline(summary))
    axes = figure.subplots(1 + len(rows), len(shown), squeeze=False)
    for axis, example in zip(axes[0], shown, strict=True):
        axis.imshow(example.photo)
        axis.set_title(_shorten(example.name), fontsize=8.5, color=QUIET, pad=4, parse_math=False)
    for line, (_, maps, scale, colours) in zip(axes[1:], rows, strict=True):
        for axis, values, norm in zip(line, maps, norms, strict=True):
            axis.imshow(values, cmap=colours, norm=scale, extent=(0, width, height, 0), interpolation="nearest")
            if threshold is not None:
                _outline(axis, norm > threshold, width, height)
    for line, label in zip(axes, ("photograph", *(row[0] for row in rows)), strict=True):
        line[0].set_ylabel(label, fontsize=9.5)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    bar = _colour_bar(figure, axes[1], rows[0][2], "viridis", "norm (log scale)")
    if threshold is not None:
        bar.ax.axhline(threshold, color=OUTLIER, linewidth=2)
    if query is not None:
        _colour_bar(figure, axes[2], rows[1][2], "magma", "share of attention", percent=True)
    return _write(figure, path)


def _figure(width: float, height: float, lines: list[tuple[str, float, dict]]) -> Figure:
    """A figure with `height` inches for pictures and, above them, lines of text at inches from the top."""
    from matplotlib.figure import Figure

    head = lines[-1][1] + 0.3
    figure = Figure(figsize=(width, height + head), dpi=160, layout="constrained")
    share = 1 - head / (height + head)
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.03, wspace=0.01, hspace=0.01, rect=(0, 0, 1, share))
    for text, inches, style in lines:
        y = 1 - inches / (height + head)
        figure.text(0.08 / width, y, text, va="top", parse_math=False, **style)
    return figure


def _headline(summary: dict) -> list[tuple[str, float, dict]]:
    reported, block = summary["blocks"][summary["block"]], summary["block"]
    median, largest = reported["median"], reported["max"]
    title = f"{summary['model']['name']}: "
    if summary["has_artifacts"]:
        title += f"{100 * summary['outlier_fraction']:.1f} % of patches are artifacts"
        detail = f"Outlined: norm above {summary['threshold']:.0f}. "
    else:
        title += "no artifacts"
        detail = ""
    detail += f"After block {block} the median norm is {median:.1f}, the largest {largest:.0f}."
    return [(title, 0.1, TITLE), (detail, 0.37, {"fontsize": 9.5, "color": QUIET})]


def _root_scale(highest: float) -> Normalize:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, highest or 1.0)


def _colour_bar(figure: Figure, axes: Sequence[Axes], scale: Normalize, colours: str, label: str, percent: bool = False) -> Colorbar:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FuncFormatter, NullLocator

    bar = figure.colorbar(ScalarMappable(scale, colours), ax=list(axes), aspect=18, pad=0.015, fraction=0.03)
    low, high = scale.vmin, scale.vmax
    ticks = [low + (high - low) * t**2 for t in (0, 0.5, 0.75, 1)] if percent else np.geomspace(low, high, 4)
    bar.set_ticks(ticks)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.2g} %" if percent else f"{v:.3g}"))
    bar.ax.tick_params(labelsize=8, colors=QUIET, length=2)
    bar.set_label(label, fontsize=8.5, color=QUIET)
    bar.outline.set_visible(False)
    return bar


def _outline(axis: Axes, outliers: np.ndarray, width: int, height: int) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    h, w = height / outliers.shape[0], width / outliers.shape[1]
    boxes = [Rectangle((column * w, row * h), w, h) for row, column in np.argwhere(outliers)]
    axis.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=OUTLIER, linewidth=1.3, clip_on=False))


def _shorten(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"{name[: most - 9]}…{name[-8:]}"


def _write(figure: Figure, path: Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
