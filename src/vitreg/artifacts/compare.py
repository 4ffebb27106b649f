"""Diagnosing two models, or several, in one pass over the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from vitreg.artifacts.comparison import BlockChange, Comparison
from vitreg.artifacts.diagnosis import Diagnosis
from vitreg.artifacts.histogram import BINS_PER_STEP, NUM_BINS, add_counts
from vitreg.artifacts.observer import Observer, look_through
from vitreg.artifacts.outcome import judge, write_comparison_verdict
from vitreg.checkpoints import ObservedViT, convert_or_observe
from vitreg.common.progress import OnProgress
from vitreg.images import Batches, Images
from vitreg.model import Tokens, Trace, VisionTransformer

Model = VisionTransformer | ObservedViT


def compare(
    before: VisionTransformer | nn.Module,
    after: VisionTransformer | nn.Module,
    images: Images,
    *,  # as of `diagnose`, written out for whoever looks up the signature
    threshold: float | int | str = "auto",
    block: int | Literal["auto"] = "auto",
    batch_size: int = 32,
    max_examples: int = 20,
    strict: bool = False,
    limit: int | None = None,
    keep_partial: bool = False,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Diagnose two models on the same images, in one pass, and say what changed.

    Made for a model and its fix; any two models of the same depth that cut images into the same patches will do.

    Args:
        before: the first model, as for `diagnose`.
        after: the second.
        images: as for `diagnose`; the first model's preprocessing is used, with the second's mean and deviation for it.
        threshold: as for `diagnose`.
        block: as for `diagnose`.
        batch_size: images at a time.
        max_examples: images kept whole for the report.
        strict: a file that cannot be read is an error, instead of being skipped and listed.
        limit: as for `diagnose`.
        keep_partial: on Ctrl-C, return what was found so far instead of raising KeyboardInterrupt.
        on_progress: called with the number of images done and their total, where it is known.

    Raises:
        ValueError: models that cannot be compared, or whatever `diagnose` raises.
    """
    (comparison,) = compare_each(
        before,
        [after],
        images,
        threshold=threshold,
        block=block,
        batch_size=batch_size,
        max_examples=max_examples,
        strict=strict,
        limit=limit,
        keep_partial=keep_partial,
        on_progress=on_progress,
    )
    return comparison


def compare_each(
    before: VisionTransformer | nn.Module,
    others: Sequence[VisionTransformer | nn.Module],
    images: Images,
    *,
    threshold: float | int | str = "auto",
    block: int | Literal["auto"] = "auto",
    batch_size: int = 32,
    max_examples: int = 20,
    strict: bool = False,
    limit: int | None = None,
    keep_partial: bool = False,
    on_progress: OnProgress | None = None,
) -> list[Comparison]:
    """Compare several models with one, in one pass over the same images; all else is as for `compare`.

    Returns:
        What `compare` would say of each of the others.
    """
    before = convert_or_observe(before)
    afters = [convert_or_observe(after) for after in others]
    for after in afters:
        _check_comparable(before, after)
    models = [before, *afters]
    observers = [Observer(vit, threshold=threshold, block=block, max_examples=max_examples) for vit in models]
    device = next(before.parameters()).device
    features = [_Features(before, after) for after in afters]

    def look(batch: Tensor) -> list[tuple[Tensor, Trace]]:
        normalized = [batch, *(_as_normalized_by(after, before, batch) for after in afters)]
        return [(own, observer.look(own)) for observer, own in zip(observers, normalized, strict=True)]

    def note(seen: list[tuple[Tensor, Trace]], batch: Tensor, names: list[str]) -> None:
        for observer, (own, trace) in zip(observers, seen, strict=True):
            observer.note(trace, own, names)
        (_, first), *rest = seen
        bins = observers[0].bins(first)
        for of_pair, (_, trace) in zip(features, rest, strict=True):
            of_pair.add(first.tokens, trace.tokens, bins)

    batches = Batches(images, before.preprocess, batch_size=batch_size, device=device, strict=strict, limit=limit)
    ending = look_through(batches, look, note, models, keep_partial=keep_partial, on_progress=on_progress)
    one, *rest = (observer.conclude(**ending) for observer in observers)
    found = []
    for after, two, observer, of_pair in zip(afters, rest, observers[1:], features, strict=True):
        blocks = tuple(_block_change(i, [observers[0], observer], one, two) for i in range(before.config.depth))
        comparison = Comparison(
            before=one,
            after=two,
            blocks=blocks,
            outcome=judge(one, two, blocks),
            patch_similarity=of_pair.patch_similarity(one.block, observers[0].decision.steps[one.block]),
            cls_similarity=of_pair.mean("cls"),
            head_agreement=of_pair.mean("agreement"),
            head_similarity=of_pair.mean("head"),
            seconds=ending["seconds"],
            same_model=_are_same(before, after),
        )
        found.append(dataclasses.replace(comparison, verdict=write_comparison_verdict(comparison)))
    return found


