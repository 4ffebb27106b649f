"""Two models on the same images, block by block: did a change remove the artifacts, and what else did it change?"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from vitreg.artifacts.diagnosis import Diagnosis
from vitreg.artifacts.findings import Findings
from vitreg.common.json_types import to_json
from vitreg.report import write_comparison

Outcome = Literal["removed", "partly removed", "not removed", "nothing to remove", "cannot tell"]


@dataclass(frozen=True)
class BlockChange:
    """The patches after one block, before and after; both are counted by one threshold.

    Attributes:
        block: counted from 0.
        threshold: the first model's, or the second's where the first has no second mode; None where neither has.
        outlier_fraction_before, outlier_fraction_after: share of the patches at or above it.
        max_before, max_after, median_before, median_after, p99_before, p99_after: of the norms.
        attention_on_outliers_before, attention_on_outliers_after: share of the class token's attention that lands on
            outliers of the block before; None without a class token.
        attention_on_registers_before, attention_on_registers_after: share that goes to registers.
    """

    block: int
    threshold: float | None
    outlier_fraction_before: float
    outlier_fraction_after: float
    max_before: float
    max_after: float
    median_before: float
    median_after: float
    p99_before: float
    p99_after: float
    attention_on_outliers_before: float | None
    attention_on_outliers_after: float | None
    attention_on_registers_before: float | None
    attention_on_registers_after: float | None


@dataclass(frozen=True, repr=False)
class Comparison(Findings):
    """What `compare` found.

    Attributes:
        before, after: the diagnoses of the two models, each by its own thresholds.
        blocks: every block's change, by one threshold for both.
        outcome: whether artifacts were removed.
        patch_similarity: mean cosine between the two models' output features of the same patch, over the patches that
            are no outliers before; None where the models differ in width.
        cls_similarity: the same for the class token.
        head_agreement: share of the images for which the largest output of the head is the same; None without heads.
        head_similarity: mean cosine of the heads' outputs.
        seconds: time it took.
        same_model: whether the second model is the first one, weights and all.
        verdict: the findings in sentences.
    """

    _json_name = "comparison.json"
    _shown = ("outcome", "num_images", "cls_similarity")

    before: Diagnosis
    after: Diagnosis
    blocks: tuple[BlockChange, ...]
    outcome: Outcome
    patch_similarity: float | None
    cls_similarity: float | None
    head_agreement: float | None
    head_similarity: float | None
    seconds: float
    same_model: bool = False
    verdict: tuple[str, ...] = ()

    @property
    def num_images(self) -> int:
        """That both models were shown."""
        return self.before.num_images

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON types; `docs/registers.md` describes the keys."""
        values = to_json(vars(self))
        return {
            "format": "vitreg-comparison/1",
            "version": metadata.version("vitreg"),
            "block": (self.before if self.before.has_artifacts else self.after).block,
            **{key: values["before"][key] for key in ("grid", "image_size", "num_images", "skipped", "interrupted")},
            **values,
        }

    def _write_page(self, summary: dict[str, Any], path: Path) -> Path:
        return write_comparison(summary, self.before.examples, self.after.examples, path)
