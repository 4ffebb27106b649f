"""Images of colored squares with a class and a depth for every color, and their features."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from probes.small import small_vit
from vitreg.images import DenseSet
from vitreg.probes import FeaturesConfig, FeatureStore, extract
from vitreg.probes.store.dense_features import dense_preprocess

COLORS = np.array([[230, 20, 20], [20, 230, 20], [20, 20, 230]], np.uint8)
ROWS, COLUMNS, SQUARE = 4, 6, 20
"""In patches; a square is 20 pixels of the image and 16 of the model's input."""
CONFIG = FeaturesConfig(blocks=(0, -1), dtype="float32", shard_size=5)


def squares(folder: Path, *, train: int = 24, val: int = 7) -> Path:
    """`masks` with the colors' numbers, `depth` of 1, 2 and 3 meters, some of both unknown."""
    rng = np.random.default_rng(0)
    for part, number in (("train", train), ("val", val)):
        for kind in ("images", "masks", "depth"):
            (folder / part / kind).mkdir(parents=True)
        for i in range(number):
            classes = rng.integers(3, size=(ROWS, COLUMNS)).repeat(SQUARE, 0).repeat(SQUARE, 1)
            Image.fromarray(COLORS[classes]).save(folder / part / "images" / f"{i:02}.png")
            unknown = np.zeros(classes.shape, dtype=bool)
            unknown[: 5 * (i % 3), 7:50] = True
            for kind, values in (("masks", np.where(unknown, 255, classes).astype(np.uint8)),
                                 ("depth", np.where(unknown, 0, 1000 * (classes + 1)).astype(np.uint16))):  # fmt: skip
                Image.fromarray(values).save(folder / part / kind / f"{i:02}.png")
    return folder


def stores(
    sets: tuple[DenseSet, DenseSet], out: Path, *, scale: int = 1, config: FeaturesConfig = CONFIG
) -> tuple[FeatureStore, FeatureStore]:
    """Features of the small model, whose grid is `scale` times 4 x 6."""
    vit = small_vit()
    preprocess = dense_preprocess(vit.preprocess, 16 * ROWS * scale, 16 * COLUMNS * scale)
    train, val = (
        extract(vit, images, out / f"{part}-{scale}", config, preprocess=preprocess)
        for images, part in zip(sets, ("train", "val"), strict=True)
    )
    return train, val


def with_patches(config: FeaturesConfig, patches: int) -> FeaturesConfig:
    return dataclasses.replace(config, patches=patches)


def all_patches(store: FeatureStore, block: int) -> torch.Tensor:
    return torch.cat([patches for _, patches in store.patches(block)])
