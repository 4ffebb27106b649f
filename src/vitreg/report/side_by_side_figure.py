"""Several models on the same photographs, side by side, as an image."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vitreg.common.words import counted, percent
from vitreg.report.colors import OUTLIER, ColorScale
from vitreg.report.sheet import GAP, MARGIN, QUIET, TITLE, Sheet, outline, outline_patches
from vitreg.report.side_by_side import Panels, Photograph, check_panels, shared_scales

# Inches.
SIDE, LABELS, BAR, BETWEEN = 1.15, 0.26, 0.82, 0.12
LINE = 0.17

Place = tuple[float, float, float, float]
"""Left, top, width and height in the sheet."""


def side_by_side_figure(summary: dict, photographs: Sequence[Photograph], path: Path, max_photographs: int = 4) -> Path:
    """Write a PNG of several models on the same photographs: a row each, and in it boxes, norms and attention of all.

    Args:
        summary: format "vitreg-demo/2".
        photographs: the first `max_photographs` are drawn; all share one color scale for norms and one for attention.
        path: the file to write; its folder is made.
        max_photographs: how many at most.

    Raises:
        ValueError: as `write_side_by_side`.
    """
    check_panels(summary, photographs)
    shown, models = photographs[:max_photographs], summary["models"]
    norms, attention = shared_scales([panels for photograph in shown for panels in photograph.panels])
    groups: list[tuple[str, list[str], Callable[[Sheet, Photograph, Panels, Place], None], ColorScale | None]] = [
        ("Object (LOST)", [""] * len(models), _draw_box, None),
        (
            "Patch norm",
            [f"{percent(model['outlier_fraction'])} outliers" for model in models],
            lambda sheet, _, panels, place: _draw_map(sheet, panels.norms, panels.outliers, place, norms),
            norms,
        ),
        (
            f"Attention of {summary['attention_from']}",
            [f"{percent(model['attention_on_outliers'])} on outliers" for model in models],
            lambda sheet, _, panels, place: _draw_map(sheet, panels.attention, panels.outliers, place, attention),
            attention,
        ),
    ]
    tall, across = SIDE * summary["grid"][0] / summary["grid"][1], len(models) * (SIDE + GAP)
    width = 2 * MARGIN + LABELS + 3 * across + BETWEEN + 2 * BAR
    title = textwrap.wrap(summary["title"], int(10 * width))
    said = textwrap.wrap(
        f"Norms, and attention, of block {summary['block']}. Outlined: outliers, whose attention may lie above the "
        f"scale. Shares are means over {counted(summary['num_images'], 'photograph')}.",
        int(14 * width),
    )
    heads = [textwrap.wrap(title, max(16, int(11 * (across + BAR)))) for title, *_ in groups]
    whats = [textwrap.wrap(model["what"], 20) for model in models]

    below_title = MARGIN + 0.21 * len(title) + 0.05
    top = below_title + (len(said) + 1) * LINE
    first = top + (max(map(len, heads)) + max(map(len, whats)) + 1) * LINE + 0.14
    sheet = Sheet(width, first + len(shown) * (tall + GAP) - GAP + MARGIN)
    sheet.text("\n".join(title), MARGIN, MARGIN, **TITLE)
    sheet.text("\n".join(said), MARGIN, below_title, fontsize=9, color=QUIET)
    rows = [first + row * (tall + GAP) for row in range(len(shown))]
    for photograph, y in zip(shown, rows, strict=True):
        style = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 8.5, "color": QUIET}
        sheet.text(photograph.name, MARGIN + 0.08, y + tall / 2, **style)
    left = MARGIN + LABELS
    for (_, figures, draw, scale), head in zip(groups, heads, strict=True):
        for line, words in enumerate(head, start=1):
            sheet.text(words, left, top + line * LINE - 0.05, fontsize=10, fontweight="bold", va="baseline")
        for m, (what, figure) in enumerate(zip(whats, figures, strict=True)):
            x = left + m * (SIDE + GAP)
            for line, words in enumerate(reversed(what), start=1):
                sheet.text(words, x, first - 0.08 - line * LINE, SIDE, fontsize=8.5, va="baseline")
            sheet.text(figure, x, first - 0.08, SIDE, fontsize=8.5, color=QUIET, va="baseline")
            for photograph, y in zip(shown, rows, strict=True):
                draw(sheet, photograph, photograph.panels[m], (x, y, SIDE, tall))
        left += across
        if scale is not None:
            sheet.color_bar(left, first, rows[-1] + tall - first, scale)
        left += BETWEEN if scale is None else BAR
    return sheet.write(path)


def _draw_box(sheet: Sheet, photograph: Photograph, panels: Panels, place: Place) -> None:
    rows, columns = panels.norms.shape
    height, width = photograph.photo.shape[0] / rows, photograph.photo.shape[1] / columns  # of a patch, in pixels
    x0, y0, x1, y1 = panels.box
    axes = sheet.image(photograph.photo, *place)
    outline(axes, (x0 * width, y0 * height, x1 * width, y1 * height), edgecolor=OUTLIER, linewidth=1.6)


def _draw_map(sheet: Sheet, values: np.ndarray, outliers: np.ndarray, place: Place, scale: ColorScale) -> None:
    outline_patches(sheet.image(values, *place, scale=scale), outliers)
