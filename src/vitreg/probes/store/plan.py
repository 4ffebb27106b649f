"""What a feature pass will take: shards, bytes and hours, from its first images."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitreg.images import ImageSet, Subset, open_shards
from vitreg.model import VisionTransformer
from vitreg.probes.store.extract import extract
from vitreg.probes.store.origin import FeaturesConfig

_BATCHES = 6


@dataclass(frozen=True)
class ExtractionPlan:
    """What `extract` would do.

    Attributes:
        num_shards: files.
        num_images: of all shards; where they are in tars, as many in each as in the first, by its bytes.
        num_bytes: of the store.
        images_per_second: of one process like this, with reading and writing.
    """

    num_shards: int
    num_images: int
    num_bytes: int
    images_per_second: float

    @property
    def seconds(self) -> float:
        """Of one process."""
        return self.num_images / self.images_per_second


def plan_extraction(
    vit: VisionTransformer,
    images: ImageSet | str | os.PathLike[str],
    config: FeaturesConfig,
    *,
    batch_size: int = 32,
) -> ExtractionPlan:
    """Compute a few batches and throw them away.

    Raises:
        ValueError: as of `extract`.
    """
    shards = open_shards(images, config.shard_size)
    first = shards.open(0)
    some = Subset(first, np.arange(min(len(first), _BATCHES * batch_size)))
    times: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        extract(
            vit, some, Path(folder) / "store", config, batch_size=batch_size,
            on_progress=lambda done, _: times.append((time.perf_counter(), done)),
        )  # fmt: skip
        times.append((time.perf_counter(), len(some)))
    # The first batch pays for what is set up once, where there are others.
    (begin, before), (end, done) = times[0], times[-1]
    rate = max(done - before, 1) / (end - begin)
    num_images = shards.num_images or round(len(first) / shards.share(0))
    return ExtractionPlan(len(shards), num_images, config.num_bytes(vit.config, vit.preprocess, num_images), rate)
