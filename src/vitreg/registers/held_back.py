"""Images that a fix has not seen, to tell whether it works and what it changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitreg.artifacts import BlockNorms, Diagnosis
from vitreg.images import Batches, Images
from vitreg.model import VisionTransformer

HELD_BACK_EVERY = 5
"""Of so many images one is held back."""

MOST = 64
"""Images kept in memory: more would tell the fractions apart no better than the choice needs."""


def hold_back(vit: VisionTransformer, images: Images, batch_size: int) -> tuple[Batches, Batches]:
    """Images to change a model by, and one in five to judge it by.

    Raises:
        ValueError: images that can be gone through only once.
    """

    def part(held_back: bool) -> Batches:
        def select(i: int) -> bool:
            return (i % HELD_BACK_EVERY == HELD_BACK_EVERY - 1) is held_back

        device = vit.patch_embed.weight.device
        return Batches(images, vit.preprocess, batch_size=batch_size, device=device, select=select)

    finding = part(False)
    if not finding.repeatable:
        raise ValueError("images can be gone through only once, but are needed again: give a list or a DataLoader")
    return finding, part(True)


@dataclass(frozen=True)
class Effect:
    """What a changed model does on the held-back images.

    Attributes:
        outliers: share of the patches that are still outliers, in the worst block.
        mean_outliers: that share, mean over all blocks: it also falls where later blocks write as many anew.
        similarity: mean cosine between the pooled features of the changed and of the original model.
    """

    outliers: float
    mean_outliers: float
    similarity: float


class HeldBack:
    """Judges changed models by images that were not used to change them.

    Args:
        vit: the original model.
        diagnosis: of the original, which says what an outlier is.
        batches: the images; the first `MOST` are kept.

    Raises:
        ValueError: there are no images.
    """

    @torch.inference_mode()
    def __init__(
        self, vit: VisionTransformer, diagnosis: Diagnosis, batches: Iterable[tuple[Tensor, list[str]]]
    ) -> None:
        images = list(islice((image for batch, _ in batches for image in batch), MOST))
        if not images:
            raise ValueError("none of the images that are held back to judge a fix can be read; give more, or others")
        self._batches = torch.stack(images).split(16)
        self.num_images = len(images)
        self._features = [vit.pool(vit(batch)).float() for batch in self._batches]
        self._limits = torch.tensor([outlier_limit(block) for block in diagnosis.blocks])
        self._vit = vit

    @cached_property
    def _unchanged(self) -> Effect:
        return self.effect(self._vit)

    @property
    def original(self) -> float:
        """`outliers` of the original."""
        return self._unchanged.outliers

    @property
    def mean_original(self) -> float:
        """`mean_outliers` of the original."""
        return self._unchanged.mean_outliers

    @torch.inference_mode()
    def effect(self, vit: VisionTransformer) -> Effect:
        """How many outliers a changed model has, and how far it is from the original."""
        above, similarity, num_patches = torch.zeros(len(self._limits)), 0.0, 0
        for batch, original in zip(self._batches, self._features, strict=True):
            trace = vit.trace(batch)
            norms = trace.patch_norms.flatten(1).cpu()
            above += (norms >= self._limits[:, None]).sum(1)
            num_patches += norms.shape[1]
            similarity += float(F.cosine_similarity(vit.pool(trace.tokens).float(), original, dim=-1).sum())
        above /= num_patches
        return Effect(float(above.max()), float(above.mean()), similarity / self.num_images)


def outlier_limit(block: BlockNorms) -> float:
    """From which norm on a patch of the changed model counts as an outlier after a block.

    The threshold of the original lies anywhere in the gap between its modes; what reaches less far above the clean
    patches, twice their 99th percentile and farther than any of them, is an outlier too.
    """
    if block.threshold is None:
        return float("inf")
    edges = np.array(block.histogram.edges)
    clean = np.where(edges[:-1] * edges[1:] < block.threshold**2, block.histogram.counts, 0)
    below = np.cumsum(clean)
    p99 = edges[1:][np.searchsorted(below, 0.99 * below[-1])]
    return float(min(block.threshold, max(2 * p99, edges[1:][clean > 0].max())))
