"""Several models on the same photographs, side by side, as a page and as an image: the report of `vitreg demo`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from vitreg.report.colors import OUTLIER, ColorScale, attention_scale, css_gradient, norm_scale
from vitreg.report.data_urls import jpeg_url, png_url
from vitreg.report.page import write_page
from vitreg.report.sheet import GAP, MARGIN, QUIET, TITLE, Sheet, outline, outline_patches

PHOTO = 320, 80
"""Largest side in pixels, and quality, of a photograph in the page."""
# Inches of the image.
SIDE, LABELS, BAR = 1.15, 0.26, 0.95
ACROSS = 2


@dataclass(frozen=True)
class Panels:
    """What one model makes of one photograph, which h x w patches tile.

    Attributes:
        box: that of the object: first column and row of patches, and those after its last.
        norms: of the patches after the block that is shown.
        outliers: which of them are.
        attention: the share that each patch receives.
    """

    box: tuple[int, int, int, int]
    norms: Float[np.ndarray, "h w"]
    outliers: Bool[np.ndarray, "h w"]
    attention: Float[np.ndarray, "h w"]


@dataclass(frozen=True)
class Photograph:
    """A photograph, and what every model makes of it, in the order of the summary's `models`."""

    name: str
    photo: UInt8[np.ndarray, "H W 3"]
    panels: tuple[Panels, ...]

    def scales(self) -> tuple[ColorScale, ColorScale]:
        """Of norms and of attention, the same for every model; attention may be above it where outliers receive it."""
        shares = [panels.attention[~panels.outliers] for panels in self.panels]
        highest = max((float(share.max()) for share in shares if share.size), default=1.0)
        norms = norm_scale(np.stack([panels.norms for panels in self.panels]))
        return norms, attention_scale(highest, "share received", brightness=(0.0, 0.5, 1.0))


def write_side_by_side(summary: dict, photographs: Sequence[Photograph], path: Path) -> Path:
    """Write a self-contained HTML page; it appears whole or not at all.

    Args:
        summary: format "vitreg-demo/1".
        photographs: what is shown; of each, all models share one color scale for norms and one for attention.
        path: the file to write; its folder is made.

    Raises:
        ValueError: a photograph has not one set of panels for each model, or a value is NaN or infinite.
    """
    _check(summary, photographs)
    return write_page("demo", path, s=summary, cards=[_card(photograph) for photograph in photographs])


def _check(summary: dict, photographs: Sequence[Photograph]) -> None:
    """Raise `ValueError` unless every photograph has finite maps of the summary's grid for each of its models."""
    for photograph in photographs:
        if len(photograph.panels) != len(summary["models"]):
            raise ValueError(
                f"{photograph.name} has the maps of {len(photograph.panels)} models, but the summary names "
                f"{len(summary['models'])}; give one for each"
            )
        for panels in photograph.panels:
            for values in (panels.norms, panels.attention):
                if list(values.shape) != list(summary["grid"]) or not np.isfinite(values).all():
                    raise ValueError(
                        f"{photograph.name} has a map of {list(values.shape)} patches or with NaN; expected finite "
                        f"values for {list(summary['grid'])}"
                    )


def _card(photograph: Photograph) -> dict[str, Any]:
    """What the template draws of a photograph; lengths are in patches."""
    norms, attention = photograph.scales()
    rows, columns = photograph.panels[0].norms.shape
    return {
        "name": photograph.name,
        "columns": columns,
        "rows": rows,
        "photo": jpeg_url(photograph.photo, *PHOTO),
        "norm_bar": {"colors": css_gradient(norms.colors), "ticks": norms.tick_labels},
        "attention_bar": {"colors": css_gradient(attention.colors), "ticks": attention.tick_labels},
        "models": [
            {
                "box": panels.box,
                "norms": png_url(norms.paint(panels.norms)),
                "largest": float(panels.norms.max()),
                "attention": png_url(attention.paint(panels.attention)),
                "most": float(panels.attention.max()),
                "num_outliers": int(panels.outliers.sum()),
                "outline": "".join(f"M{column} {row}h1v1h-1z" for row, column in np.argwhere(panels.outliers)),
            }
            for panels in photograph.panels
        ],
    }


