"""The feature pass: a model sees every image once, and what is asked for of its tokens is kept on disk."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.artifacts import LogAxis, NormStatistics, OutlierNorms, model_card, outlier_norms, write_advice
from vitreg.common.disk import check_room, lock, put_in_place, remove_partial_files, writing
from vitreg.common.modes import evaluating
from vitreg.common.progress import OnProgress
from vitreg.images import (
    ImageBatch,
    ImageError,
    ImageSet,
    ImageStream,
    SetShards,
    Shards,
    SkippedImage,
    open_shards,
    spaced_indices,
)
from vitreg.model import Preprocess, Trace, VisionTransformer
from vitreg.probes.store.diagnosis import diagnose_shards
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.store.listing import LISTING, in_listed_order, write_listing
from vitreg.probes.store.manifest import Manifest, StoreStatistics, read_manifest
from vitreg.probes.store.on_ray import Ray, map_on_ray
from vitreg.probes.store.origin import PARTS, FeaturesConfig, Origin, check_same
from vitreg.probes.store.shards import (
    FOLDER,
    FORMAT,
    RowGroup,
    Shard,
    ShardWriter,
    open_shard,
    shard_name,
    shard_schema,
)

_ROW_GROUP_BYTES = 8 * 2**20


def extract(
    vit: VisionTransformer,
    images: ImageSet | str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: FeaturesConfig | None = None,
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    strict: bool = False,
    on_progress: OnProgress | None = None,
    say: Callable[[str], None] | None = None,
    update: bool = False,
    ray: Ray | None = None,
    **settings: Any,
) -> FeatureStore:
    """Run a model over images once and keep its tokens.

    A pass that was killed goes on where it was: finished files are not computed again, and the store is, bit for bit,
    that of a pass that was not. Of a finished store nothing is computed.

    Args:
        vit: the model; it is used on the device and in the dtype it is in.
        images: a set of images, or where they are: a folder, tars, Parquet. Of the last two an archive or a row group
            is a shard, and read when its turn comes.
        out: the folder, made or continued.
        config: what is kept; by default a `FeaturesConfig()`.
        preprocess: what is done to each image, by default `vit.preprocess`; all come out in one size.
        batch_size: images at a time.
        strict: an image that cannot be read is an error, in a finished store too, instead of being left out.
        on_progress: called with the number of images done and their total, where it is known.
        say: told in a sentence, after the first shard, that the model has artifacts and what can be done.
        update: compute what was added to a folder or archives since the store was begun, and what has changed there.
        ray: a cluster that computes the shards, all of whose machines see `images` and `out` under these names.
        **settings: fields of the config, in place of its own: `tokens=("cls", "patches")`.

    Raises:
        ValueError: `out` holds features of something else, there is no room, there is no image or none can be read,
            the model's tokens are not finite, or `strict` finds an image that cannot be read.
    """
    folder = Path(out).expanduser()
    config = dataclasses.replace(config or FeaturesConfig(), **settings)
    done = extract_part(
        vit, images, folder, config,
        preprocess=preprocess, batch_size=batch_size, strict=strict, on_progress=on_progress, say=say, update=update,
        ray=ray,
    )  # fmt: skip
    assert done
    store = FeatureStore.open(folder)
    if strict:
        store.check_complete()
    return store


def extract_part(
    vit: VisionTransformer,
    images: ImageSet | str | os.PathLike[str],
    folder: Path,
    config: FeaturesConfig,
    *,
    part: tuple[int, int] = (0, 1),
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    strict: bool = False,
    on_progress: OnProgress | None = None,
    say: Callable[[str], None] | None = None,
    update: bool = False,
    ray: Ray | None = None,
) -> bool:
    """What one of several processes does of `extract`: of n shards those that leave the rest i when divided by n.

    The processes need to know nothing of each other but the folder. Who finds all shards there finishes the store.

    Args:
        vit: as of `extract`, and the following.
        images: where they are.
        folder: the store.
        config: what is kept.
        part: i and n.
        preprocess: what is done to each image.
        batch_size: images at a time.
        strict: an image that cannot be read is an error.
        on_progress: called with the number of images done and their total.
        say: told in a sentence, after the first shard, that the model has artifacts and what can be done.
        update: as of `extract`.
        ray: as of `extract`.

    Returns:
        Whether all shards are there, so that the store can be opened.

    Raises:
        ValueError: as of `extract`.
    """
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part {part[0]} of {part[1]} does not exist; parts count from 0")
    if update and part[1] > 1:
        raise ValueError("a store is extended by one process first; leave the part (--shard) out")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    preprocess = preprocess or vit.preprocess
    if preprocess.crop in ("none", "pad"):
        raise ValueError(f"crop {preprocess.crop!r} gives images of several sizes, but features need one; crop them")
    named = not isinstance(images, ImageSet)
    shards = open_shards(images, config.shard_size)
    if named and isinstance(shards, SetShards):
        shards = SetShards(in_listed_order(shards.images, folder / LISTING, update, say), config.shard_size)
    if not len(shards):
        raise ValueError(f"{shards.images.source} holds no images")
    origin = Origin.of(vit, shards, preprocess, config)
    manifest = Manifest(origin, origin.digest(), shards.images.classes, model_card(vit), len(shards))
    existing = read_manifest(folder)
    if existing is not None:
        check_same(folder, existing.origin, origin, PARTS if not named else ("model", "preprocess", "config"))
        if existing.origin.data.digest == origin.data.digest:
            manifest = existing
        elif not update:
            raise ValueError(
                f"{folder} holds features of {existing.origin.data}, which is {origin.data} now; extend it with update "
                "(--update), or choose another folder"
            )
    if manifest.finding is not None:
        return True
    with writing(folder):
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    held = lock(folder, "computes features in", shared=part[1] > 1)
    try:
        if existing is None:
            _check_empty(folder)
        if manifest is not existing:
            # Before the manifest: after a kill, it is still an update.
            _keep_unchanged(folder, origin, shards)
            if named and isinstance(shards, SetShards):
                write_listing(shards.images, folder / LISTING)
            manifest.write(folder)
        if part[1] == 1:
            remove_partial_files(folder / FOLDER)
        if shards.num_images is not None:
            there = sum(shard.stat().st_size for shard in (folder / FOLDER).glob("shard-*"))
            total = origin.config.num_bytes(vit.config, preprocess, shards.num_images)
            check_room(folder, total - there, f"features of {shards.images.source}")
        indices = range(part[0], len(shards), part[1])
        if ray is None:
            ShardPass(vit, shards, folder, manifest, strict, on_progress, say).run(batch_size, indices)
        else:
            _run_on_ray(ray, vit, shards, folder, manifest, strict, on_progress, say, batch_size, indices)
            if part[1] == 1:  # of workers that were lost
                remove_partial_files(folder / FOLDER)
        return _finish(folder, manifest, shards)
    finally:
        if held is not None:
            held.close()


class ShardPass:
    """The shards that are missing."""

    def __init__(
        self,
        vit: VisionTransformer,
        shards: Shards,
        folder: Path,
        manifest: Manifest,
        strict: bool,
        on_progress: OnProgress | None,
        say: Callable[[str], None] | None,
    ) -> None:
        self._vit, self._shards, self._images, self._folder = vit, shards, shards.images, folder
        self._origin, self._config = manifest.origin, manifest.origin.config
        self._preprocess = manifest.origin.preprocess
        height, width = (side // vit.config.patch_size for side in self._preprocess.size)
        self._grid, self._axis, self.device = (height, width), LogAxis(), next(vit.parameters()).device
        self._patch_blocks = frozenset(self._config.patch_blocks or ())
        self._shapes = self._config.shapes(vit.config, self._grid)
        self._schema = shard_schema(self._config, self._shapes)
        self._note = {
            "format": FORMAT,
            "version": metadata.version("vitreg"),
            "model": dataclasses.asdict(self._origin.model) | {"changes": list(vit.config.changes)},
            "preprocess": dataclasses.asdict(self._preprocess),
            "config": dataclasses.asdict(self._config),
            "grid": self._grid,
            "shapes": self._shapes,
        }
        self._manifest, self._strict, self._on_progress, self._say = manifest, strict, on_progress, say
        count, num_images = self._config.patches, shards.num_images
        if count and num_images is None:
            raise ValueError(f"patches is {count}, but how many images {self._images.source} holds is known last")
        self._with_patches = None if count is None else frozenset(spaced_indices(num_images or 0, count).tolist())
        self._absent = shards.absent()
        self._done = self._num_skipped = 0

    def run(self, batch_size: int, indices: Iterable[int]) -> None:
        """Compute and write them, in order; batches end where a shard does, so that they are the same after a kill."""
        missing: list[int] = []
        for index in indices:
            path = self._path(index)
            if path.exists():
                shard = open_shard(path)
                self._done += shard.num_rows
                self.warn(shard)
            else:
                missing.append(index)
        stream = ImageStream(
            self._images,
            self._preprocess,
            numbers=(number for index in missing for number in self._shards.numbers(index)),
            batch_size=batch_size,
            device=self.device,
        )
        if self._done:
            self._advance(0, stream.skipped)
        # A file is written while the next images are computed: half of the time is waiting for the disk.
        with (
            evaluating(self._vit),
            ThreadPoolExecutor(1) as thread,
            closing(stream.parts(self._shards.stride)) as parts,
        ):
            behind = _Behind(thread)
            for index, batches in parts:
                self._write(index, batches, stream.skipped, behind)
            behind.wait()

    def _path(self, index: int) -> Path:
        return shard_path(self._folder, index, self._origin, self._shards)

    def warn(self, shard: Shard) -> None:
        """Say what the first shard with norms shows."""
        if self._say is None or (found := diagnose_shards([shard], self._manifest)) is None:
            return
        if found.has_artifacts:
            self._say(f"{found.verdict[0]} {write_advice(found)} (from the first {found.num_images} images)")
        self._say = None

    def _write(self, index: int, batches: Iterable[ImageBatch], skipped: list[SkippedImage], behind: _Behind) -> None:
        """One shard: a row for every image, in order."""
        path, content = self._path(index), self._shards.digest(index)
        note = self._note | {"digest": self._origin.shard_digest(content), "content": content, "index": index}
        statistics = NormStatistics(self._vit.config.depth, self._grid, self._axis, self.device)
        writer, rows, next_skipped = ShardWriter(path, self._schema, note), RowGroup(), len(skipped)
        try:
            for batch in batches:
                next_skipped = self._add_rows(rows, batch, skipped, next_skipped)
                rows.add_tensors(self._features(batch, statistics))
                self._advance(len(batch.numbers), skipped)
                if rows.num_bytes >= _ROW_GROUP_BYTES:
                    behind.do(writer.write, rows)
                    rows = RowGroup()
            self._add_rows(rows, None, skipped, next_skipped)
            self._advance(0, skipped)
            if rows.ids:
                behind.do(writer.write, rows)
            norms = statistics.state(self._config.norm_blocks or ()) if statistics.num_images else None
            behind.do(self._close, writer, norms, path)
        except BaseException as error:
            behind.abandon(writer, error)
            raise

    def _close(self, writer: ShardWriter, norms: dict[str, Tensor] | None, path: Path) -> None:
        writer.finish(norms)
        if self._say is not None:
            self.warn(open_shard(path))

    def _add_rows(
        self, rows: RowGroup, batch: ImageBatch | None, skipped: list[SkippedImage], next_skipped: int
    ) -> int:
        """The images of a batch and, where they belong, those before its last that could not be read; or all of these.

        Returns:
            How many of `skipped` have a row.
        """
        sizes = {} if batch is None else dict(zip(batch.numbers, batch.sizes, strict=True))
        end = max(sizes, default=None)
        failed = {one.number: one for one in skipped[next_skipped:] if end is None or one.number < end}
        for number in sorted([*sizes, *failed]):
            id, label = self._images.id(number), self._images.label(number)
            if number in failed:
                rows.add(id, label=label, error=failed[number].reason)
                continue
            if self._with_patches is None or number in self._with_patches:
                rows.patch_rows.append(len(rows.ids))
            rows.add(id, size=sizes[number], label=label)
        return next_skipped + len(failed)

    def _advance(self, count: int, skipped: list[SkippedImage]) -> None:
        """Count images that are done, and those that could not be read since.

        Damaged images are left out; one that is lost on the way ends the pass, which goes on when it is back.
        """
        for image in skipped[self._num_skipped :]:
            file = self._images.file(image.number)
            if image.number not in self._absent and not os.path.exists(file):
                raise ValueError(f"{file} was there when the pass began and is gone; restore it and run the pass again")
            if self._strict:
                raise ImageError(image.reason)
        self._done += count + len(skipped) - self._num_skipped
        self._num_skipped = len(skipped)
        if self._on_progress is not None:
            self._on_progress(self._done, self._shards.num_images)

    @torch.inference_mode()
    def _features(self, batch: ImageBatch, statistics: NormStatistics) -> dict[str, Tensor]:
        """What is kept of a batch, on the CPU; the one forward pass."""
        trace = self._vit.trace(batch.images, blocks=self._config.blocks, hidden=True)
        assert trace.hidden is not None
        rows = [i for i, n in enumerate(batch.numbers) if self._with_patches is None or n in self._with_patches]
        found: dict[str, Tensor] = {}
        if "pooled" in self._shapes:
            found["pooled"] = self._vit.pool(trace.tokens)
        if "norms" in self._shapes:
            found["norms"] = trace.patch_norms[list(self._config.norm_blocks or ())].movedim(0, 1)[rows].contiguous()
        for i, block in enumerate(self._config.blocks):
            name = {kind: self._config.column(kind, block) for kind in ("cls", "mean", "registers", "patches")}
            if name["cls"] in self._shapes and trace.hidden.cls is not None:
                found[name["cls"]] = self._normed(trace.hidden.cls[i])
            if name["registers"] in self._shapes:
                found[name["registers"]] = self._normed(trace.hidden.registers[i][rows])
            if not {name["mean"], name["patches"]} & {*self._shapes}:
                continue
            patches = self._normed(trace.hidden.patches[i])
            if name["mean"] in self._shapes:
                found[name["mean"]] = patches.mean(1, dtype=torch.float32)
            if name["patches"] in self._shapes:
                found[name["patches"]] = patches if len(rows) == len(patches) else patches[rows]
        for name, tensor in found.items():
            found[name] = tensor = tensor.to("cpu", getattr(torch, self._config.dtype_of(name)))
            of_all = len(tensor) == len(batch.numbers)
            self._check_finite(name, tensor, batch.numbers if of_all else [batch.numbers[row] for row in rows])
        if rows and self._config.patches != 0:
            statistics.update(trace if len(rows) == len(batch.numbers) else _rows_of(trace, rows))
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
                f"the model's tokens are not finite ({name.split('_')[0]}) for {self._images.name(number)}; "
                f"use a model in float32, and dtype float32 where float16 is too small"
            )


def _run_on_ray(
    cluster: Ray,
    vit: VisionTransformer,
    shards: Shards,
    folder: Path,
    manifest: Manifest,
    strict: bool,
    on_progress: OnProgress | None,
    say: Callable[[str], None] | None,
    batch_size: int,
    indices: Sequence[int],
) -> None:
    """The shards that are missing; here only the first of those that are there is looked at."""
    paths = {index: shard_path(folder, index, manifest.origin, shards) for index in indices}
    there = [open_shard(path) for path in paths.values() if path.exists()]
    missing = [index for index, path in paths.items() if not path.exists()]
    here = ShardPass(vit, shards, folder, manifest, strict, None, say)
    if there:
        here.warn(there[0])

    make = partial(_compute_shards, vit, shards, folder, manifest, strict, batch_size, paths)

    def tell(done: int, total: int | None) -> None:
        if on_progress is not None:
            on_progress(done, total)
        first = next((path for path in paths.values() if path.exists()), None)
        if first is not None:
            here.warn(open_shard(first))

    done = sum(shard.num_rows for shard in there)
    if missing:
        map_on_ray(make, missing, cluster, device=here.device, on_progress=tell, total=shards.num_images, done=done)


def _compute_shards(
    vit: VisionTransformer,
    shards: Shards,
    folder: Path,
    manifest: Manifest,
    strict: bool,
    batch_size: int,
    paths: Mapping[int, Path],
) -> Callable[[int], int]:
    """In a worker: what computes a shard, and says how many images it has."""
    of_worker = ShardPass(vit, shards, folder, manifest, strict, None, None)

    def compute(index: int) -> int:
        of_worker.run(batch_size, [index])
        return open_shard(paths[index]).num_rows

    return compute


class _Behind:
    """One thing after the other in a thread, one of them waiting at most."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self._last: Future[None] | None = None

    def do(self, function: Callable[..., None], *arguments: object) -> None:
        """Do it when what was asked for before is done; raises what that raised."""
        self.wait()
        self._last = self._thread.submit(function, *arguments)

    def wait(self) -> None:
        """Until nothing is left to do; raises what was raised."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def abandon(self, writer: ShardWriter, error: BaseException) -> None:
        """Leave nothing of a file, whatever is being written to it now."""
        with suppress(Exception):
            self.wait()
        writer.abandon(error)


def _rows_of(trace: Trace, rows: list[int]) -> Trace:
    """The norms of some images."""
    return dataclasses.replace(
        trace,
        patch_norms=trace.patch_norms[:, rows],
        cls_norms=None if trace.cls_norms is None else trace.cls_norms[:, rows],
        register_norms=trace.register_norms[:, rows],
    )


def shard_path(folder: Path, index: int, origin: Origin, shards: Shards) -> Path:
    """Where a shard is."""
    return folder / FOLDER / shard_name(index, origin.shard_digest(shards.digest(index)))


def _finish(folder: Path, manifest: Manifest, shards: Shards) -> bool:
    """Add what follows from all images where all are there; from here on the store is whole."""
    paths = [shard_path(folder, index, manifest.origin, shards) for index in range(len(shards))]
    if not all(path.exists() for path in paths):
        return False
    files = [open_shard(path) for path in paths]
    num_images = sum(shard.num_images for shard in files)
    if not num_images:
        reason = next(error for error in files[0].errors if error)
        raise ValueError(f"no image of {manifest.origin.data.source} can be read: {reason}")
    rows, columns = files[0].note["grid"]
    depth = manifest.model["depth"]
    outliers = OutlierNorms(None, depth - 1, None)
    if states := [norms for shard in files if (norms := shard.norms) is not None]:
        summed = NormStatistics.added((rows, columns), LogAxis(), states)
        outliers = outlier_norms(summed.axis, summed.counts(), summed.moments()[2], summed.num_images)
    there = {path.name: shard.num_rows for path, shard in zip(paths, files, strict=True)}
    finding = StoreStatistics((rows, columns), depth, outliers, there, num_images)
    dataclasses.replace(manifest, finding=finding).write(folder)
    return True


def _keep_unchanged(folder: Path, origin: Origin, shards: Shards) -> None:
    """Give files of shards that are as they were their number in the new list, and remove the others."""
    wanted = [shard_path(folder, index, origin, shards) for index in range(len(shards))]
    paths = {path.name.split("-")[-1]: path for path in wanted}
    for old in sorted((folder / FOLDER).glob("shard-*.parquet")):
        new = paths.get(old.name.split("-")[-1])
        if new is None:
            old.unlink()
        elif new != old:
            put_in_place(old, new)


def _check_empty(folder: Path) -> None:
    """A pass that was killed in its first moment leaves hidden files only."""
    ours = ("manifest.json", LISTING, FOLDER)
    if others := sorted(e.name for e in folder.iterdir() if not e.name.startswith(".") and e.name not in ours):
        raise ValueError(f"{folder} holds other files, such as {others[0]}; choose another folder")
