"""Watching a model look at images, and saying what was seen."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from vitreg.artifacts.decision import EVIDENT, Decision, decide
from vitreg.artifacts.diagnosis import BlockNorms, Diagnosis, Histogram, NeighbourSimilarity, Status
from vitreg.artifacts.examples import Examples
from vitreg.artifacts.histogram import BINS_PER_STEP, LogAxis
from vitreg.artifacts.measures import MEASURES, probe_images
from vitreg.artifacts.outliers import onset, reported_block
from vitreg.artifacts.statistics import NormStatistics
from vitreg.artifacts.threshold import parse_rule, threshold_step
from vitreg.artifacts.verdict import position_kind, write_verdict
from vitreg.checkpoints import ObservedViT, convert_or_observe
from vitreg.common.modes import evaluating
from vitreg.common.progress import OnProgress
from vitreg.images import Batches, Images, SkippedImage, no_images
from vitreg.model import ObservedConfig, Trace, VisionTransformer

Seen = TypeVar("Seen")


class Observer:
    """Adds up what a model does with batch after batch, in memory that does not grow with their number.

    Args:
        vit: the model, in evaluation mode; it is used on the device and in the dtype it is in.
        threshold, block, max_examples: as of `diagnose`.

    Raises:
        ValueError: an unknown threshold or block.
    """

    def __init__(
        self, vit: VisionTransformer | ObservedViT, *, threshold: float | int | str, block: int | str, max_examples: int
    ) -> None:
        depth = vit.config.depth
        if block != "auto" and not (isinstance(block, int) and -depth <= block < depth):
            raise ValueError(f"block {block!r} does not exist; give 'auto' or a number from 0 to {depth - 1}")
        self._vit, self._block = vit, block
        self._rule = parse_rule(threshold)
        self._axis = LogAxis(self._rule.value if self._rule.kind == "fixed" else None)
        self._examples = Examples(vit, max_examples)
        self._measures = {name: sums(vit.config) for name, sums in MEASURES.items()}
        self._summaries = {key: made for sums in self._measures.values() for key, made in sums.summaries.items()}
        self._statistics: NormStatistics | None = None
        self._image_size = (0, 0)

    @property
    def statistics(self) -> NormStatistics:
        """What was added up over at least one batch."""
        assert self._statistics is not None
        return self._statistics

    @torch.inference_mode()
    def look(self, batch: Float[Tensor, "B 3 H W"]) -> Trace:
        """Run the model on a batch; until it is noted, the batch does not count."""
        return self._vit.trace(
            batch,
            attention_from=self._examples.queries(),
            embeddings=True,
            largest=self._examples.num_largest(),
            summaries=self._summaries,
        )

    @torch.inference_mode()
    def note(self, trace: Trace, batch: Float[Tensor, "B 3 H W"], names: list[str]) -> None:
        """Add a batch to what was seen.

        Raises:
            ValueError: a batch of another size than those before, or tokens that are not finite.
        """
        if self._statistics is None:
            self._image_size = (batch.shape[-2], batch.shape[-1])
            steps = self._vit.config.time_steps if isinstance(self._vit, ObservedViT) else 1
            self._statistics = NormStatistics(
                self._vit.config.depth, trace.tokens.grid, self._axis, batch.device, time_steps=steps
            )
        elif trace.tokens.grid != self._statistics.grid:
            raise ValueError(
                f"images of {tuple(batch.shape[-2:])} pixels follow images of {self._image_size}: a diagnosis needs "
                f"one size; let vit.preprocess crop them"
            )
        self._statistics.update(trace)
        self._examples.add(trace, batch, names)
        for sums in self._measures.values():
            sums.add(trace, names)

    @torch.inference_mode()
    def _look_at_probes(self) -> None:
        """Images that nobody gave, of the same size; they are in the ranges and nowhere else."""
        ranges = self._measures["ranges"]
        images, names = probe_images(self._vit.preprocess, self._image_size)
        with evaluating(self._vit):
            trace = self._vit.trace(images.to(next(self._vit.parameters()).device), summaries=ranges.summaries)
        ranges.add(trace, names, probes=True)

    def bins(self, trace: Trace) -> Int[Tensor, "L B N"]:
        """In which bin of the axis the norm of each patch lies, after every block; on the CPU."""
        return self._axis.bins(trace.patch_norms.flatten(2).cpu())

    @cached_property
    def decision(self) -> Decision:
        """From where on norms count as outliers; asked for after the last batch."""
        counts = self.statistics.counts()
        if self._rule.kind == "auto":
            return decide(self._axis, counts, self.statistics.num_images)
        mean, sd, _ = self.statistics.moments()
        return Decision(
            [threshold_step(self._rule, self._axis, *block) for block in zip(counts, mean, sd, strict=True)]
        )

    def conclude(self, *, skipped: tuple[SkippedImage, ...], interrupted: bool, seconds: float) -> Diagnosis:
        """Choose thresholds, block and onset from the sums, and put the findings into words."""
        self._look_at_probes()
        statistics, axis, steps, undecided = self.statistics, self._axis, self.decision.steps, self.decision.undecided
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
        reported = self._block % len(blocks) if isinstance(self._block, int) else None
        if reported is None:
            reported = reported_block(above, [block.max / block.median for block in blocks])
        step = steps[reported] if above[reported] else None
        frequency = statistics.position_frequency(reported, step)
        threshold = blocks[reported].threshold if step is not None else None
        diagnosis = Diagnosis(
            has_artifacts=None if undecided else any(above),
            status=self._status(blocks),
            undecided=undecided,
            outlier_fraction=blocks[reported].outlier_fraction,
            threshold=threshold,
            threshold_rule=self._rule.describe(),
            block=reported,
            onset_block=onset(above, reported),
            blocks=blocks,
            position_frequency=frequency,
            position_kind=position_kind(frequency, statistics.num_images),
            neighbour_similarity=NeighbourSimilarity(*statistics.mean_similarity(reported, step)),
            register_norms=statistics.mean_token_norms("registers"),
            cls_norms=statistics.mean_token_norms("cls"),
            channels=self._examples.channel_shares(reported, threshold),
            num_images=statistics.num_images,
            num_patches=num_patches,
            skipped=skipped,
            interrupted=interrupted,
            seconds=seconds,
            model=_model_card(self._vit),
            image_size=self._image_size,
            examples=tuple(self._examples.maps),
        )
        measured: dict[str, Any] = {name: sums.conclude() for name, sums in self._measures.items()}
        diagnosis = dataclasses.replace(diagnosis, **measured)
        return dataclasses.replace(diagnosis, verdict=write_verdict(diagnosis))

    def _status(self, blocks: Sequence[BlockNorms]) -> Status:
        if self.decision.undecided:
            return "cannot tell"
        if any(block.outlier_fraction for block in blocks):
            return "artifacts" if self._rule.kind == "auto" else "outliers"
        return "clean" if all(block.max <= EVIDENT * block.median for block in blocks) else "long tail"


def diagnose(
    vit: VisionTransformer | nn.Module,
    images: Images,
    *,
    threshold: float | int | str = "auto",
    block: int | str = "auto",
    batch_size: int = 32,
    max_examples: int = 20,
    strict: bool = False,
    limit: int | None = None,
    keep_partial: bool = False,
    on_progress: OnProgress | None = None,
) -> Diagnosis:
    """Look for artifacts in every block of a model.

    Images stream through once, in memory that does not grow with their number.

    Args:
        vit: the model, also one of timm, transformers or open_clip, or any module that `observe` takes; it is used on
            the device and in the dtype it is in.
        images: a normalized batch `[B, 3, H, W]` or image; a file, folder or glob, an image of Pillow or an array of
            8-bit pixels, or a list of these; a DataLoader (or any iterable) of batches, or of tuples that begin so.
        threshold: `"auto"` finds two separated modes or none (`two_modes`); or a norm such as 150, `"mean+3sd"`,
            `"5xmedian"`. The last two are rounded to 3 %.
        block: the block to report, or `"auto"`.
        batch_size: images at a time.
        max_examples: images kept whole for the report.
        strict: a file that cannot be read is an error, instead of being skipped and listed.
        limit: use only this many images, at equal distances; of an iterable of batches the first.
        keep_partial: on Ctrl-C, return what was found so far instead of raising KeyboardInterrupt.
        on_progress: called with the number of images done and their total, where it is known.

    Raises:
        ValueError: no images, an unknown threshold or block, or a model whose tokens are not finite.
    """
    vit = convert_or_observe(vit)
    observer = Observer(vit, threshold=threshold, block=block, max_examples=max_examples)
    device = next(vit.parameters()).device
    batches = Batches(images, vit.preprocess, batch_size=batch_size, device=device, strict=strict, limit=limit)
    ending = look_through(
        batches, observer.look, observer.note, [vit], keep_partial=keep_partial, on_progress=on_progress
    )
    return observer.conclude(**ending)


class Ending(TypedDict):
    """How a pass over the images ended; what `Observer.conclude` asks for."""

    skipped: tuple[SkippedImage, ...]
    interrupted: bool
    seconds: float


def look_through(
    batches: Batches,
    look: Callable[[Tensor], Seen],
    note: Callable[[Seen, Tensor, list[str]], None],
    models: Sequence[nn.Module],
    *,
    keep_partial: bool,
    on_progress: OnProgress | None,
) -> Ending:
    """Hand every batch to `look` and what that returns to `note`, with the models in evaluation mode meanwhile.

    Ctrl-C waits while `note` runs, so that a batch is in all sums or in none.

    Raises:
        ValueError: there were no images.
        KeyboardInterrupt: on Ctrl-C, unless `keep_partial` and something was looked at.
    """
    start, done, interrupted = time.perf_counter(), 0, False
    try:
        with evaluating(*models):
            for batch, names in batches:
                seen = look(batch)
                with _uninterrupted():
                    note(seen, batch, names)
                    done += len(names)
                if on_progress is not None:
                    on_progress(done, batches.total)
    except KeyboardInterrupt:
        if not (keep_partial and done):
            raise
        interrupted = True
    if not done:
        raise no_images(batches.skipped)
    return {"skipped": batches.skipped, "interrupted": interrupted, "seconds": time.perf_counter() - start}


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C comes afterwards. Only the main thread hears of it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    late: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: late.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if late:
        signal.raise_signal(signal.SIGINT)


def _trimmed_histogram(axis: LogAxis, counts: NDArray[np.int64]) -> Histogram:
    """The steps from the first to the last that holds a patch."""
    per_step = counts.reshape(-1, BINS_PER_STEP).sum(1)
    filled = np.flatnonzero(per_step)
    first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)
    edges = axis.edges()[::BINS_PER_STEP][first : last + 1]
    return Histogram(tuple(edges.round(4).tolist()), tuple(per_step[first:last].tolist()))


def _model_card(vit: VisionTransformer | ObservedViT) -> dict[str, Any]:
    config = vit.config
    observed = {}
    if isinstance(config, ObservedConfig):
        observed = {name: getattr(config, name) for name in ("assumed", "no_attention", "time_steps")}
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
        "changes": list(config.changes),
        **({"observed": observed} if observed else {}),
    }