def side_by_side_figure(summary: dict, photographs: Sequence[Photograph], path: Path, max_photographs: int = 4) -> Path:
    """Write a PNG of several models on the same photographs: boxes, norms and attention.

    Args:
        summary: format "vitreg-demo/1".
        photographs: the first `max_photographs` are drawn, two beside each other; of each, all models share one
            color scale for norms and one for attention.
        path: the file to write; its folder is made.
        max_photographs: how many at most.

    Raises:
        ValueError: as `write_side_by_side`.
    """
    _check(summary, photographs)
    shown = photographs[:max_photographs]
    heads = ["\n".join(textwrap.wrap(model["what"], 20)) for model in summary["models"]]
    tall = SIDE * summary["grid"][0] / summary["grid"][1]
    head = 0.3 + 0.13 * max(text.count("\n") + 1 for text in heads)
    width = LABELS + len(heads) * (SIDE + GAP) + BAR
    height = head + 3 * (tall + GAP) + 0.1
    across = min(ACROSS, len(shown))
    title = textwrap.wrap(summary["title"], int(9.5 * across * width))
    top = 0.5 + 0.21 * len(title)
    sheet = Sheet(2 * MARGIN + across * width, top + -(-len(shown) // across) * height)
    sheet.text("\n".join(title), MARGIN, 0.12, **TITLE)
    said = (
        f"Norms, and attention of {summary['attention_from']}, in block {summary['block']}. "
        f"Box: the object that LOST discovers. Outlined: outliers, whose attention may lie above the scale."
    )
    sheet.text(said, MARGIN, top - 0.32, fontsize=9.5, color=QUIET)
    for i, photograph in enumerate(shown):
        x, y = MARGIN + i % across * width, top + i // across * height
        sheet.text(photograph.name, x + LABELS, y, width - LABELS - BAR, fontsize=9.5, fontweight="bold")
        for column, text in enumerate(heads):
            place = x + LABELS + column * (SIDE + GAP), y + head - 0.05
            sheet.text(text, *place, SIDE, fontsize=8, color=QUIET, va="bottom", linespacing=1.1)
        _draw(sheet, photograph, x, y + head, tall)
    return sheet.write(path)


def _draw(sheet: Sheet, photograph: Photograph, x: float, y: float, tall: float) -> None:
    """Three rows: the photograph with the boxes, norms, attention; a column for every model."""
    left, step = x + LABELS, tall + GAP
    right = left + len(photograph.panels) * (SIDE + GAP)
    scales = photograph.scales()
    for row, label in enumerate(("object", "patch norm", "attention")):
        style = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 8.5}
        sheet.text(label, x + 0.12, y + row * step + tall / 2, **style)
    rows, columns = photograph.panels[0].norms.shape
    height, width = photograph.photo.shape[0] / rows, photograph.photo.shape[1] / columns  # of a patch, in pixels
    for i, panels in enumerate(photograph.panels):
        place = left + i * (SIDE + GAP)
        axes = sheet.image(photograph.photo, place, y, SIDE, tall)
        x0, y0, x1, y1 = panels.box
        outline(axes, (x0 * width, y0 * height, x1 * width, y1 * height), edgecolor=OUTLIER, linewidth=1.6)
        for row, (scale, values) in enumerate(zip(scales, (panels.norms, panels.attention), strict=True), start=1):
            outline_patches(sheet.image(values, place, y + row * step, SIDE, tall, scale=scale), panels.outliers)
    for row, scale in enumerate(scales, start=1):
        sheet.color_bar(right, y + row * step, tall, scale)