def _check_comparable(before: Model, after: Model) -> None:
    for what, one, two in (
        ("blocks", before.config.depth, after.config.depth),
        ("pixels to a side of a patch", before.config.patch_size, after.config.patch_size),
        ("(height, width) in pixels of an image", before.preprocess.size, after.preprocess.size),
        ("class token", before.config.class_token, after.config.class_token),
    ):
        if one != two:
            raise ValueError(f"the models cannot be compared block by block: {what}: {one} and {two}; diagnose each")


def _are_same(before: Model, after: Model) -> bool:
    one, two = before.state_dict(), after.state_dict()
    alike = before.config == after.config and one.keys() == two.keys()
    return alike and all(torch.equal(one[name], two[name].to(one[name])) for name in one)


def _as_normalized_by(after: Model, before: Model, batch: Tensor) -> Tensor:
    """The batch in the second model's normalization, dtype and device."""
    one, two = before.preprocess, after.preprocess
    if (one.mean, one.std) != (two.mean, two.std):
        batch = two.normalize(one.unnormalize(batch))
    return batch.to(next(after.parameters()).device)


def _block_change(i: int, observers: list[Observer], one: Diagnosis, two: Diagnosis) -> BlockChange:
    pairs = zip(observers[0].decision.steps, observers[1].decision.steps, strict=True)
    steps = [a if a is not None else b for a, b in pairs]
    threshold = one.blocks[i].threshold
    values: dict[str, Any] = {}
    for name, observer, diagnosis in (("before", observers[0], one), ("after", observers[1], two)):
        statistics, block = observer.statistics, diagnosis.blocks[i]
        values |= {
            f"outlier_fraction_{name}": statistics.num_above(i, steps[i]) / diagnosis.num_patches,
            f"max_{name}": block.max,
            f"median_{name}": block.median,
            f"p99_{name}": block.p99,
            f"attention_on_outliers_{name}": statistics.attention_on_outliers(i, steps[i - 1] if i else None),
            f"attention_on_registers_{name}": block.attention_on_registers
            if diagnosis.model["num_registers"]
            else None,
        }
    return BlockChange(block=i, threshold=two.blocks[i].threshold if threshold is None else threshold, **values)


class _Features:
    """Sums of the cosines between two models' outputs; those of patches by the norm of the patch in the first model."""

    def __init__(self, before: Model, after: Model) -> None:
        self._models = (before, after)
        self._patches = torch.zeros(2, before.config.depth, NUM_BINS, dtype=torch.float64)
        self._sums: dict[str, float] = {}
        self._num_images = 0

    @torch.inference_mode()
    def add(self, before: Tokens, after: Tokens, bins: Int[Tensor, "L B N"]) -> None:
        self._num_images += len(before.patches)
        if before.patches.shape == after.patches.shape:
            cosine = _cosine(before.patches, after.patches).cpu()
            rows = torch.arange(len(bins))[:, None, None].expand_as(bins)
            for total, weights in zip(self._patches, (cosine, torch.ones_like(cosine)), strict=True):
                add_counts(total, rows, bins, weights.expand_as(bins))
            if before.cls is not None and after.cls is not None:
                self._add("cls", _cosine(before.cls, after.cls))
        pairs = zip(self._models, (before, after), strict=True)
        heads = [(vit, tokens) for vit, tokens in pairs if isinstance(vit, VisionTransformer)]
        outputs = [vit.head(vit.pool(tokens)).cpu() for vit, tokens in heads if vit.head is not None]
        if len(outputs) == 2 and outputs[0].shape == outputs[1].shape:
            self._add("head", _cosine(*outputs))
            self._add("agreement", (outputs[0].argmax(-1) == outputs[1].argmax(-1)).float())

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(values.sum())

    def mean(self, name: str) -> float | None:
        return self._sums[name] / self._num_images if name in self._sums else None

    def patch_similarity(self, block: int, step: int | None) -> float | None:
        """Over the patches below a step of the axis after a block."""
        cosines, counts = self._patches[:, block, : None if step is None else step * BINS_PER_STEP].sum(-1).tolist()
        return cosines / counts if counts else None


def _cosine(one: Tensor, two: Tensor) -> Tensor:
    return F.cosine_similarity(one.float(), two.to(one.device).float(), dim=-1)
