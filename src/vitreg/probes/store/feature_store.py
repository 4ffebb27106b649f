"""Features that were computed once, for any number of probes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.common.words import counted
from vitreg.images import ImageSet
from vitreg.probes.store.manifest import Manifest, StoreStatistics, read_manifest
from vitreg.probes.store.origin import StoredData, check_same
from vitreg.probes.store.shards import FOLDER, Shard, Skipped, open_shard


class FeatureStore:
    """What `extract` kept of a model's tokens; made by it, or by `FeatureStore.open`.

    Rows are the images that could be read, in the order of the set. Tokens come out as float32, on the CPU, read from
    the files whenever they are asked for.

    Attributes:
        path: the folder.
        id: a digest of what the features are of; equal where all of them are equal.
        origin: what the features are of.
        model, preprocess, data, config: its parts; the blocks of `config` are counted from 0.
        blocks: whose tokens there are.
        depth: blocks of the model.
        grid: rows and columns of patches.
        num_images: rows.
        num_with_patches: those of them whose patches are kept.
        embed_dim: channels of a token.
        shards: the files that hold images.
        classes: names of the classes, none where there are no labels.
        threshold, block, onset_block: as of a `Diagnosis` of the same images.
    """

    def __init__(self, path: Path, manifest: Manifest, finding: StoreStatistics, shards: tuple[Shard, ...]) -> None:
        self.path, self.id, self.depth = path, manifest.id, finding.depth
        # A shard is empty where none of its images could be read.
        self.all_shards = shards
        self.shards = tuple(shard for shard in shards if shard.num_images)
        self.origin, self.classes, self.grid = manifest.origin, manifest.classes, finding.grid
        self.model, self.preprocess, self.data = self.origin.model, self.origin.preprocess, self.origin.data
        self.config, self.blocks = self.origin.config, self.origin.config.blocks
        self.num_images, self.embed_dim = finding.num_images, manifest.model["embed_dim"]
        self.num_with_patches = sum(shard.num_with_patches for shard in shards)
        outliers = finding.outliers
        self.threshold, self.block, self.onset_block = outliers.threshold, outliers.block, outliers.onset_block

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FeatureStore:
        """The store in a folder.

        Raises:
            ValueError: it is unfinished or damaged, or the folder holds something else.
        """
        folder = Path(path).expanduser()
        manifest = read_manifest(folder)
        if manifest is None:
            raise ValueError(f"{folder} holds no feature store (there is no manifest.json in it); run the feature pass")
        if manifest.finding is None:
            raise ValueError(f"{folder} is unfinished; run the feature pass again with the same settings, it goes on")
        shards = tuple(open_shard(folder / FOLDER / name) for name in manifest.finding.shards)
        return cls(folder, manifest, manifest.finding, shards)

    def __len__(self) -> int:
        """Images, with those that could not be read."""
        return self._firsts[-1] + self.all_shards[-1].num_rows

    def __getitem__(self, image: int | str) -> dict[str, Any]:
        """All there is of an image, by its number or its id: its tensors in the store's dtype, and why there are none.

        The files are mapped into memory, so what is read is what is asked for.

        Raises:
            IndexError: there is no image of this number.
            ValueError: there is none of this id.
        """
        number = self._number_of(image) if isinstance(image, str) else image
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path} has images 0 to {len(self) - 1}, not {number}")
        shard = bisect_right(self._firsts, number) - 1
        return self.all_shards[shard].row(number - self._firsts[shard])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (shard.row(row) for shard in self.all_shards for row in range(shard.num_rows))

    def _number_of(self, id: str) -> int:
        hashes, order = self._index
        first, last = (np.searchsorted(hashes, _hash(id), side) for side in ("left", "right"))
        for number in map(int, order[first:last]):
            if self[number]["id"] == id:
                return number
        raise ValueError(f"{self.path} has no image {id!r}; its first is {self[0]['id']!r}")

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """A hash of every id, sorted, and whose it is: 16 bytes an image."""
        hashes = np.fromiter((_hash(id) for s in self.all_shards for id in s.plain("id")["id"]), np.uint64, len(self))
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def check_same_model(self, other: FeatureStore) -> None:
        """Refuse features by another model or with another preprocessing; the message has both."""
        check_same(other.path, other.origin, self.origin, ("model", "preprocess"))

    def check_images(self, images: ImageSet) -> None:
        """Refuse images of which these are not the features, or whose files were replaced since."""
        if (given := StoredData.of(images)).digest != self.data.digest:
            raise ValueError(f"{self.path} holds features of {self.data}, not of {given}; give the images it is of")

    @cached_property
    def skipped(self) -> tuple[Skipped, ...]:
        """Images that could not be read."""
        return tuple(
            dataclasses.replace(image, number=first + image.number)
            for first, shard in zip(self._firsts, self.all_shards, strict=True)
            for image in shard.skipped
        )

    @cached_property
    def _firsts(self) -> list[int]:
        """Position in the set of the first image of every file."""
        return list(accumulate((shard.num_rows for shard in self.all_shards[:-1]), initial=0))

    def check_complete(self) -> None:
        """Refuse features that lack images because they could not be read; the message has the first."""
        if self.skipped:
            lost = counted(len(self.skipped), "image")
            raise ValueError(f"{self.path} lacks {lost} that could not be read; the first: {self.skipped[0].reason}")

    def with_threshold_of(self, train: FeatureStore) -> FeatureStore:
        """The same features, with outliers as the norms of the training images define them.

        Each set has its own threshold, which differs a little, and what is fitted on one is judged on the other.
        """
        store = copy.copy(self)
        store.threshold, store.block, store.onset_block = train.threshold, train.block, train.onset_block
        return store

    @property
    def labels(self) -> Int[Tensor, " N"] | None:
        """Class number of every image; None where there are no labels."""
        labels = [
            label
            for shard in self.shards
            for label, error in zip(shard.plain("label")["label"], shard.errors, strict=True)
            if error is None
        ]
        return None if None in labels else torch.tensor(labels)

    @property
    def numbers(self) -> Int[Tensor, " N"]:
        """Position of every image in the set."""
        found = [
            first + row
            for first, shard in zip(self._firsts, self.all_shards, strict=True)
            for row, error in enumerate(shard.errors)
            if error is None
        ]
        return torch.tensor(found)

    def cls(self, block: int) -> Float[Tensor, "N D"] | None:
        """The class token; None where the model has none.

        Raises:
            ValueError: the store does not have the block; the same holds for the methods below.
        """
        name = self.config.column("cls", self._kept(block))
        return self._rows(name).float() if name in self.shards[0].shapes else None

    def registers(self, block: int) -> Float[Tensor, "N R D"]:
        """The registers, of the images that `patches` gives; R is 0 where the model has none."""
        name = self._of_patches("registers", block)
        if name in self.shards[0].shapes:
            return self._rows(name).float()
        return torch.zeros(self.num_with_patches, 0, self.embed_dim)

    @property
    def pooled(self) -> Float[Tensor, "N F"]:
        """What the model's own pooling makes of its output, which its head reads (`VisionTransformer.pool`)."""
        return self._rows("pooled").float()

    def mean_patch(self, block: int) -> Float[Tensor, "N D"]:
        """The mean of an image's patch tokens, taken in float32 before they were rounded."""
        return self._rows(self._of_patches("mean", block)).float()

    @property
    def norms(self) -> Float[Tensor, "N L h w"]:
        """L2 norms of the patches after every block, before the final norm, of the images that `patches` gives."""
        return self._rows("norms")

    def outliers(self) -> Bool[Tensor, "N h w"]:
        """Which patches, of the images that `patches` gives, are outliers after `block`; without threshold none is."""
        if self.threshold is None:
            return torch.zeros(self.num_with_patches, *self.grid, dtype=torch.bool)
        kept = self.config.norm_blocks or ()
        if self.block not in kept:
            raise ValueError(f"{self.path} holds no norms of block {self.block}; name it in norm_blocks")
        number = kept.index(self.block)
        return torch.cat([shard.read("norms", number) >= self.threshold for shard in self.shards])

    def patches(self, block: int) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n P D"]]]:
        """Patch tokens, file by file, so that memory does not grow with their number.

        Returns:
            Rows of the images (in `labels`, `cls` and so on), and their patches, row by row of the grid.

        Raises:
            ValueError: no patch tokens were kept.
        """
        if not self.num_with_patches:
            raise ValueError(f"{self.path} holds no patch tokens; run the feature pass with patches=None, or a number")
        name = self._of_patches("patches", block)
        rows = self.patch_rows.split([shard.num_with_patches for shard in self.shards])
        return (
            (of, shard.read(name).float())
            for of, shard in zip(rows, self.shards, strict=True)
            if shard.num_with_patches
        )

    @property
    def patch_rows(self) -> Int[Tensor, " n"]:
        """Rows of the images whose patches are kept."""
        firsts = accumulate((shard.num_images for shard in self.shards), initial=0)
        return torch.cat([shard.patch_rows + first for first, shard in zip(firsts, self.shards, strict=False)])

    def _rows(self, name: str) -> Tensor:
        return torch.cat([shard.read(name) for shard in self.shards])

    def _of_patches(self, name: str, block: int) -> str:
        """The tensor of a block, if it was named in `patch_blocks`."""
        number = self._kept(block)
        if number not in (self.config.patch_blocks or ()) or name not in self.config.tokens:
            raise ValueError(f"{self.path} holds no patch tokens of block {block}; name it in patch_blocks")
        return self.config.column(name, number)

    def _kept(self, block: int) -> int:
        """A block's number from 0."""
        number = block + self.depth if block < 0 else block
        if number not in self.blocks:
            kept = ", ".join(map(str, self.blocks))
            raise ValueError(f"{self.path} holds no tokens of block {block}, only of {kept}; run another feature pass")
        return number


def open_store(path: str | os.PathLike[str]) -> FeatureStore:
    """The features that `extract` wrote into a folder, image by image (`store[0]`, `store[id]`) or all of a kind.

    Raises:
        ValueError: it is unfinished or damaged, or the folder holds something else.
    """
    return FeatureStore.open(path)


def _hash(id: str) -> np.uint64:
    return np.frombuffer(hashlib.blake2b(id.encode(), digest_size=8).digest(), np.uint64)[0]
