"""Watching a model look at images, and saying what was seen."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypedDict, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitreg.artifacts.conclusion import check_block, choose_thresholds, conclude
from vitreg.artifacts.decision import Decision
from vitreg.artifacts.diagnosis import Diagnosis
from vitreg.artifacts.examples import Examples
from vitreg.artifacts.histogram import LogAxis
from vitreg.artifacts.measures import MEASURES, probe_images
from vitreg.artifacts.statistics import NormStatistics
from vitreg.artifacts.threshold import parse_rule
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
        check_block(block, vit.config.depth)
        self._vit, self._block = vit, block
        self._rule = parse_rule(threshold)
        self._axis = LogAxis(self._rule.value if self._rule.kind == "fixed" else None)
        self._examples = Examples(vit, max_examples)
        self._measures = {name: sums(vit) for name, sums in MEASURES.items()}
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
        return choose_thresholds(self.statistics, self._rule)

    def conclude(self, *, skipped: tuple[SkippedImage, ...], interrupted: bool, seconds: float) -> Diagnosis:
        """Choose thresholds, block and onset from the sums, and put the findings into words."""
        self._look_at_probes()
        return conclude(
            self.statistics,
            self.decision,
            self._rule,
            block=self._block,
            channels=self._examples.channel_shares,
            skipped=skipped,
            interrupted=interrupted,
            seconds=seconds,
            model=model_card(self._vit),
            image_size=self._image_size,
            examples=tuple(self._examples.maps),
            measured={name: sums.conclude() for name, sums in self._measures.items()},
        )


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


def model_card(vit: VisionTransformer | ObservedViT) -> dict[str, Any]:
    """What a diagnosis says of the model."""
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
        "num_summary_tokens": config.num_summary_tokens,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "embed_dim": config.embed_dim,
        "has_class_token": config.class_token,
        "changes": list(config.changes),
        **({"observed": observed} if observed else {}),
    }
