"""From what was added up over images to a diagnosis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitreg.artifacts.decision import EVIDENT, Decision, decide
from vitreg.artifacts.diagnosis import (
    BlockNorms,
    ChannelShare,
    Diagnosis,
    Histogram,
    NeighbourSimilarity,
    Status,
)
from vitreg.artifacts.histogram import BINS_PER_STEP, LogAxis
from vitreg.artifacts.outliers import onset, reported_block
from vitreg.artifacts.statistics import NormStatistics
from vitreg.artifacts.threshold import Rule, threshold_step
from vitreg.artifacts.verdict import position_kind, write_verdict
from vitreg.images import SkippedImage
from vitreg.report import ExampleMaps


def check_block(block: int | str, depth: int) -> None:
    """Refuse to report a block that a model does not have."""
    if block != "auto" and not (isinstance(block, int) and -depth <= block < depth):
        raise ValueError(f"block {block!r} does not exist; give 'auto' or a number from 0 to {depth - 1}")


def choose_thresholds(statistics: NormStatistics, rule: Rule) -> Decision:
    """From where on norms count as outliers, after every block."""
    counts = statistics.counts()
    if rule.kind == "auto":
        return decide(statistics.axis, counts, statistics.num_images)
    mean, sd, _ = statistics.moments()
    return Decision([threshold_step(rule, statistics.axis, *block) for block in zip(counts, mean, sd, strict=True)])


def conclude(
    statistics: NormStatistics,
    decision: Decision,
    rule: Rule,
    *,
    block: int | str,
    skipped: tuple[SkippedImage, ...],
    interrupted: bool,
    seconds: float,
    model: dict[str, Any],
    image_size: tuple[int, int],
    channels: Callable[[int, float | None], tuple[ChannelShare, ...]] = lambda *_: (),
    examples: tuple[ExampleMaps, ...] = (),
    measured: Mapping[str, Any] = {},
) -> Diagnosis:
    """Choose block and onset from the sums, and put the findings into words.

    Args:
        statistics: what was added up.
        decision: from where on norms count as outliers, after every block.
        rule: how that was chosen.
        block: the block to report, or `"auto"`.
        skipped: as of a `Diagnosis`, and the following.
        interrupted: whether there would have been more images.
        seconds: it took.
        model: what there is to say of it.
        image_size: (height, width).
        channels: those that carry the outliers' norm after a block, where that was looked at.
        examples: images with their maps.
        measured: further fields of the diagnosis, of what was measured besides norms (`vitreg.artifacts.measures`).
    """
    axis, steps, undecided = statistics.axis, decision.steps, decision.undecided
    counts, largest = statistics.counts(), statistics.moments()[2]
    above = [statistics.num_above(i, step) for i, step in enumerate(steps)]
    num_patches = int(counts[0].sum())
    blocks = tuple(
        BlockNorms(
            block=i,
            median=axis.quantile(counts[i], 0.5),
            p99=axis.quantile(counts[i], 0.99),
            max=float(largest[i]),
            threshold=None if step is None else axis.step_edge(step),
            outlier_fraction=above[i] / num_patches,
            attention_on_outliers=statistics.attention_on_outliers(i, steps[i - 1] if i else None),
            attention_on_registers=statistics.attention_on_registers(i),
            histogram=_trimmed_histogram(axis, counts[i]),
        )
        for i, step in enumerate(steps)
    )
    reported = block % len(blocks) if isinstance(block, int) else None
    if reported is None:
        reported = reported_block(above, [block.max / block.median for block in blocks])
    step = steps[reported] if above[reported] else None
    frequency = statistics.position_frequency(reported, step)
    threshold = blocks[reported].threshold if step is not None else None
    diagnosis = Diagnosis(
        has_artifacts=None if undecided else any(above),
        status=_status(blocks, decision, rule),
        undecided=undecided,
        outlier_fraction=blocks[reported].outlier_fraction,
        threshold=threshold,
        threshold_rule=rule.describe(),
        block=reported,
        onset_block=onset(above, reported),
        blocks=blocks,
        position_frequency=frequency,
        position_kind=position_kind(frequency, statistics.num_images),
        neighbour_similarity=NeighbourSimilarity(*statistics.mean_similarity(reported, step)),
        register_norms=statistics.mean_token_norms("registers"),
        cls_norms=statistics.mean_token_norms("cls"),
        channels=channels(reported, threshold),
        num_images=statistics.num_images,
        num_patches=num_patches,
        skipped=skipped,
        interrupted=interrupted,
        seconds=seconds,
        model=model,
        image_size=image_size,
        examples=examples,
        **measured,
    )
    return dataclasses.replace(diagnosis, verdict=write_verdict(diagnosis))


def _status(blocks: Sequence[BlockNorms], decision: Decision, rule: Rule) -> Status:
    if decision.undecided:
        return "cannot tell"
    if any(block.outlier_fraction for block in blocks):
        return "artifacts" if rule.kind == "auto" else "outliers"
    return "clean" if all(block.max <= EVIDENT * block.median for block in blocks) else "long tail"


def _trimmed_histogram(axis: LogAxis, counts: NDArray[np.int64]) -> Histogram:
    """The steps from the first to the last that holds a patch."""
    per_step = counts.reshape(-1, BINS_PER_STEP).sum(1)
    filled = np.flatnonzero(per_step)
    first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)
    edges = axis.edges()[::BINS_PER_STEP][first : last + 1]
    return Histogram(tuple(edges.round(4).tolist()), tuple(per_step[first:last].tolist()))
