"""Starting a run, and going on with one."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vitreg.images import ImageSet, Subset, check_classes, open_image_set, open_split, spaced_indices
from vitreg.training.data.samples import default_workers, hold_out
from vitreg.training.engine.config import TrainingConfig
from vitreg.training.engine.distributed import Distributed
from vitreg.training.engine.failures import failures_in_words
from vitreg.training.engine.run_folder import RunFolder
from vitreg.training.engine.trainer import OnLog, Trainer
from vitreg.training.recipes.catalogue import config_from_dict


@dataclass(frozen=True)
class TrainingData:
    """Opened sets, each in memory once.

    Attributes:
        images: to train on.
        held_out: to diagnose and evaluate on.
        train: where they are.
        val: where the held-out ones are, unless they are a part of the others.
        limit: how many of those to train on are used, if not all.
    """

    images: ImageSet
    held_out: ImageSet
    train: str
    val: str | None
    limit: int | None = None


def open_data(
    data: str | Path,
    val: str | Path | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> TrainingData:
    """Images to train on, and others to diagnose and evaluate on.

    Of the processes that `torchrun` started, the first looks for them and tells the others what is where.

    Args:
        data: class folders, Parquet files, WebDataset tars or a `captions.csv`; or a folder with a `train` and a `val`.
        val: held-out images; by default those in `data`, or else a twentieth of it, at most 1000.
        limit: train on so many images only, from all over the set.
        seed: decides which twentieth.
        device: as of `train`.

    Raises:
        ValueError: there are no such images, or they have different classes.
    """

    def look() -> TrainingData:
        images, held_out = open_split(data)
        if val is not None:
            held_out = open_image_set(val)
            check_classes(images, held_out)
        images, held_out = (images, held_out) if held_out is not None else hold_out(images, seed)
        if limit is not None:
            images = Subset(images, spaced_indices(len(images), limit))
        return TrainingData(images, held_out, _place(data), None if val is None else _place(val), limit)

    return Distributed.join(device).on_rank_zero(look)


def train(
    config: TrainingConfig,
    data: TrainingData | str | Path,
    out: str | os.PathLike[str],
    *,
    val: str | Path | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    on_log: OnLog | None = None,
) -> bool:
    """Train a Vision Transformer; `vitreg.load(out)` gives the model.

    Started by `torchrun`, the processes share each batch. The result depends on the seed, not on their number.

    Args:
        config: as a recipe gives it.
        data: what `open_data` returned or takes.
        out: the run's folder, a new one.
        val: as of `open_data`.
        device: cpu, cuda, mps; auto takes a GPU where there is one.
        num_workers: decoding processes for each training process.
        on_log: called on the first process with every entry of the logs.

    Returns:
        Whether it came to the end; False after Ctrl-C, and then `resume` goes on.

    Raises:
        ValueError: bad images or settings, a loss that is not a number, full memory or disk.
    """
    if not config.model.name:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=Path(out).name))
    processes, folder = Distributed.join(device), RunFolder(out)
    try:
        if not isinstance(data, TrainingData):
            data = open_data(data, val, seed=config.seed, device=device)
        source: dict[str, Any] = {
            "train": data.train,
            "val": data.val,
            "limit": data.limit,
            "num_images": len(data.images),
            "classes": list(data.images.classes),
        }
        description = {**config.to_dict(), "data": source, "version": metadata.version("vitreg")}
        processes.on_rank_zero(lambda: folder.create(description))
        return _run(config, folder, data, processes, num_workers, on_log)
    finally:
        folder.release()
        processes.leave()


def resume(
    run: str | os.PathLike[str],
    *,
    data: str | Path | None = None,
    val: str | Path | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    on_log: OnLog | None = None,
) -> bool:
    """Go on with a run from its last checkpoint, as if it had never stopped, on any number of processes.

    Args:
        run: its folder.
        data: where the images are now, if they have moved.
        val: and the held-out ones.
        device: as of `train`.
        num_workers: as of `train`.
        on_log: as of `train`.

    Returns:
        Whether it came to the end.

    Raises:
        ValueError: no run's folder, or other images than the run began with.
    """
    folder = RunFolder(run)
    description = folder.describe()
    try:
        config, before = config_from_dict(description), description["data"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder.config} was changed ({error}); restore it from a copy") from error
    processes = Distributed.join(device)
    try:
        places, limit = (data or before["train"], val or before["val"]), before.get("limit")
        opened = open_data(*places, limit=limit, seed=config.seed, device=device)
        images = opened.images
        if len(images) != before["num_images"] or list(images.classes) != before["classes"]:
            raise ValueError(
                f"{images.source} has {len(images)} images of {len(images.classes)} classes; the run began with "
                f"{before['num_images']} of {len(before['classes'])}; give the same images with --data"
            )
        processes.on_rank_zero(folder.claim)
        return _run(config, folder, opened, processes, num_workers, on_log)
    finally:
        folder.release()
        processes.leave()


def _place(data: str | Path) -> str:
    """Where images are, wherever the run is resumed from; a pattern stays one."""
    return os.path.abspath(Path(data).expanduser())


def _run(
    config: TrainingConfig,
    folder: RunFolder,
    data: TrainingData,
    processes: Distributed,
    num_workers: int | None,
    on_log: OnLog | None,
) -> bool:
    workers = default_workers(processes) if num_workers is None else num_workers
    with failures_in_words(config.batch_size // (processes.world * config.accumulation)):
        trainer = Trainer(config, folder, data.images, data.held_out, processes, num_workers=workers, on_log=on_log)
        trainer.restore()
        return trainer.run()
