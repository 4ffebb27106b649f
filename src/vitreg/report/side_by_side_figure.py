"""Several models on the same photographs, side by side, as an image: that of `vitreg demo`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from vitreg.report.figures import OUTLIER, outline
from vitreg.report.sheet import GAP, MARGIN, QUIET, TITLE, Sheet
from vitreg.report.side_by_side import Photograph, attention_scale, check_photographs, norm_scale

# Inches.
SIDE = 1.15
LABELS = 0.26
BAR = 0.95
ACROSS = 2


def side_by_side_figure(summary: dict, photographs: Sequence[Photograph], path: Path, max_photographs: int = 4) -> Path:
    """Write a PNG of several models on the same photographs: boxes, norms and attention.

    Args:
        summary: format "vitreg-demo/1".
        photographs: the first `max_photographs` are drawn, two beside each other; of each, all models share one
            color scale for norms and one for attention.
        path: the file to write; its folder is made.
        max_photographs: how many at most.

    Returns:
        `path`.

    Raises:
        ValueError: as `write_side_by_side`.
    """
    check_photographs(summary, photographs)
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
    from matplotlib.patches import Rectangle

    left, step = x + LABELS, tall + GAP
    right = left + len(photograph.panels) * (SIDE + GAP)
    norms, attention = norm_scale(photograph), attention_scale(photograph)
    rows, columns = photograph.panels[0].norms.shape
    for row, label in enumerate(("object", "patch norm", "attention")):
        style = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 8.5}
        sheet.text(label, x + 0.12, y + row * step + tall / 2, **style)
    for i, panels in enumerate(photograph.panels):
        place = left + i * (SIDE + GAP)
        axes = sheet.image(photograph.photo, place, y, SIDE, tall)
        height, width = photograph.photo.shape[:2]
        x0, y0, x1, y1 = (
            side * scale for side, scale in zip(panels.box, (width / columns, height / rows) * 2, strict=True)
        )
        # Pixels are centered on whole numbers.
        axes.add_patch(
            Rectangle(
                (x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=OUTLIER, linewidth=1.6, clip_on=False
            )
        )
        for row, (scale, values) in enumerate(((norms, panels.norms), (attention, panels.attention)), start=1):
            axes = sheet.image(values, place, y + row * step, SIDE, tall, scale=scale.norm, colors=scale.colors)
            outline(axes, panels.outliers)
    for row, (scale, label, percent) in enumerate(
        ((norms, "norm (log scale)", False), (attention, "share received", True)), start=1
    ):
        place = right, y + row * step, tall
        sheet.color_bar(*place, scale.norm, scale.colors, scale.ticks, label, percent=percent)
