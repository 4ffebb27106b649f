"""The feature pass: a model sees every image once, and what is asked for of its tokens is kept on disk."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitreg.artifacts import LogAxis, NormStatistics, OutlierNorms, model_card, outlier_norms
from vitreg.common.disk import check_room, lock, put_in_place, remove_partial_files, writing
from vitreg.common.progress import OnProgress
from vitreg.images import (
    ImageSet,
    SetShards,
    Shards,
    open_shards,
)
from vitreg.model import Preprocess, VisionTransformer
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.store.listing import LISTING, in_listed_order, write_listing
from vitreg.probes.store.manifest import Manifest, StoreStatistics, read_manifest
from vitreg.probes.store.on_ray import Ray, run_on_ray
from vitreg.probes.store.origin import PARTS, FeaturesConfig, Origin, check_same
from vitreg.probes.store.shard_pass import ShardPass, shard_path
from vitreg.probes.store.shards import (
    FOLDER,
    open_shard,
)


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
            run_on_ray(ray, vit, shards, folder, manifest, strict, on_progress, say, batch_size, indices)
            if part[1] == 1:  # of workers that were lost
                remove_partial_files(folder / FOLDER)
        return _finish(folder, manifest, shards)
    finally:
        if held is not None:
            held.close()


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
