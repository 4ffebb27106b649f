"""What probes say of models, as an HTML page: tables, and predicted masks and depth beside the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from vitreg.common.words import number
from vitreg.report.colors import color_table, css_gradient
from vitreg.report.data_urls import jpeg_url, png_url
from vitreg.report.page import write_page

_SIDE = 360
"""Largest side in pixels of an image in the page."""
_DEPTH_COLORS = "viridis"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: of the table.
        header: names of the columns; the first are names of rows, too.
        rows: as many entries each.
        notes: sentences below it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class DenseImage:
    """A photograph with the truth and the models' predictions for every pixel.

    Attributes:
        name: of the photograph.
        photo: it.
        truth: class numbers (255 does not count), or meters (0 is a hole).
        predictions: of models, by name.
    """

    name: str
    photo: UInt8[np.ndarray, "H W 3"]
    truth: Shaped[np.ndarray, "H W"]
    predictions: Mapping[str, Shaped[np.ndarray, "h w"]]


def write_evaluation(
    summary: Mapping[str, Any],
    path: Path,
    *,
    tables: Sequence[Table],
    legend: str,
    masks: Sequence[DenseImage] = (),
    depths: Sequence[DenseImage] = (),
    class_names: Sequence[str] = (),
) -> Path:
    """Write a self-contained page; it appears whole or not at all.

    Args:
        summary: format "vitreg-evaluation/1".
        path: the file to write; its folder is made.
        tables: the one of all probes first.
        legend: what the tables' marks mean.
        masks: images with classes.
        depths: images with depth.
        class_names: of the classes in masks.
    """
    present = sorted(
        {c for p in masks for m in (p.truth, *p.predictions.values()) for c in np.unique(m).tolist() if c != 255}
    )
    colors = class_colors(max(present, default=0) + 1)
    return write_page(
        "evaluation",
        path,
        s=summary,
        tables=tables,
        legend=legend,
        masks=[_mask_card(image, colors) for image in masks],
        classes=[(class_names[c] if c < len(class_names) else str(c), _css(colors[c])) for c in present],
        depths=[_depth_card(image) for image in depths],
        depth_colors=css_gradient(_DEPTH_COLORS),
    )


def class_colors(count: int) -> UInt8[np.ndarray, "count 3"]:
    """Colors that are told apart, also by those who do not see red and green alike where there are few."""
    import matplotlib

    few = [
        matplotlib.colormaps[name](i)[:3]
        for name, n in (("tab10", 10), ("tab20b", 20), ("tab20c", 20))
        for i in range(n)
    ]
    # Beyond these, hues at the golden angle.
    more = [matplotlib.colormaps["hsv"]((0.1 + 0.618034 * i) % 1)[:3] for i in range(max(0, count - len(few)))]
    return (255 * np.array([*few, *more][:count])).round().astype(np.uint8)


def _card(image: DenseImage, paint: Callable[[np.ndarray], UInt8[np.ndarray, "h w 3"]]) -> dict[str, Any]:
    """A photograph, the truth and the predictions as the page shows them."""
    return {
        "name": image.name,
        "photo": jpeg_url(image.photo, _SIDE, 80),
        "truth": png_url(paint(image.truth), _SIDE),
        "predictions": {name: png_url(paint(prediction), _SIDE) for name, prediction in image.predictions.items()},
    }


def _mask_card(image: DenseImage, colors: UInt8[np.ndarray, "C 3"]) -> dict[str, Any]:
    """Classes in their colors; what does not count is black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    return _card(image, lambda mask: table[mask])


def _depth_card(image: DenseImage) -> dict[str, Any]:
    """Meters in colors, the same for the truth and all predictions; holes are black."""
    maps = [image.truth[image.truth > 0], *(prediction.ravel() for prediction in image.predictions.values())]
    low = min(float(m.min()) for m in maps if m.size)
    high = max(float(np.quantile(m, 0.99)) for m in maps if m.size)

    def paint(depth: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
        levels = 256 * np.clip((depth - low) / max(high - low, 1e-9), 0, 1)
        return color_table(_DEPTH_COLORS)[levels.astype(int).clip(max=255)] * (depth > 0)[..., None]

    ticks = [f"{number(low + (high - low) * share)} m" for share in (0, 0.5, 1)]
    return {**_card(image, paint), "ticks": ticks}


def _css(color: UInt8[np.ndarray, " 3"]) -> str:
    return "rgb({} {} {})".format(*color.tolist())
