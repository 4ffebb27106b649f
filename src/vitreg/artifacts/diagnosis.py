"""Does a model have artifacts, where, from which block on, and what do they do to its attention?"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from vitreg.artifacts.examples import Examples
from vitreg.artifacts.histogram import BINS_PER_STEP, LogAxis
from vitreg.artifacts.statistics import NormStatistics
from vitreg.artifacts.threshold import Rule, parse_rule, threshold_step
from vitreg.artifacts.verdict import position_kind, write_verdict
from vitreg.images import ImageBatch, ImageStream, SkippedImage, find_images
from vitreg.model import VisionTransformer
from vitreg.report import ExampleMaps, write_report

Images = Float[Tensor, "B 3 H W"] | str | os.PathLike[str] | Iterable[Any]


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
        histogram: edges and counts, on a logarithmic axis.
    """

    block: int
    median: float
    p99: float
    max: float
    threshold: float | None
    outlier_fraction: float
    attention_on_outliers: float | None
    attention_on_registers: float | None
    histogram: tuple[tuple[float, ...], tuple[int, ...]] = field(repr=False)


@dataclass(frozen=True)
class NeighbourSimilarity:
    """Mean cosine of a patch with its four neighbours right after patch embedding (paper, section 2.1, Fig. 5a)."""

    outliers: float | None
    others: float | None


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; norms are L2, after a block and before the final norm, blocks count from 0.

    Attributes:
        has_artifacts: whether the norms of any block have a second mode (or, with a threshold that was asked for,
            whether any patch reaches it).
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
        channels: (channel, share of the outliers' squared norm), largest first.
        num_images, num_patches: what was looked at.
        skipped: files that could not be read.
        interrupted: whether it was stopped before the last image.
        seconds: time it took.
        verdict: the findings in sentences.
        model: name and architecture of the model.
        image_size: (height, width) in pixels that the model saw.
        examples: the first images with their maps, for the report.
    """

    has_artifacts: bool
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
    channels: tuple[tuple[int, float], ...]
    num_images: int
    num_patches: int
    skipped: tuple[SkippedImage, ...]
    interrupted: bool
    seconds: float
    model: dict[str, Any]
    image_size: tuple[int, int]
    verdict: tuple[str, ...] = ()
    examples: tuple[ExampleMaps, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the examples, in JSON types; `docs/diagnosis.md` describes the keys."""

        def plain(array: NDArray[np.float64] | None) -> Any:
            return None if array is None else np.round(array, 6).tolist()

        return {
            "format": "vitreg-diagnosis/1",
            "version": metadata.version("vitreg"),
            "model": self.model,
            "image_size": list(self.image_size),
            "grid": list(self.position_frequency.shape),
            "num_images": self.num_images,
            "num_patches": self.num_patches,
            "has_artifacts": self.has_artifacts,
            "outlier_fraction": self.outlier_fraction,
            "threshold": self.threshold,
            "threshold_rule": self.threshold_rule,
            "block": self.block,
            "onset_block": self.onset_block,
            "blocks": [_block_dict(block) for block in self.blocks],
            "position_frequency": plain(self.position_frequency),
            "position_kind": self.position_kind,
            "neighbour_similarity": dataclasses.asdict(self.neighbour_similarity),
            "register_norms": plain(self.register_norms),
            "cls_norms": plain(self.cls_norms),
            "channels": [{"channel": channel, "share": share} for channel, share in self.channels],
            "verdict": list(self.verdict),
            "skipped": [{"path": str(skip.path), "reason": skip.reason} for skip in self.skipped],
            "interrupted": self.interrupted,
            "seconds": self.seconds,
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `report.html` and `diagnosis.json` into a folder, which is made; returns the report's path.

        Raises:
            ValueError: the folder cannot be written.
        """
        folder = Path(folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            report = write_report(self.to_dict(), self.examples, folder / "report.html")
            temporary = folder / ".diagnosis.json.partial"
            temporary.write_text(json.dumps(self.to_dict(), indent=1))
            os.replace(temporary, folder / "diagnosis.json")
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
        return report


def diagnose(
    vit: VisionTransformer,
    images: Images,
    *,
    threshold: float | int | str = "auto",
    block: int | str = "auto",
    batch_size: int = 32,
    max_examples: int = 20,
    strict: bool = False,
    limit: int | None = None,
    keep_partial: bool = False,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> Diagnosis:
    """Look for artifacts in every block of a model.

    Images stream through once, in memory that does not grow with their number.

    Args:
        vit: the model; it is used on the device and in the dtype it is in.
        images: a normalised batch `[B, 3, H, W]`, a file, folder or glob, a list of these, or a DataLoader (or any
            iterable) of batches, or of tuples that begin with a batch.
        threshold: `"auto"` finds two separated modes or none (`two_modes`); or a norm such as 150, `"mean+3sd"`,
            `"5xmedian"`. The last two are rounded to 3 %.
        block: the block to report, or `"auto"`.
        batch_size: pictures at a time.
        max_examples: images kept whole for the report.
        strict: a file that cannot be read is an error, instead of being skipped and listed.
        limit: use only this many files, the first.
        keep_partial: on Ctrl-C, return what was found so far instead of raising KeyboardInterrupt.
        on_progress: called with the number of images done and their total, where it is known.

    Raises:
        ValueError: no images, an unknown threshold or block, or a model whose tokens are not finite.
    """
    rule = parse_rule(threshold)
    depth = vit.config.depth
    if block != "auto" and not (isinstance(block, int) and -depth <= block < depth):
        raise ValueError(f"block {block!r} does not exist; give 'auto' or a number from 0 to {depth - 1}")
    device = next(vit.parameters()).device
    axis = LogAxis(rule.value if rule.kind == "fixed" else None)
    batches, total, stream = _batches(vit, images, batch_size, strict, limit, device)
    examples = Examples(vit, max_examples)
    statistics: NormStatistics | None = None
    image_size = (0, 0)
    interrupted = False
    start = time.perf_counter()
    training = vit.training
    vit.eval()
    try:
        for batch, names in batches:
            with torch.inference_mode():
                trace = vit.trace(
                    batch,
                    attention_from=examples.queries(),
                    embeddings=True,
                    largest=examples.num_largest(),
                )
            if statistics is None:
                image_size = (batch.shape[-2], batch.shape[-1])
                statistics = NormStatistics(depth, trace.tokens.grid, axis, device)
            elif trace.tokens.grid != statistics.grid:
                raise ValueError(
                    f"images of {tuple(batch.shape[-2:])} pixels follow images of {image_size}: a diagnosis needs "
                    f"one size; let vit.preprocess crop them"
                )
            statistics.update(trace)
            examples.add(trace, batch, names)
            if on_progress is not None:
                on_progress(statistics.num_images, total)
    except KeyboardInterrupt:
        if not keep_partial or statistics is None:
            raise
        interrupted = True
    finally:
        vit.train(training)
    skipped = tuple(stream.skipped) if stream is not None else ()
    if statistics is None:
        reasons = f": {skipped[0].reason}" if skipped else ""
        raise ValueError(f"there were no images to look at{reasons}")
    return _conclude(
        vit,
        statistics,
        examples,
        rule,
        block,
        image_size=image_size,
        skipped=skipped,
        interrupted=interrupted,
        seconds=time.perf_counter() - start,
    )


def _batches(
    vit: VisionTransformer,
    images: Images,
    batch_size: int,
    strict: bool,
    limit: int | None,
    device: torch.device,
) -> tuple[Iterator[tuple[Tensor, list[str]]], int | None, ImageStream | None]:
    """Batches on the model's device with a name for each image, their number if known, and the stream of files."""
    if isinstance(images, Tensor):
        return _numbered(images.to(device).split(batch_size)), len(images), None
    if isinstance(images, str | os.PathLike):
        images = [images]
    if isinstance(images, list | tuple) and images and isinstance(images[0], str | os.PathLike):
        paths = find_images(images)
        stream = ImageStream(paths, vit.preprocess, batch_size=batch_size, strict=strict, limit=limit, device=device)
        return ((b.images, [p.name for p in b.paths]) for b in stream), len(stream), stream
    return _numbered(_tensor(batch).to(device) for batch in images), None, None


def _tensor(batch: Any) -> Tensor:
    """The images of what a DataLoader yields."""
    if isinstance(batch, ImageBatch):
        return batch.images
    if isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise ValueError(f"images yields {type(batch).__name__}; expected batches [B, 3, H, W] or tuples beginning so")
    return batch


def _numbered(batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[str]]]:
    done = 0
    for batch in batches:
        yield batch, [f"image {done + i + 1}" for i in range(len(batch))]
        done += len(batch)


def _conclude(
    vit: VisionTransformer,
    statistics: NormStatistics,
    examples: Examples,
    rule: Rule,
    block: int | str,
    *,
    image_size: tuple[int, int],
    skipped: tuple[SkippedImage, ...],
    interrupted: bool,
    seconds: float,
) -> Diagnosis:
    """Choose thresholds, block and onset from the sums, and put the findings into words."""
    axis, depth = statistics.axis, statistics.depth
    counts = statistics.counts()
    mean, sd, largest = statistics.moments()
    steps = [threshold_step(rule, axis, counts[i], mean[i], sd[i]) for i in range(depth)]
    above = [0 if step is None else int(counts[i, step * BINS_PER_STEP :].sum()) for i, step in enumerate(steps)]
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
    reported = _reported_block(blocks) if isinstance(block, str) else block % depth
    onset = reported if above[reported] else None
    while onset is not None and onset > 0 and above[onset - 1]:
        onset -= 1
    step = steps[reported] if above[reported] else None
    frequency = statistics.position_frequency(reported, step)
    threshold = blocks[reported].threshold if step is not None else None
    diagnosis = Diagnosis(
        has_artifacts=any(above),
        outlier_fraction=blocks[reported].outlier_fraction,
        threshold=threshold,
        threshold_rule=rule.describe(),
        block=reported,
        onset_block=onset,
        blocks=blocks,
        position_frequency=frequency,
        position_kind=position_kind(frequency, statistics.num_images),
        neighbour_similarity=NeighbourSimilarity(*statistics.mean_similarity(reported, step)),
        register_norms=statistics.mean_register_norms() if vit.num_registers else None,
        cls_norms=statistics.mean_cls_norms(),
        channels=examples.channel_shares(reported, threshold),
        num_images=statistics.num_images,
        num_patches=num_patches,
        skipped=skipped,
        interrupted=interrupted,
        seconds=seconds,
        model=_model_card(vit),
        image_size=image_size,
        examples=tuple(examples.maps),
    )
    return dataclasses.replace(diagnosis, verdict=write_verdict(diagnosis))


def _reported_block(blocks: tuple[BlockNorms, ...]) -> int:
    """The last block, which is what users read; where only inner blocks have outliers, the worst of those."""
    if blocks[-1].outlier_fraction or not any(b.outlier_fraction for b in blocks):
        return len(blocks) - 1
    return max(blocks, key=lambda b: b.max / b.median if b.outlier_fraction else 0.0).block


def _trimmed_histogram(axis: LogAxis, counts: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The steps from the first to the last that holds a patch."""
    per_step = counts.reshape(-1, BINS_PER_STEP).sum(1)
    filled = np.flatnonzero(per_step)
    first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)
    edges = axis.edges()[::BINS_PER_STEP][first : last + 1]
    return tuple(float(e) for e in edges), tuple(int(c) for c in per_step[first:last])


def _block_dict(block: BlockNorms) -> dict[str, Any]:
    values = dataclasses.asdict(block)
    edges, counts = values.pop("histogram")
    return {**values, "histogram": {"edges": [round(e, 4) for e in edges], "counts": list(counts)}}


def _model_card(vit: VisionTransformer) -> dict[str, Any]:
    config = vit.config
    return {
        "name": config.name or config.architecture or "Vision Transformer",
        "family": config.architecture,
        "parameters": sum(p.numel() for p in vit.parameters()),
        "patch_size": config.patch_size,
        "num_registers": config.num_registers,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "embed_dim": config.embed_dim,
        "has_class_token": config.class_token,
    }
