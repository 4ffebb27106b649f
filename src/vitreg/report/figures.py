"""Images for papers, READMEs and slides: the norm and attention maps of a diagnosis or a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vitreg.common.words import number, percent
from vitreg.report.colors import ColorScale, attention_scale, norm_scale
from vitreg.report.examples import ExampleMaps, check_examples, check_pairs
from vitreg.report.sheet import GAP, MARGIN, QUIET, TITLE, Sheet, outline_patches

LABEL = 0.95
"""Inches of the longest name of a row, which stands upright."""


def diagnosis_figure(summary: dict, examples: Sequence[ExampleMaps], path: Path, max_examples: int = 4) -> Path:
    """Write a PNG of the diagnosis: photographs, norm maps and class-token attention at the reported block.

    Args:
        summary: `Diagnosis.to_dict()`.
        examples: The images; the first `max_examples` are drawn, at least one is needed.
        path: The file to write; its folder is made.
        max_examples: Number of columns at most.

    Raises:
        ValueError: No example, or one that does not fit the summary.
    """
    if not examples:
        raise ValueError("diagnosis_figure needs at least one example, got none.")
    check_examples(summary, examples)
    shown, block, threshold = examples[:max_examples], summary["block"], summary["threshold"]
    query = next(iter(shown[0].attention), None)
    rows = [("patch norm", f"attention of\n{query}", shown)]
    title, detail = _headline(summary)
    return _draw(title, [detail], _groups(rows, block, threshold, query, "attention received"), shown, path)


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

    Raises:
        ValueError: No example, or one that does not fit the summary or its counterpart.
    """
    if not before:
        raise ValueError("comparison_figure needs at least one example, got none.")
    check_pairs(summary, before, after)
    block = summary["block"]
    threshold = summary["blocks"][block]["threshold"]
    query = next((query for query in before[0].attention if query in after[0].attention), None)
    rows = [
        (f"patch norm,\n{when}", f"attention,\n{when}", examples[:max_examples])
        for when, examples in (("before", before), ("after", after))
    ]
    groups = _groups(rows, block, threshold, query, f"attention received from {query}")
    title, details = _comparison_headline(summary)
    return _draw(title, details, groups, before[:max_examples], path)


@dataclass(frozen=True)
class _Row:
    """One map of every image."""

    label: str
    maps: Float[np.ndarray, "N h w"]
    outliers: Bool[np.ndarray, "N h w"]


_Group = tuple[ColorScale, list[_Row]]


def _groups(
    models: Sequence[tuple[str, str, Sequence[ExampleMaps]]],
    block: int,
    threshold: float | None,
    query: str | None,
    attention_label: str,
) -> list[_Group]:
    """The norms of all models on one color scale, and what their patches receive from a query on another.

    Args:
        models: of each the labels of both rows, and its examples.
        block: the one that is shown.
        threshold: of outliers.
        query: who attends; None where there is no attention.
        attention_label: of the color bar.
    """
    norms, attention = [], []
    for norm_label, label, examples in models:
        maps = np.stack([example.norms[block] for example in examples])
        norms.append(_Row(norm_label, maps, maps >= (np.inf if threshold is None else threshold)))
        if query is not None:
            received = np.stack([example.attention[query][block] for example in examples])
            attention.append(_Row(label, received, norms[-1].outliers))
    groups = [(norm_scale(np.stack([row.maps for row in norms]), threshold), norms)]
    if attention:
        highest = max(float(row.maps.max()) for row in attention)
        groups.append((attention_scale(highest, attention_label), attention))
    return groups


def _draw(
    title: str, details: Sequence[str], groups: Sequence[_Group], shown: Sequence[ExampleMaps], path: Path
) -> Path:
    """Photographs in the first row, then the groups."""
    line = 0.21
    aspect = shown[0].photo.shape[0] / shown[0].photo.shape[1]
    # Panoramas are drawn wider, and towers narrower, to be looked at.
    width = min(max(2.0, 0.6 / aspect), 6.0, 3.0 / aspect)
    height = width * aspect
    left, top, step = 0.5, 0.88 + line * (len(details) - 1), max(height, LABEL) + GAP
    right = left + len(shown) * (width + GAP)
    labels = ["photograph", *(row.label for _, rows in groups for row in rows)]
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
    for scale, rows in groups:
        sheet.color_bar(right, y, height + (len(rows) - 1) * step, scale)
        for row in rows:
            for x, values, outliers in zip(columns, row.maps, row.outliers, strict=True):
                outline_patches(sheet.image(values, x, y, width, height, scale=scale), outliers)
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
