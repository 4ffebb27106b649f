"""A sheet of images, laid out in inches."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from vitreg.common.disk import replacing
from vitreg.common.words import shorten
from vitreg.report.colors import OUTLIER, ColorScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

QUIET = "#59616b"
FAINT = "#b4bac1"
TITLE = {"fontsize": 12, "fontweight": "bold"}
# Inches.
GAP = 0.09
MARGIN = 0.12


class Sheet:
    """A figure laid out in inches from the top left corner, so that rows and columns line up exactly."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=160)
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()

    def text(self, text: str, x: float, y: float, width: float | None = None, **style: Any) -> None:
        """A text at a place; by default what is wider than the rest of the sheet is left out of its middle."""
        style = {"va": "top", "parse_math": False} | style
        # Names of files need not be text, which fonts insist on.
        text = text.encode(errors="backslashreplace").decode()
        drawn = self.figure.text(x / self.width, 1 - y / self.height, text, **style)
        if "rotation" not in style:
            self._fit(drawn, self.width - MARGIN - x if width is None else width)

    def _fit(self, text: Text, width: float) -> None:
        lines = text.get_text().split("\n")
        most = max(map(len, lines))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            while most > 3 and (ratio := text.get_window_extent(self._renderer).width / (160 * width)) > 1:
                most = min(most - 1, int(most / ratio) + 1)
                text.set_text("\n".join(shorten(line, most) for line in lines))

    def _axes(self, x: float, y: float, width: float, height: float) -> Axes:
        corner = x / self.width, 1 - (y + height) / self.height
        axes = self.figure.add_axes((*corner, width / self.width, height / self.height))
        axes.spines[:].set_visible(False)
        return axes

    def plot(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes for curves: quiet lines at the left and the bottom."""
        axes = self._axes(x, y, width, height)
        axes.spines[["left", "bottom"]].set(visible=True, color=FAINT)
        axes.tick_params(labelsize=8, labelcolor=QUIET, color=FAINT, length=3)
        return axes

    def image(
        self,
        image: np.ndarray,
        x: float,
        y: float,
        width: float,
        height: float,
        label: str = "",
        scale: ColorScale | None = None,
    ) -> Axes:
        """A photograph, or a map where there is a scale."""
        axes = self._axes(x, y, width, height)
        colors = {} if scale is None else {"norm": scale.norm, "cmap": scale.colors}
        axes.imshow(image, interpolation="nearest", aspect="auto", **colors)
        self._fit(axes.set_title(label, fontsize=8.5, color=QUIET, pad=3, parse_math=False), width)
        axes.set(xticks=[], yticks=[])
        return axes

    def color_bar(self, x: float, y: float, height: float, scale: ColorScale) -> None:
        """The bar of a scale, beside what is of this height."""
        from matplotlib.cm import ScalarMappable

        # Shorter than what it stands beside, so that the numbers at its ends keep off its neighbor's.
        axes = self._axes(x, y + 0.06, 0.11, height - 0.12)
        bar = self.figure.colorbar(ScalarMappable(scale.norm, scale.colors), cax=axes)
        bar.set_ticks(scale.ticks, labels=scale.tick_labels, minor=False)
        bar.minorticks_off()
        bar.ax.tick_params(labelsize=8, labelcolor=QUIET, color=QUIET, length=2)
        bar.set_label(scale.label, fontsize=8.5, color=QUIET)
        bar.outline.set_visible(False)
        if scale.mark is not None:
            axes.axhline(scale.mark, color=OUTLIER, linewidth=2)

    def write(self, path: Path) -> Path:
        with warnings.catch_warnings(), replacing(path) as temporary:
            # The names of files may be in a script that matplotlib's font lacks.
            warnings.filterwarnings("ignore", "Glyph .* missing")
            self.figure.savefig(temporary)
        return path


def outline(axes: Axes, box: tuple[float, float, float, float], **style: Any) -> None:
    """A rectangle in an image: x0, y0, x1, y1 in its pixels, which are centered on whole numbers."""
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, clip_on=False, **style))


def outline_patches(axes: Axes, outliers: Bool[np.ndarray, "h w"]) -> None:
    """A rectangle around every outlier of a map."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column in np.argwhere(outliers)]
    axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=OUTLIER, linewidth=1.3, clip_on=False))
