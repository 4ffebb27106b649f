"""Several models on the same photographs, side by side, as a page: the report of `vitreg demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from vitreg.report.colors import ColorScale, attention_scale, css_gradient, norm_scale
from vitreg.report.data_urls import jpeg_url, png_url
from vitreg.report.page import write_page

PHOTO = 320, 80
"""Largest side in pixels, and quality, of a photograph in the page."""


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


def shared_scales(panels: Sequence[Panels]) -> tuple[ColorScale, ColorScale]:
    """Of norms and of attention, the same for all; attention may be above it where outliers receive it."""
    shares = [of.attention[~of.outliers] for of in panels]
    highest = max((float(share.max()) for share in shares if share.size), default=1.0)
    norms = norm_scale(np.stack([of.norms for of in panels]))
    return norms, attention_scale(highest, "share received", brightness=(0.0, 0.5, 1.0))


def write_side_by_side(summary: dict, photographs: Sequence[Photograph], path: Path) -> Path:
    """Write a self-contained HTML page; it appears whole or not at all.

    Args:
        summary: format "vitreg-demo/2".
        photographs: what is shown; of each, all models share one color scale for norms and one for attention.
        path: the file to write; its folder is made.

    Raises:
        ValueError: a photograph has not one set of panels for each model, or a value is NaN or infinite.
    """
    check_panels(summary, photographs)
    return write_page("demo", path, s=summary, cards=[_card(photograph) for photograph in photographs])


def check_panels(summary: dict, photographs: Sequence[Photograph]) -> None:
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
    norms, attention = shared_scales(photograph.panels)
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
