"""Does a model have artifacts, where, from which block on, and what do they do to its attention?"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitreg.artifacts.decision import Undecided
from vitreg.artifacts.findings import Findings
from vitreg.artifacts.measures import Faithfulness, Ranges, Sinks
from vitreg.common.json_types import to_json
from vitreg.images import SkippedImage
from vitreg.report import ExampleMaps, write_report

Status = Literal["artifacts", "outliers", "cannot tell", "long tail", "clean"]
"""`"outliers"`: patches reach a threshold that was asked for; `"long tail"`: none is an outlier, but some have norms of
over five medians; `"clean"`: none has."""


class Histogram(NamedTuple):
    """Norms on a logarithmic axis: the edges of the bins, to four digits, and how many norms lie in each."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class ChannelShare(NamedTuple):
    """A channel, and its share of the outliers' squared norm."""

    channel: int
    share: float


@dataclass(frozen=True)
class BlockNorms:
    """The patch norms after one block, before the final norm.

    Attributes:
        block: counted from 0.
        median, p99, max: of the norms; the first two to 1 %.
        threshold: norm from which patches count as outliers, None where no second mode was found.
        outlier_fraction: share of the patches at or above it.
        attention_on_outliers: share of the class token's attention in this block (mean over heads and images) that
            lands on outliers of the block before, which are what it attends to; None without a class token.
        attention_on_registers: share that goes to the registers.
        histogram: of the norms.
    """

    block: int
    median: float
    p99: float
    max: float
    threshold: float | None
    outlier_fraction: float
    attention_on_outliers: float | None
    attention_on_registers: float | None
    histogram: Histogram = field(repr=False)


@dataclass(frozen=True)
class NeighbourSimilarity:
    """Mean cosine of a patch with its four neighbors right after patch embedding (paper, section 2.1, Fig. 5a)."""

    outliers: float | None
    others: float | None


@dataclass(frozen=True, repr=False)
class Diagnosis(Findings):
    """What `diagnose` found; norms are L2, after a block and before the final norm, blocks count from 0.

    Attributes:
        has_artifacts: whether the norms of any block have a second mode (or, with a threshold that was asked for,
            whether any patch reaches it); None where there are too few patches to tell.
        status: the same in a word, and what is not the same where there are none.
        undecided: what looks like artifacts, and how many images would tell; None where it is known.
        outlier_fraction: share of the patches at or above `threshold` after `block`.
        threshold: where outliers begin after `block`; None where there are none.
        threshold_rule: how it was chosen.
        block: the block reported: the last, unless artifacts exist only further inside.
        onset_block: the first of the unbroken run of blocks with outliers that reaches `block`.
        blocks: every block's numbers.
        position_frequency: share of the images in which each position is an outlier after `block`, `[h, w]`.
        position_kind: `"position-fixed"`, `"content-dependent"`, `"mixed"`; None without outliers or with few images.
        neighbour_similarity: the redundancy test.
        register_norms: mean over images, `[L, R]`, None without registers.
        cls_norms: mean over images, `[L]`, None without a class token.
        channels: those that carry the outliers' norm, the largest share first.
        num_images, num_patches: what was looked at.
        skipped: files that could not be read.
        interrupted: whether it was stopped before the last image.
        seconds: time it took.
        verdict: the findings in sentences.
        model: name and architecture of the model.
        image_size: (height, width) in pixels that the model saw.
        examples: the first images with their maps, for the report.
        faithfulness: what maps of the class token's attention show; None without a class token.
        sinks: heads in which tokens take much of its attention, and what for; None without a class token.
        ranges: how large values become, and what float16 and int8 would make of them.
    """

    _json_name = "diagnosis.json"
    _shown = ("has_artifacts", "outlier_fraction", "threshold", "block", "onset_block", "num_images")

    has_artifacts: bool | None
    status: Status
    undecided: Undecided | None
    outlier_fraction: float
    threshold: float | None
    threshold_rule: str
    block: int
    onset_block: int | None
    blocks: tuple[BlockNorms, ...]
    position_frequency: NDArray[np.float64]
    position_kind: str | None
    neighbour_similarity: NeighbourSimilarity
    register_norms: NDArray[np.float64] | None
    cls_norms: NDArray[np.float64] | None
    channels: tuple[ChannelShare, ...]
    num_images: int
    num_patches: int
    skipped: tuple[SkippedImage, ...]
    interrupted: bool
    seconds: float
    model: dict[str, Any]
    image_size: tuple[int, int]
    verdict: tuple[str, ...] = ()
    examples: tuple[ExampleMaps, ...] = field(default=(), repr=False)
    faithfulness: Faithfulness | None = None
    sinks: Sinks | None = None
    ranges: Ranges | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the examples, in JSON types; `docs/diagnosis.md` describes the keys."""
        values = {name: value for name, value in vars(self).items() if name != "examples"}
        return {
            "format": "vitreg-diagnosis/1",
            "version": metadata.version("vitreg"),
            "grid": list(self.position_frequency.shape),
            **to_json(values),
        }

    def _write_page(self, summary: dict[str, Any], path: Path) -> Path:
        return write_report(summary, self.examples, path)
