"""Several models against one: a table and a page."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vitreg.artifacts.comparison import Comparison
from vitreg.common.disk import write_json
from vitreg.common.words import counted, number, percent
from vitreg.report import write_comparisons

HEADER = (
    *("model", "artifacts", "outliers, worst block", "largest norm", "attention on outliers, worst block"),
    *("cosine of patches", "of class tokens", "same output"),
)


def save_comparisons(
    comparisons: Mapping[str, Comparison], first: str, out: Path, *, command: str | None = None
) -> dict[str, Any]:
    """Write `report.html` and `comparisons.json`, and return what is in it, format `vitreg-comparisons/1`.

    Args:
        comparisons: of each model by name, with the same first model and images; reports are in folders of these names.
        first: what the first model is called.
        out: the folder.
        command: makes it again.
    """
    one = next(iter(comparisons.values()))
    removed = [name for name, comparison in comparisons.items() if comparison.outcome == "removed"]
    summary = {
        "format": "vitreg-comparisons/1",
        "version": metadata.version("vitreg"),
        "verdict": [
            one.before.verdict[0],
            f"Its artifacts are removed in {len(removed)} of the {counted(len(comparisons), 'other model')}"
            f"{': ' if removed else ''}{', '.join(removed)}.",
        ],
        "num_images": one.num_images,
        "seconds": one.seconds,
        "header": list(HEADER),
        "rows": [_row(first, one, "before"), *(_row(name, each, "after") for name, each in comparisons.items())],
        "comparisons": {name: comparison.to_dict() for name, comparison in comparisons.items()},
    } | ({"command": command} if command else {})
    write_comparisons(summary, out / "report.html")
    write_json(out / "comparisons.json", summary)
    return summary


def _row(name: str, comparison: Comparison, which: str) -> list[str]:
    """A model in words; both sides are counted by the first model's thresholds."""

    def worst(figure: str) -> float:
        return max(getattr(block, f"{figure}_{which}") or 0.0 for block in comparison.blocks)

    own = [percent(worst("outlier_fraction")), number(worst("max")), percent(worst("attention_on_outliers"))]
    if which == "before":
        return [name, "yes" if comparison.before.has_artifacts else "no", *own, "", "", ""]
    cosines = (comparison.patch_similarity, comparison.cls_similarity)
    agreement = comparison.head_agreement
    told = ["–" if value is None else f"{value:.3f}" for value in cosines]
    return [name, comparison.outcome, *own, *told, "–" if agreement is None else percent(agreement)]
