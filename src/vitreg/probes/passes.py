"""The feature passes that probes need of a model: at which size, what is kept, and the stores that they leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vitreg.common.progress import OnProgress
from vitreg.common.words import safe_name, size_in_words
from vitreg.images import DenseSet, image_size
from vitreg.model import Preprocess, VisionTransformer
from vitreg.probes.catalogue import EvalData, Probe, Task
from vitreg.probes.pace import telling_how_long
from vitreg.probes.results.result_cache import size_in_pixels
from vitreg.probes.store.dense_features import dense_preprocess
from vitreg.probes.store.extract import extract
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.store.manifest import read_manifest
from vitreg.probes.store.origin import FeaturesConfig, Origin, StoredModel
from vitreg.probes.tasks.linear import linear_blocks

_IMAGES_A_SHARD = 256
"""Probes read patch tokens a file at a time."""

_CROP = 224 / 256
"""The part of an image that DINOv2's evaluations keep: resized to 256, and the middle 224."""


@dataclass(frozen=True)
class PassConfig:
    """How features are computed.

    Attributes:
        patch_images: patch tokens are kept of so many images of a classification set: 10000 images of a ViT-L/14 are
            5 GB.
        batch_size: images at a time.
        strict: an image that cannot be read is an error, also where features or answers without it are there.
    """

    patch_images: int = 10000
    batch_size: int = 32
    strict: bool = False


@dataclass(frozen=True)
class Passes:
    """Those of one model.

    Attributes:
        vit: the model.
        source: what it was loaded from.
        folder: keeps the features.
        config: how they are computed.
        stage: makes a progress bar of what is being done.
        say: told what will take how long, and how many bytes, before it starts.
    """

    vit: VisionTransformer
    source: str
    folder: Path
    config: PassConfig
    stage: Callable[[str], AbstractContextManager[OnProgress]]
    say: Callable[[str], None]

    @cached_property
    def model(self) -> StoredModel:
        """What the features are of."""
        return StoredModel.of(self.vit)

    def store(self, data: EvalData, part: str, preprocess: Preprocess, features: FeaturesConfig) -> FeatureStore:
        """The features of the training or validation part: those that are there, if they have all that is needed."""
        origin = Origin(self.model, preprocess, data.stored[part], features.for_depth(self.vit.config.depth))
        if (found := _find_store(self.folder, origin)) is not None:
            if self.config.strict:
                found.check_complete()
            return found
        images = data.train if part == "training" else data.val
        # Other images, sizes or blocks are another folder, so that one evaluation never stands in the way of the next.
        out = self.folder / f"{safe_name(self.source)}-{data.task}-{part}-{origin.digest()[:12]}"
        what = f"{self.source}: features of {len(images)} {part} images at {size_in_pixels(preprocess.size)}"
        num_bytes = features.num_bytes(self.vit.config, preprocess, len(images))
        self.say(f"{what} take {size_in_words(num_bytes)} in {self.folder}")
        with self.stage(what) as on_progress:
            return extract(
                self.vit,
                images,
                out,
                features,
                preprocess=preprocess,
                batch_size=self.config.batch_size,
                strict=self.config.strict,
                on_progress=telling_how_long(lambda told: self.say(f"{what}: {told} left"), on_progress),
            )

    def features(self, task: Task, probes: Iterable[tuple[Probe, Any]]) -> FeaturesConfig:
        """What probes, with their settings, need together.

        Of a classification set the class tokens of the last blocks are kept in any case, 10 kB an image of a ViT-L,
        because k-NN is often followed by the linear probe, and another pass takes hours. Patch tokens are kept for who
        asks.
        """
        depth = self.vit.config.depth
        blocks, patch_blocks, patches = set[int](), set[int](), None
        for probe, settings in probes:
            needed = {block % depth for block in probe.blocks(settings, depth)}
            blocks |= needed
            patch_blocks |= needed if probe.patches else set()
        if task == "classification":
            patches = self.config.patch_images if patch_blocks else 0
            blocks |= {block % depth for block in linear_blocks(depth)}
            patch_blocks |= {depth - 1}
        return FeaturesConfig(tuple(sorted(blocks)), patches, tuple(sorted(patch_blocks)), shard_size=_IMAGES_A_SHARD)


def _find_store(folder: Path, wanted: Origin) -> FeatureStore | None:
    """A finished store that has what is wanted, and maybe more."""
    for path in sorted(folder.glob("*/manifest.json")):
        try:
            manifest = read_manifest(path.parent)
        except ValueError:  # it stands in nobody's way
            continue
        if manifest is not None and manifest.finding is not None and manifest.origin.covers(wanted):
            return FeatureStore.open(path.parent)
    return None


def preprocessing(vit: VisionTransformer, probe: Probe, data: EvalData, scale: float = 1.0) -> Preprocess:
    """What is done to images: all of each where every pixel is asked for, else what a checkpoint or a protocol crops.

    At a size that is not the checkpoint's own, DINOv2's crop is taken. A model keeps its own size where it is below the
    protocol's, and a size that was asked for goes before both; `scale` is by how much images are enlarged besides.
    """
    own, size = vit.preprocess, data.size
    if isinstance(data.train, DenseSet):
        height, width = size or image_size(data.train.name(0))
        if size is None and probe.size is not None:
            scale *= probe.size / min(height, width)
        return dense_preprocess(own, *_whole_patches(vit, (height, width), scale))
    side = min(own.size) if probe.size is None else probe.size
    if size is None and side >= min(own.size):
        return own
    size = _whole_patches(vit, size or (side, side))
    return own if size == own.size else dataclasses.replace(own, size=size, crop="center", crop_pct=_CROP)


def _whole_patches(vit: VisionTransformer, size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    patch = vit.config.patch_size
    height, width = (max(1, round(scale * side / patch)) * patch for side in size)
    return height, width
