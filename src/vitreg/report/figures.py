"""Pictures for papers, READMEs and slides: attention overlays and the norm maps of a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from vitreg.report.examples import ExampleMaps, check_examples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

OUTLIER = "#ff5a3c"
QUIET = "#59616b"
TITLE = {"fontsize": 12, "fontweight": "bold"}
# Inches.
GAP = 0.09
MARGIN = 0.12


def overlay(
    photo: UInt8[np.ndarray, "H W 3"], attention: Float[np.ndarray, "h w"], *, highest: float | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Lay an attention map over a photograph, patches as sharp rectangles.

    The colour goes with the square root of the attention: a few patches often hold most of it, and on a
    linear scale everything else would be black.

    Args:
        photo: The photograph; the h x w patches tile it.
        attention: What each patch receives, not negative.
        highest: The attention of the brightest colour, to compare several maps; by default the
            map's own maximum.
    """
    import matplotlib

    highest = float(attention.max()) if highest is None else highest
    rows, columns = (np.arange(n) * m // n for n, m in zip(photo.shape[:2], attention.shape, strict=True))
    heat = np.sqrt(np.clip(attention / (highest or 1.0), 0, 1))[rows[:, None], columns]
    colour = matplotlib.colormaps["magma"](heat)[..., :3]
    # Grey, since the photograph's own colours would be read as heat, and less of it where there is more to
    # show, so that the brightest patches have the colour that the colour bar gives them.
    grey = (photo @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    strength = 0.45 + 0.5 * heat[..., None]
    return (255 * ((1 - strength) * grey + strength * colour)).round().astype(np.uint8)


def attention_figure(
    photo: UInt8[np.ndarray, "H W 3"], attention: Float[np.ndarray, "heads h w"], *, title: str, path: Path
) -> Path:
    """Write a PNG of a photograph, its attention averaged over heads, and the attention of every head.

    All maps share one colour scale, the share of a query's attention that a patch receives.

    Returns:
        `path`.
    """
    heads, highest = len(attention), float(attention.max())
    aspect = photo.shape[0] / photo.shape[1]
    # Two large pictures beside the heads: next to each other over two rows of heads, or stacked over four.
    stacked = heads > 8
    rows = 4 if stacked else 2
    columns = math.ceil(heads / rows)
    small, label = 1.25, 0.24
    step_x, step_y = small + GAP, small * aspect + label
    # A large picture is as tall as two small ones with the label between them.
    tall = small * aspect + step_y
    large = tall / aspect
    left = MARGIN + (large + GAP) * (1 if stacked else 2)
    top = 0.35
    sheet = _Sheet(left + columns * step_x + 0.85, top + rows * step_y + MARGIN)
    sheet.text(title, MARGIN, 0.1, **TITLE)
    mean = overlay(photo, attention.mean(axis=0), highest=highest)
    second = (MARGIN, top + label + 2 * step_y) if stacked else (MARGIN + large + GAP, top + label)
    for picture, (x, y), name in (
        (photo, (MARGIN, top + label), "photograph"),
        (mean, second, f"mean of {heads} heads"),
    ):
        sheet.picture(picture, x, y, large, tall, name)
    for i, head in enumerate(attention):
        x, y = left + i % columns * step_x, top + label + i // columns * step_y
        sheet.picture(overlay(photo, head, highest=highest), x, y, small, small * aspect, f"head {i}")
    ticks = [highest * t**2 for t in (0, 0.5, 0.75, 1)]
    bar = left + columns * step_x, top + label, rows * step_y - label
    sheet.colour_bar(*bar, _root_scale(highest), "magma", ticks, "attention a patch receives", percent=True)
    return sheet.write(path)


def diagnosis_figure(summary: dict, examples: Sequence[ExampleMaps], path: Path, max_examples: int = 4) -> Path:
    """Write a PNG of the diagnosis: photographs, norm maps and class-token attention at the reported block.

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
    low = max(float(norms.min()), float(norms.max()) * 1e-4, 1e-12)
    high = max(float(norms.max()), low * 1.01)
    ticks = [low, math.sqrt(low * high) if threshold is None else threshold, high]
    rows: list[tuple[str, np.ndarray, Normalize, str, list[float], str]]
    rows = [("patch norm", norms, LogNorm(low, high), "viridis", ticks, "norm (log scale)")]
    query = next(iter(shown[0].attention), None)
    if query is not None:
        attention = np.stack([example.attention[query][block] for example in shown])
        most = float(attention.max())
        ticks = [most * t**2 for t in (0, 0.5, 0.75, 1)]
        rows.append((f"attention of\n{query}", attention, _root_scale(most), "magma", ticks, "attention received"))

    width = 2.0
    height = width * shown[0].photo.shape[0] / shown[0].photo.shape[1]
    left, top, step = 0.5, 0.88, height + GAP
    right = left + len(shown) * (width + GAP)
    title, detail = _headline(summary)
    # One narrow column must still hold the headline.
    sheet = _Sheet(max(right + 0.95, 7.0), top + (1 + len(rows)) * step + MARGIN - GAP)
    sheet.text(title, MARGIN, 0.12, **TITLE)
    sheet.text(detail, MARGIN, 0.4, fontsize=9.5, color=QUIET)
    for line, label in enumerate(("photograph", *(row[0] for row in rows))):
        style = {"rotation": 90, "ha": "center", "fontsize": 9.5, "linespacing": 1.1}
        sheet.text(label, left - 0.22, top + line * step + height / 2, **style | {"va": "center"})
    for i, example in enumerate(shown):
        x = left + i * (width + GAP)
        sheet.picture(example.photo, x, top, width, height, _shorten(example.name))
        for line, (_, maps, scale, colours, _, _) in enumerate(rows, start=1):
            axes = sheet.picture(maps[i], x, top + line * step, width, height, scale=scale, colours=colours)
            if threshold is not None:
                _outline(axes, norms[i] >= threshold)
    for line, (_, _, scale, colours, ticks, label) in enumerate(rows, start=1):
        place = right, top + line * step, height
        bar = sheet.colour_bar(*place, scale, colours, ticks, label, percent=line == 2)
        if line == 1 and threshold is not None:
            bar.axhline(threshold, color=OUTLIER, linewidth=2)
    return sheet.write(path)


class _Sheet:
    """A figure laid out in inches from the top left corner, so that rows and columns line up exactly."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=160)

    def text(self, text: str, x: float, y: float, **style: Any) -> None:
        style = {"va": "top", "parse_math": False} | style
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)

    def _axes(self, x: float, y: float, width: float, height: float) -> Axes:
        corner = x / self.width, 1 - (y + height) / self.height
        axes = self.figure.add_axes((*corner, width / self.width, height / self.height))
        axes.spines[:].set_visible(False)
        return axes

    def picture(
        self,
        picture: np.ndarray,
        x: float,
        y: float,
        width: float,
        height: float,
        label: str = "",
        scale: Normalize | None = None,
        colours: str | None = None,
    ) -> Axes:
        axes = self._axes(x, y, width, height)
        axes.imshow(picture, norm=scale, cmap=colours, interpolation="nearest", aspect="auto")
        axes.set_title(label, fontsize=8.5, color=QUIET, pad=3, parse_math=False)
        axes.set(xticks=[], yticks=[])
        return axes

    def colour_bar(
        self,
        x: float,
        y: float,
        height: float,
        scale: Normalize,
        colours: str,
        ticks: Sequence[float],
        label: str,
        percent: bool,
    ) -> Axes:
        from matplotlib.cm import ScalarMappable

        # Shorter than what it stands beside, so that the numbers at its ends keep off its neighbour's.
        axes = self._axes(x, y + 0.06, 0.11, height - 0.12)
        bar = self.figure.colorbar(ScalarMappable(scale, colours), cax=axes)
        bar.set_ticks(ticks, labels=[f"{100 * t:.2g} %" if percent else f"{t:.3g}" for t in ticks], minor=False)
        bar.minorticks_off()
        bar.ax.tick_params(labelsize=8, labelcolor=QUIET, color=QUIET, length=2)
        bar.set_label(label, fontsize=8.5, color=QUIET)
        bar.outline.set_visible(False)
        return axes

    def write(self, path: Path) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path)
        return path


def _headline(summary: dict) -> tuple[str, str]:
    reported, block, name = summary["blocks"][summary["block"]], summary["block"], summary["model"]["name"]
    median, largest = reported["median"], reported["max"]
    norms = f"After block {block} the median patch norm is {median:.1f}, the largest {largest:.0f}."
    if not summary["has_artifacts"]:
        return f"{name}: no artifacts", norms
    share = f"{100 * summary['outlier_fraction']:.1f} %"
    return (
        f"{name}: {share} of patches are artifacts",
        f"{norms} Outlined: {summary['threshold']:.0f} or more.",
    )


def _root_scale(highest: float) -> Normalize:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, highest or 1.0)


def _outline(axes: Axes, outliers: np.ndarray) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column in np.argwhere(outliers)]
    axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=OUTLIER, linewidth=1.3, clip_on=False))


def _shorten(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 9]}…{name[-8:]}"
