"""Images for papers, READMEs and slides: the norm and attention maps of a diagnosis or a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from vitreg.common.words import number, percent
from vitreg.report.examples import ExampleMaps, check_examples, check_pairs
from vitreg.report.sheet import GAP, MARGIN, QUIET, TITLE, Sheet, root_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

OUTLIER = "#ff5a3c"
LABEL = 0.95
"""Inches of the longest name of a row, which stands upright."""


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
    if not examples:
        raise ValueError("diagnosis_figure needs at least one example, got none.")
    check_examples(summary, examples)
    shown, block, threshold = examples[:max_examples], summary["block"], summary["threshold"]
    norms = np.stack([example.norms[block] for example in shown])
    outliers = norms >= (np.inf if threshold is None else threshold)
    groups = [_norm_group([_Row("patch norm", norms, outliers)], threshold)]
    query = next(iter(shown[0].attention), None)
    if query is not None:
        row = _Row(f"attention of\n{query}", _attention(shown, query, block), outliers)
        groups.append(_attention_group([row], "attention received"))
    title, detail = _headline(summary)
    return _draw(title, [detail], shown, groups, path)


def comparison_figure(
    summary: dict,
    before: Sequence[ExampleMaps],
    after: Sequence[ExampleMaps],
    path: Path,
    max_examples: int = 4,
) -> Path:
    """Write a PNG of two models on the same images: photographs, norms and attention, each before and after.

    Before and after share a color scale. The attention is that of the first query both models have, the class token
    where there is one.

    Args:
        summary: Format "vitreg-comparison/1".
        before: The images as the first model sees them; the first `max_examples` are drawn, at least one is needed.
        after: The same images as the second model sees them.
        path: The file to write; its folder is made.
        max_examples: Number of columns at most.

    Returns:
        `path`.

    Raises:
        ValueError: No example, or one that does not fit the summary or its counterpart.
    """
    if not before:
        raise ValueError("comparison_figure needs at least one example, got none.")
    check_pairs(summary, before, after)
    block = summary["block"]
    threshold = summary["blocks"][block]["threshold"]
    models = {"before": before[:max_examples], "after": after[:max_examples]}
    norms, attention = [], []
    query = next((query for query in before[0].attention if query in after[0].attention), None)
    for when, shown in models.items():
        maps = np.stack([example.norms[block] for example in shown])
        outliers = maps >= (np.inf if threshold is None else threshold)
        norms.append(_Row(f"patch norm,\n{when}", maps, outliers))
        if query is not None:
            attention.append(_Row(f"attention,\n{when}", _attention(shown, query, block), outliers))
    groups = [_norm_group(norms, threshold)]
    if query is not None:
        groups.append(_attention_group(attention, f"attention received from {query}"))
    title, details = _comparison_headline(summary)
    return _draw(title, details, models["before"], groups, path)


@dataclass(frozen=True)
class _Row:
    """One map of every image."""

    label: str
    maps: Float[np.ndarray, "N h w"]
    outliers: Bool[np.ndarray, "N h w"]


@dataclass(frozen=True)
class _Group:
    """Rows on one color scale, with a color bar beside them; `mark` is drawn across it."""

    rows: Sequence[_Row]
    scale: Normalize
    colors: str
    ticks: Sequence[float]
    label: str
    percent: bool = False
    mark: float | None = None


def _norm_group(rows: Sequence[_Row], threshold: float | None) -> _Group:
    from matplotlib.colors import LogNorm

    norms = np.stack([row.maps for row in rows])
    # The scale reaches the threshold even where the images shown do not.
    high = max(float(norms.max()), threshold or 0.0)
    low = max(float(norms.min()), high * 1e-4, 1e-12)
    high = max(high, low * 1.01)
    ticks = sorted({low, math.sqrt(low * high) if threshold is None else threshold, high})
    return _Group(rows, LogNorm(low, high), "viridis", ticks, "norm (log scale)", mark=threshold)


def _attention_group(rows: Sequence[_Row], label: str) -> _Group:
    most = max(float(row.maps.max()) for row in rows)
    ticks = [most * t**2 for t in (0, 0.5, 0.75, 1)]
    return _Group(rows, root_scale(most), "magma", ticks, label, percent=True)


def _attention(examples: Sequence[ExampleMaps], query: str, block: int) -> Float[np.ndarray, "N h w"]:
    return np.stack([example.attention[query][block] for example in examples])


def _draw(
    title: str, details: Sequence[str], shown: Sequence[ExampleMaps], groups: Sequence[_Group], path: Path
) -> Path:
    """Photographs in the first row, then the groups."""
    line = 0.21
    aspect = shown[0].photo.shape[0] / shown[0].photo.shape[1]
    # Panoramas are drawn wider, and towers narrower, to be looked at.
    width = min(max(2.0, 0.6 / aspect), 6.0, 3.0 / aspect)
    height = width * aspect
    left, top, step = 0.5, 0.88 + line * (len(details) - 1), max(height, LABEL) + GAP
    right = left + len(shown) * (width + GAP)
    labels = ["photograph", *(row.label for group in groups for row in group.rows)]
    # One narrow column must still hold the headline.
    sheet = Sheet(max(right + 0.95, 6.4), top + len(labels) * step + MARGIN - GAP)
    sheet.text(title, MARGIN, 0.12, **TITLE)
    for i, detail in enumerate(details):
        sheet.text(detail, MARGIN, 0.4 + i * line, fontsize=9.5, color=QUIET)
    for i, label in enumerate(labels):
        style: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 9.5, "linespacing": 1.1}
        sheet.text(label, left - 0.22, top + i * step + height / 2, **style)
    columns = [left + i * (width + GAP) for i in range(len(shown))]
    for example, x in zip(shown, columns, strict=True):
        sheet.image(example.photo, x, top, width, height, example.name)
    y = top + step
    for group in groups:
        place = right, y, height + (len(group.rows) - 1) * step
        bar = sheet.color_bar(*place, group.scale, group.colors, group.ticks, group.label, percent=group.percent)
        if group.mark is not None:
            bar.axhline(group.mark, color=OUTLIER, linewidth=2)
        for row in group.rows:
            for x, values, outliers in zip(columns, row.maps, row.outliers, strict=True):
                axes = sheet.image(values, x, y, width, height, scale=group.scale, colors=group.colors)
                outline(axes, outliers)
            y += step
    return sheet.write(path)


def _headline(summary: dict) -> tuple[str, str]:
    reported, block, name = summary["blocks"][summary["block"]], summary["block"], summary["model"]["name"]
    norms = (
        f"After block {block} the median patch norm is {number(reported['median'])}, "
        f"the largest {number(reported['max'])}."
    )
    if not summary["has_artifacts"]:
        found = "no artifacts" if summary["undecided"] is None else "too few patches to tell"
        return f"{name}: {found}", norms
    return (
        f"{name}: {percent(summary['outlier_fraction'])} of patches are artifacts",
        f"{norms} Outlined: {number(summary['threshold'])} or more.",
    )


def _comparison_headline(summary: dict) -> tuple[str, list[str]]:
    at, block = summary["blocks"][summary["block"]], summary["block"]
    title = summary["outcome"].capitalize()
    if summary.get("same_model") and summary["outcome"] == "not removed":
        title = f"A model and itself: {percent(at['outlier_fraction_before'])} of patches are outliers in both"
    elif summary["outcome"] == "cannot tell":
        title = "Too few patches to tell"
    elif summary["outcome"] != "nothing to remove":
        before, after = percent(at["outlier_fraction_before"]), percent(at["outlier_fraction_after"])
        title = f"Artifacts {summary['outcome']}: {before} of patches were outliers, now {after}"
    norms = f"After block {block} the largest patch norm was {number(at['max_before'])}, now {number(at['max_after'])}."
    if at["threshold"] is not None:
        norms += f" Outlined: {number(at['threshold'])} or more."
    return title, [*(f"{when.capitalize()}: {summary[when]['model']['name']}" for when in ("before", "after")), norms]


def outline(axes: Axes, outliers: Bool[np.ndarray, "h w"]) -> None:
    """A rectangle around every outlier of a map."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column in np.argwhere(outliers)]
    axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=OUTLIER, linewidth=1.3, clip_on=False))
