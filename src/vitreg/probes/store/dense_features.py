"""What probes of every pixel read: patch tokens of any image at any time, and the targets they are to predict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from vitreg.images import DenseSet
from vitreg.model import Preprocess
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.store.origin import check_same


def dense_preprocess(preprocess: Preprocess, height: int, width: int) -> Preprocess:
    """The preprocessing that keeps all of an image, squeezed to one size in pixels, so that every pixel has a patch."""
    return dataclasses.replace(preprocess, size=(height, width), crop="squash", crop_pct=1.0)


class DenseFeatures:
    """Patch tokens of a store's images, in any order.

    The files are mapped into memory: an image is read when it is asked for, and stays where there is room for it.

    Attributes:
        path, grid: of the store.
        numbers: positions in the set of the images that have patch tokens.
        channels: of a patch, over all blocks.
    """

    def __init__(self, store: FeatureStore, blocks: Sequence[int], *, with_cls: bool = False) -> None:
        """Maps the files.

        `with_cls` puts the class token of the same block behind every patch, where the model has one.

        Raises:
            ValueError: the store lacks patch tokens or a block, or its images were cropped.
        """
        _check_whole(store)
        self.path, self.grid = store.path, store.grid
        filled = [shard for shard in store.shards if shard.num_with_patches]
        self._patches: list[list[np.ndarray]] = []
        self._cls: list[Tensor] = []
        rows = [shard.patch_rows for shard in filled]
        for block in blocks:
            store.patches(block)  # refuses what is not there
            patches, cls = (store.config.column(kind, block % store.depth) for kind in ("patches", "cls"))
            self._patches.append([image for shard in filled for part in shard.mapped(patches) for image in part])
            if with_cls and cls in filled[0].shapes:
                self._cls += [torch.cat([s.read(cls)[of] for s, of in zip(filled, rows, strict=True)])]
        self.numbers = store.numbers[store.patch_rows].tolist()
        self.channels = sum(tensors[0].shape[-1] for tensors in (*self._patches, *self._cls))

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, rows: Iterable[int]) -> Float[Tensor, "n P C"]:
        """Patch tokens of images, row by row of the grid.

        Raises:
            ValueError: some are not finite.
        """
        rows = list(rows)
        parts = [torch.from_numpy(np.stack([images[row] for row in rows])).float() for images in self._patches]
        num_patches = parts[0].shape[1]
        parts += [cls[rows].float()[:, None].expand(-1, num_patches, -1) for cls in self._cls]
        tokens = torch.cat(parts, -1)
        if not tokens.abs().amax().isfinite():
            raise ValueError(f"{self.path} holds features that are not finite; run the feature pass again in float32")
        return tokens


def read_targets(targets: DenseSet, numbers: Sequence[int], size: tuple[int, int]) -> Shaped[np.ndarray, "N H W"]:
    """Targets of the images at these positions of a set in one size, by the nearest pixel.

    Raises:
        ValueError: some cannot be used; it names the first ones.
    """
    return np.stack(targets.map_targets(lambda target: _nearest(target, *size), numbers))


def check_stores(train: FeatureStore, val: Sequence[FeatureStore], targets: tuple[DenseSet, DenseSet]) -> None:
    """Refuse what does not go together, and targets that a head could not be judged by, before it is trained.

    The stores to judge by are of one set of images, the first in the size of `train`.

    Raises:
        ValueError: models, preprocessing or images differ, or some targets cannot be used; it names the first ones.
    """
    train.check_same_model(val[0])
    for store, of in zip((train, *val), (targets[0], *[targets[1]] * len(val)), strict=True):
        store.check_images(of)
    for other in val[1:]:
        check_same(other.path, other.origin, val[0].origin, ("model", "data"))
        if not torch.equal(other.numbers, val[0].numbers):
            raise ValueError(f"{other.path} lacks other images than {val[0].path}; run both feature passes again")
    read_targets(targets[1], val[0].numbers.tolist(), (1, 1))


def _check_whole(store: FeatureStore) -> None:
    preprocess, (height, width) = store.preprocess, store.preprocess.size
    seen = preprocess.region(height, width)
    if preprocess.crop != "squash" or not np.allclose(seen, (0, 0, width, height)):
        raise ValueError(
            f"{store.path} holds features of cropped images (crop {preprocess.crop!r}, size {height} x {width}); "
            f"every pixel needs a patch: run the feature pass with dense_preprocess, in multiples of the patch size"
        )


def _nearest(target: Shaped[np.ndarray, "H W"], height: int, width: int) -> Shaped[np.ndarray, "h w"]:
    """What lies at the centers of larger or smaller pixels."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip((height, width), target.shape, strict=True)
    )
    return target[rows[:, None], columns]
