"""Several models on the same photographs, side by side, as an HTML page: the report of `vitreg demo`."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from vitreg.common.words import number, percent
from vitreg.report.packing import photo_url
from vitreg.report.page import write_still_page
from vitreg.report.sheet import root_scale

if TYPE_CHECKING:
    from matplotlib.colors import Normalize

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


def write_side_by_side(summary: dict, photographs: Sequence[Photograph], path: Path) -> Path:
    """Write a self-contained HTML page; it appears whole or not at all.

    Args:
        summary: format "vitreg-demo/1".
        photographs: what is shown; of each, all models share one color scale for norms and one for attention.
        path: the file to write; its folder is made.

    Returns:
        `path`.

    Raises:
        ValueError: a photograph has not one set of panels for each model, or a value is NaN or infinite.
    """
    check_photographs(summary, photographs)
    return write_still_page("demo", path, s=summary, cards=[_card(photograph) for photograph in photographs])


def check_photographs(summary: dict, photographs: Sequence[Photograph]) -> None:
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


@dataclass(frozen=True)
class Scale:
    """The colors of one kind of map in one photograph, the same for every model."""

    colors: str
    norm: Normalize
    ticks: tuple[float, float, float]


def norm_scale(photograph: Photograph) -> Scale:
    """Logarithmic, from the smallest to the largest norm that any model has."""
    from matplotlib.colors import LogNorm

    norms = np.stack([panels.norms for panels in photograph.panels])
    high = max(float(norms.max()), 1e-12)
    low = max(float(norms.min()), high * 1e-4)
    high = max(high, low * 1.01)
    return Scale("viridis", LogNorm(low, high), (low, (low * high) ** 0.5, high))


def attention_scale(photograph: Photograph) -> Scale:
    """That of the square root, from zero to the largest share of a patch that is no outlier; those lie above it."""
    shares = [panels.attention[~panels.outliers] for panels in photograph.panels]
    most = max((float(share.max()) for share in shares if share.size), default=1.0)
    return Scale("magma", root_scale(most), (0.0, most / 4, most))


def _card(photograph: Photograph) -> dict[str, Any]:
    """What the template draws of a photograph; lengths are in patches."""
    norms, attention = norm_scale(photograph), attention_scale(photograph)
    rows, columns = photograph.panels[0].norms.shape
    return {
        "name": photograph.name,
        "columns": columns,
        "rows": rows,
        "photo": photo_url(photograph.photo, *PHOTO),
        "norm_bar": _bar(norms, [number(tick) for tick in norms.ticks]),
        "attention_bar": _bar(attention, [percent(tick) for tick in attention.ticks]),
        "models": [
            {
                "box": panels.box,
                "norms": _map_url(norms, panels.norms),
                "largest": float(panels.norms.max()),
                "attention": _map_url(attention, panels.attention),
                "most": float(panels.attention.max()),
                "num_outliers": int(panels.outliers.sum()),
                "outline": "".join(f"M{column} {row}h1v1h-1z" for row, column in np.argwhere(panels.outliers)),
            }
            for panels in photograph.panels
        ],
    }


def _bar(scale: Scale, ticks: list[str]) -> dict[str, Any]:
    import matplotlib

    stops = matplotlib.colormaps[scale.colors](np.linspace(0, 1, 17), bytes=True)
    return {"colors": ", ".join(f"rgb({r} {g} {b})" for r, g, b, _ in stops), "ticks": ticks}


def _map_url(scale: Scale, values: Float[np.ndarray, "h w"]) -> str:
    """An image of one pixel a patch, as a data URL."""
    import matplotlib

    colors = matplotlib.colormaps[scale.colors](scale.norm(values), bytes=True)
    buffer = io.BytesIO()
    Image.fromarray(colors[..., :3]).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
