"""Features that were computed once, for any number of probes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.common.words import counted
from vitreg.images import ImageSet
from vitreg.probes.store.manifest import Manifest, StoreStatistics, read_manifest
from vitreg.probes.store.origin import StoredData, check_same
from vitreg.probes.store.shards import Shard, Skipped, open_shard


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
        shards: the files that hold rows.
        classes: names of the classes, none where there are no labels.
        skipped: images that could not be read.
        threshold, block, onset_block: as of a `Diagnosis` of the same images.
    """

    def __init__(self, path: Path, manifest: Manifest, finding: StoreStatistics, shards: tuple[Shard, ...]) -> None:
        self.path, self.id, self.depth = path, manifest.id, finding.depth
        # A shard is empty where none of its images could be read.
        self.shards = tuple(shard for shard in shards if shard.num_images)
        self.origin, self.classes, self.grid = manifest.origin, manifest.classes, finding.grid
        self.model, self.preprocess, self.data = self.origin.model, self.origin.preprocess, self.origin.data
        self.config, self.blocks = self.origin.config, self.origin.config.blocks
        self.num_images = sum(shard.num_images for shard in shards)
        self.skipped: tuple[Skipped, ...] = tuple(image for shard in shards for image in shard.skipped)
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
        shards = tuple(open_shard(folder, index, manifest.id) for index in range(manifest.num_shards))
        return cls(folder, manifest, manifest.finding, shards)

    def check_same_model(self, other: FeatureStore) -> None:
        """Refuse features by another model or with another preprocessing; the message has both."""
        check_same(other.path, other.origin, self.origin, ("model", "preprocess"))

    def check_images(self, images: ImageSet) -> None:
        """Refuse images of which these are not the features, or whose files were replaced since."""
        if (given := StoredData.of(images)).digest != self.data.digest:
            raise ValueError(f"{self.path} holds features of {self.data}, not of {given}; give the images it is of")

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
        return self._rows("labels") if "labels" in self.shards[0].names else None

    @property
    def numbers(self) -> Int[Tensor, " N"]:
        """Position of every image in the set."""
        return self._rows("numbers")

    def cls(self, block: int) -> Float[Tensor, "N D"] | None:
        """The class token; None where the model has none.

        Raises:
            ValueError: the store does not have the block; the same holds for the methods below.
        """
        name = f"cls.{self._kept(block)}"
        return self._rows(name).float() if name in self.shards[0].names else None

    def registers(self, block: int) -> Float[Tensor, "N R D"]:
        """The registers, of the images that `patches` gives; R is 0 where the model has none."""
        return self._rows(self._of_patches("registers", block)).float()

    @property
    def pooled(self) -> Float[Tensor, "N F"]:
        """What the model's own pooling makes of its output, which its head reads (`VisionTransformer.pool`)."""
        return self._rows("pooled").float()

    def mean_patch(self, block: int) -> Float[Tensor, "N D"]:
        """The mean of an image's patch tokens, taken in float32 before they were rounded."""
        return self._rows(self._of_patches("mean_patch", block)).float()

    @property
    def norms(self) -> Float[Tensor, "N L h w"]:
        """L2 norms of the patches after every block, before the final norm, of the images that `patches` gives."""
        return self._rows("norms")

    def outliers(self) -> Bool[Tensor, "N h w"]:
        """Which patches, of the images that `patches` gives, are outliers after `block`; without threshold none is."""
        if self.threshold is None:
            with_patches = sum(shard.num_with_patches for shard in self.shards)
            return torch.zeros(with_patches, *self.grid, dtype=torch.bool)
        return torch.cat([shard.read("norms", block=self.block) >= self.threshold for shard in self.shards])

    def patches(self, block: int) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n P D"]]]:
        """Patch tokens, file by file, so that memory does not grow with their number.

        Returns:
            Rows of the images (in `labels`, `cls` and so on), and their patches, row by row of the grid.

        Raises:
            ValueError: no patch tokens were kept.
        """
        if not any(shard.num_with_patches for shard in self.shards):
            raise ValueError(f"{self.path} holds no patch tokens; run the feature pass with patches=None, or a number")
        name = self._of_patches("patches", block)
        firsts = accumulate((shard.num_images for shard in self.shards), initial=0)
        return (
            (shard.read("patch_rows") + first, shard.read(name).float())
            for first, shard in zip(firsts, self.shards, strict=False)
            if shard.num_with_patches
        )

    def _rows(self, name: str) -> Tensor:
        return torch.cat([shard.read(name) for shard in self.shards])

    def _of_patches(self, name: str, block: int) -> str:
        """The tensor of a block, if it was named in `patch_blocks`."""
        tensor = f"{name}.{self._kept(block)}"
        if tensor not in self.shards[0].names:
            raise ValueError(f"{self.path} holds no patch tokens of block {block}; name it in patch_blocks")
        return tensor

    def _kept(self, block: int) -> int:
        """A block's number from 0."""
        number = block + self.depth if block < 0 else block
        if number not in self.blocks:
            kept = ", ".join(map(str, self.blocks))
            raise ValueError(f"{self.path} holds no tokens of block {block}, only of {kept}; run another feature pass")
        return number
