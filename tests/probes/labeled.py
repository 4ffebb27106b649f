"""Small stores of some classes of real images, for probes of classification; also for a process that tests kill."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from probes.small import Images, small_vit
from vitreg.images import open_image_set
from vitreg.probes import FeaturesConfig, FeatureStore, extract
from vitreg.probes.protocols import LinearConfig
from vitreg.probes.tasks.linear import linear

ALL_BLOCKS = FeaturesConfig(blocks=(0, 1, 2), dtype="float32")
KILLED = LinearConfig(learning_rates=(0.01, 0.1), epochs=2, epoch_length=150, head_batch_size=16)


def images_of(data: Path, part: str, labels: Sequence[int], each: int) -> Images:
    """So many images of each of some classes of tiny-imagenet-100."""
    images = open_image_set(data / "tiny-imagenet-100" / f"{part}.parquet")
    assert images.labels is not None
    indices = [i for label in labels for i in [n for n, found in enumerate(images.labels) if found == label][:each]]
    return Images(images, indices)


def small_stores(data: Path, folder: Path) -> tuple[FeatureStore, FeatureStore]:
    """Features of five classes from a small random model."""
    labels = (3, 7, 20, 50, 99)
    train, val = (
        extract(small_vit(), images_of(data, part, labels, each), folder / part, ALL_BLOCKS)
        for part, each in (("train", 24), ("val", 12))
    )
    return train, val


def train_killed(train: Path, val: Path, state: Path, out: Path) -> None:
    """A linear probe that writes its state after every iteration, and its result at the end; slow enough to be hit."""
    torch.set_num_threads(1)
    stores = FeatureStore.open(train), FeatureStore.open(val)
    result = linear(*stores, KILLED, state=state, save_seconds=0, on_progress=lambda *_: time.sleep(0.01))
    out.write_text(json.dumps([result.details, result.scores[0].sums.tolist()]))
