"""What did this patch look like? What a patch token still knows of its own pixels.

Linear regression from a patch token to the pixels of its patch (Figure 5b and Table 5 of "Vision Transformers Need
Registers"); `patch_kinds.SUBJECTS` says what the rows are fitted and tested on. It is solved exactly, from sums over
one pass, so that nothing depends on an optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.common.devices import summing_device
from vitreg.common.progress import OnProgress
from vitreg.images import ImageSet, ImageStream
from vitreg.model.preprocess import IMAGENET_MEAN, IMAGENET_STD
from vitreg.probes.heads.least_squares import Moments, fit_linear
from vitreg.probes.protocols import ReconstructionConfig
from vitreg.probes.results.score import ProbeResult
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.tasks.patch_kinds import Group, Positions, Subject, marked_patches, subject_sums

NAME = "reconstruction error"
_BATCH = 32


def reconstruction(
    train: FeatureStore,
    val: FeatureStore,
    train_images: ImageSet,
    val_images: ImageSet,
    config: ReconstructionConfig = ReconstructionConfig(),
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> ProbeResult:
    """Fit the reconstruction probe and test it.

    The score is the mean L2 norm of a patch's error over its `3 * p * p` values, for every subject. Pixels are
    normalized with ImageNet's mean and standard deviation whatever the model's own, so that models can be compared; the
    norm grows with the patch, so compare `explained variance` between models of different patch sizes.

    The paper does not say what its error is. In this unit a ViT-Ti with patches of 16 pixels has 21.9 on normal patches
    and 30.4 on outliers, which is 19.2 and 26.6 when scaled to patches of 14; the paper's are 18.4 and 25.2.

    The images that the stores are of are read again, the model does not see them again. Sums are in double precision.

    Raises:
        ValueError: the stores are of different models, of other images than given, or lack patch tokens of the block.
    """
    train.check_same_model(val)
    val = val.with_threshold_of(train)
    for store, images in ((train, train_images), (val, val_images)):
        store.check_images(images)
    positions = Positions.of(train, val, config.block)
    groups = positions.subjects
    source = _Source(config.block, summing_device(device), train.num_images + val.num_images, on_progress)
    moments = _moments(source.batches(train, train_images))
    fits = {group: fit_linear(moments[group]) for group in dict.fromkeys(groups.values())}
    means = {group: of_group.y / max(1, of_group.count) for group, of_group in moments.items()}

    def figures() -> Iterator[tuple[dict[Subject, Tensor], Bool[Tensor, "n P"]]]:
        for tokens, pixels, outlier in source.batches(val, val_images):
            of_fit = {group: (fit(tokens) - pixels).norm(dim=-1) for group, fit in fits.items()}
            of_mean = {group: (mean - pixels).norm(dim=-1) for group, mean in means.items()}
            pairs = {subject: (of_fit[group], of_mean[subject.tested_on]) for subject, group in groups.items()}
            yield {s: torch.stack([one, one**2, mean, mean**2], -1) for s, (one, mean) in pairs.items()}, outlier

    sums = subject_sums(figures())
    details: dict[str, Any] = {**positions.details}
    for subject, of_subject in sums.items():
        _, square, of_mean, square_of_mean, count = of_subject.T
        details[subject.name] = {
            "error of the mean patch": float(of_mean.sum() / count.sum()),
            "explained variance": float(1 - square.sum() / square_of_mean.sum()),
            "penalty": fits[groups[subject]].penalty,
        }
    return ProbeResult("reconstruction", tuple(positions.scores(NAME, sums, 0, lower_is_better=True)), details)


_Batch = tuple[Float[Tensor, "n P D"], Float[Tensor, "n P K"], Bool[Tensor, "n P"]]


@dataclass
class _Source:
    """Patch tokens beside the pixels of their patches."""

    block: int
    device: torch.device
    total: int
    on_progress: OnProgress | None
    done: int = 0

    def batches(self, store: FeatureStore, images: ImageSet) -> Iterator[_Batch]:
        """Tokens, pixels and marks of some images at a time; images are decoded in threads."""
        to_imagenet = dataclasses.replace(store.preprocess, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        numbers = store.numbers
        for rows, tokens, outlier in marked_patches(store, self.block):
            stream = ImageStream(
                images,
                store.preprocess,
                numbers=numbers[rows].tolist(),
                batch_size=_BATCH,
                strict=True,
                device=self.device,
            )
            for batch, some, marks in zip(stream, tokens.split(_BATCH), outlier.split(_BATCH), strict=True):
                pixels = to_imagenet.normalize(store.preprocess.unnormalize(batch.images))
                yield some.to(self.device), patchify(pixels, store.grid), marks.to(self.device)
                self.done += len(some)
                if self.on_progress is not None:
                    self.on_progress(self.done, self.total)


def patchify(images: Float[Tensor, "n 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "n P K"]:
    """The pixels of every patch, row by row of the grid."""
    height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
    return torch.nn.functional.unfold(images, (height, width), stride=(height, width)).transpose(1, 2)


def _moments(batches: Iterator[_Batch]) -> dict[Group, Moments]:
    """Of each group; those of all patches are the sum of the others."""
    found: dict[Group, Moments] = {}
    for tokens, pixels, outlier in batches:
        for group in (Group.NORMAL, Group.OUTLIER):
            member = group.members(outlier)
            part = Moments.of(tokens[member], pixels[member])
            found[group] = found[group] + part if group in found else part
    return {**found, Group.ALL: found[Group.NORMAL] + found[Group.OUTLIER]}
