"""The feature pass: a model sees every image once, and what probes need of its tokens is kept on disk."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.artifacts import OutlierNorms, find_outliers
from vitreg.common.disk import check_room, lock, writing
from vitreg.common.progress import OnProgress
from vitreg.images import ImageBatch, ImageError, ImageSet, ImageStream, SkippedImage, spaced_indices
from vitreg.model import Preprocess, VisionTransformer
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.store.manifest import Manifest, StoreStatistics, read_manifest
from vitreg.probes.store.origin import FeaturesConfig, Origin, check_same
from vitreg.probes.store.shards import Skipped, open_shard, shard_path, write_shard


def extract(
    vit: VisionTransformer,
    images: ImageSet,
    out: str | os.PathLike[str],
    config: FeaturesConfig | None = None,
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    strict: bool = False,
    on_progress: OnProgress | None = None,
) -> FeatureStore:
    """Run a model over images once and keep its tokens.

    A pass that was killed goes on where it was: finished files are not computed again, and the store is, bit for bit,
    that of a pass that was not. Of a finished store nothing is computed.

    Args:
        vit: the model; it is used on the device and in the dtype it is in.
        images: the images; those that cannot be read are left out and listed in the store.
        out: the folder, made or continued.
        config: what is kept; by default a `FeaturesConfig()`.
        preprocess: what is done to each image, by default `vit.preprocess`; all come out in one size.
        batch_size: images at a time.
        strict: an image that cannot be read is an error, in a finished store too, instead of being left out.
        on_progress: called with the number of images done and their total.

    Raises:
        ValueError: `out` holds features of something else, there is no room, there is no image or none can be read,
            the model's tokens are not finite, or `strict` finds an image that cannot be read.
    """
    if not len(images):
        raise ValueError(f"{images.source} holds no images")
    preprocess = preprocess or vit.preprocess
    if preprocess.crop in ("none", "pad"):
        raise ValueError(f"crop {preprocess.crop!r} gives images of several sizes, but features need one; crop them")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    folder = Path(out).expanduser()
    origin = Origin.of(vit, images, preprocess, config or FeaturesConfig())
    manifest = Manifest(origin, origin.digest(), images.classes)
    existing = read_manifest(folder)
    if existing is not None:
        check_same(folder, existing.origin, origin)
        manifest = existing
    if manifest.finding is None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder, "computes features in")
        try:
            if existing is None:
                _check_empty(folder)
                manifest.write(folder)
            there = sum(shard.stat().st_size for shard in folder.glob("shard-*"))
            total = origin.config.num_bytes(vit, preprocess, len(images))
            check_room(folder, total - there, f"features of {images.source}")
            _Pass(vit, images, folder, manifest, strict, on_progress).run(batch_size)
            _finish(folder, manifest)
        finally:
            if held is not None:
                held.close()
    store = FeatureStore.open(folder)
    if strict:
        store.check_complete()
    return store


class _Pass:
    """The shards that are missing."""

    def __init__(
        self,
        vit: VisionTransformer,
        images: ImageSet,
        folder: Path,
        manifest: Manifest,
        strict: bool,
        on_progress: OnProgress | None,
    ) -> None:
        self._vit, self._images, self._folder, self._manifest = vit, images, folder, manifest
        self._config = manifest.origin.config
        self._patch_blocks = frozenset(self._config.patch_blocks or ())
        self._strict, self._on_progress = strict, on_progress
        count = self._config.patches
        self._with_patches = None if count is None else frozenset(spaced_indices(len(images), count).tolist())
        self._done = self._num_skipped = 0
        self._absent = frozenset(n for n in range(len(images)) if not os.path.exists(images.file(n)))

    def run(self, batch_size: int) -> None:
        """Compute and write them, in order; batches end where a shard does, so that they are the same after a kill."""
        size, total = self._config.shard_size, len(self._images)
        missing: list[int] = []
        for shard in range(self._manifest.num_shards):
            numbers = range(shard * size, min((shard + 1) * size, total))
            if shard_path(self._folder, shard).exists():
                open_shard(self._folder, shard, self._manifest.id)
                self._done += len(numbers)
            else:
                missing += numbers
        stream = ImageStream(
            self._images,
            self._manifest.origin.preprocess,
            numbers=missing,
            batch_size=batch_size,
            device=next(self._vit.parameters()).device,
        )
        if self._done:
            self._advance(0, stream.skipped)
        training = self._vit.training
        self._vit.eval()
        try:
            # A file is written while the next is computed: half of the time is waiting for the disk.
            with ThreadPoolExecutor(1) as writer, closing(stream.parts(size)) as shards:
                written: Future[None] | None = None
                for shard, batches in shards:
                    content = self._content(batches, stream.skipped)
                    if written is not None:
                        written.result()
                    written = writer.submit(write_shard, self._folder, shard, self._manifest.id, *content)
                if written is not None:
                    written.result()
        finally:
            self._vit.train(training)

    def _content(
        self, batches: Iterable[ImageBatch], skipped: list[SkippedImage]
    ) -> tuple[dict[str, Tensor], tuple[Skipped, ...]]:
        """What a shard holds."""
        before = len(skipped)
        parts: list[dict[str, Tensor]] = []
        numbers: list[int] = []
        for batch in batches:
            parts.append(self._features(batch))
            numbers += batch.numbers
            self._advance(len(batch.numbers), skipped)
        self._advance(0, skipped)
        tensors = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
        tensors["numbers"] = torch.tensor(numbers, dtype=torch.int64)
        tensors["patch_rows"] = torch.tensor(self._patch_rows(numbers), dtype=torch.int64)
        if self._images.labels is not None:
            labels = self._images.labels
            tensors["labels"] = torch.tensor([labels[number] for number in numbers], dtype=torch.int64)
        return tensors, tuple(
            Skipped(one.number, self._images.name(one.number), one.reason) for one in skipped[before:]
        )

    def _advance(self, count: int, skipped: list[SkippedImage]) -> None:
        """Count images that are done, and those that could not be read since.

        Damaged images are left out; one that is lost on the way ends the pass, which goes on when it is back.
        """
        for image in skipped[self._num_skipped :]:
            if image.number not in self._absent and not os.path.exists(file := self._images.file(image.number)):
                raise ValueError(f"{file} was there when the pass began and is gone; restore it and run the pass again")
            if self._strict:
                raise ImageError(image.reason)
        self._done += count + len(skipped) - self._num_skipped
        self._num_skipped = len(skipped)
        if self._on_progress is not None:
            self._on_progress(self._done, len(self._images))

    @torch.inference_mode()
    def _features(self, batch: ImageBatch) -> dict[str, Tensor]:
        """What is kept of a batch, on the CPU; the one forward pass."""
        trace = self._vit.trace(batch.images, blocks=self._config.blocks, hidden=True)
        assert trace.hidden is not None
        dtype = getattr(torch, self._config.dtype)
        rows = self._patch_rows(batch.numbers)
        found = {"norms": trace.patch_norms.movedim(0, 1)[rows].contiguous().cpu()}
        found["pooled"] = self._vit.pool(trace.tokens).to("cpu", dtype)
        for i, block in enumerate(self._config.blocks):
            if trace.hidden.cls is not None:
                found[f"cls.{block}"] = self._normed(trace.hidden.cls[i]).to("cpu", dtype)
            if block not in self._patch_blocks:
                continue
            patches = self._normed(trace.hidden.patches[i])
            found[f"mean_patch.{block}"] = patches.mean(1, dtype=torch.float32).to("cpu", dtype)
            found[f"patches.{block}"] = patches[rows].to("cpu", dtype)
            found[f"registers.{block}"] = self._normed(trace.hidden.registers[i][rows]).to("cpu", dtype)
        for name, tensor in found.items():
            of_all = len(tensor) == len(batch.numbers)
            self._check_finite(name, tensor, batch.numbers if of_all else [batch.numbers[row] for row in rows])
        return found

    def _normed(self, tokens: Float[Tensor, "B *T D"]) -> Float[Tensor, "B *T D"]:
        return self._vit.norm(tokens) if self._config.normed else tokens

    def _check_finite(self, name: str, tensor: Tensor, numbers: Sequence[int]) -> None:
        if not tensor.numel():
            return
        # The largest magnitude is eight times as fast as asking every number.
        finite = tensor.flatten(1).abs().amax(1).isfinite()
        if not finite.all():
            number = numbers[int(finite.int().argmin())]
            raise ValueError(
                f"the model's tokens are not finite ({name.split('.')[0]}) for {self._images.name(number)}; "
                f"use a model in float32, and dtype float32 where float16 is too small"
            )

    def _patch_rows(self, numbers: Sequence[int]) -> list[int]:
        """The rows of those whose patch tokens are kept."""
        chosen = self._with_patches
        return [row for row, number in enumerate(numbers) if chosen is None or number in chosen]


def _finish(folder: Path, manifest: Manifest) -> None:
    """Add what follows from all images; from here on the store is whole."""
    shards = [open_shard(folder, index, manifest.id) for index in range(manifest.num_shards)]
    filled = [shard for shard in shards if shard.num_images]
    if not filled:
        raise ValueError(f"no image of {manifest.origin.data.source} can be read: {shards[0].skipped[0].reason}")
    _, depth, rows, columns = filled[0].read("norms").shape
    looked_at = [shard for shard in filled if shard.num_with_patches]
    outliers = OutlierNorms(None, depth - 1, None)
    if looked_at:
        outliers = find_outliers(shard.read("norms").movedim(1, 0) for shard in looked_at)
    dataclasses.replace(manifest, finding=StoreStatistics((rows, columns), depth, outliers)).write(folder)


def _check_empty(folder: Path) -> None:
    """A pass that was killed in its first moment leaves hidden files only."""
    if others := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")):
        raise ValueError(f"{folder} holds other files, such as {others[0]}; choose another folder")
