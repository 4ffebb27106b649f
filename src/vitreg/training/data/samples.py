"""Which images a run is trained on, in which order, fetched by worker processes."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitreg.common.devices import available_cores
from vitreg.images import ImageError, ImageSet, Subset
from vitreg.training.engine.distributed import Distributed
from vitreg.training.engine.method import Augmentation, Batch, Sample
from vitreg.training.engine.randomness import fixed_randomness

MAX_ATTEMPTS = 100

Fetched = tuple[Batch, list[str]]
"""A batch, and for each image that could not be read the sentence that says why."""


class SampleStream(Dataset[Fetched]):
    """Every epoch the whole set in another order, as one unending sequence of positions.

    What is at a position depends on nothing but the seed: not on the number of processes or workers, and not on where a
    run was interrupted. An image that cannot be read is replaced by another, so that batches are always full.

    Args:
        images: the set.
        augmentation: what is made of each image.
        seed: of the order and the augmentation.
    """

    def __init__(self, images: ImageSet, augmentation: Augmentation, seed: int) -> None:
        self.images, self.augmentation, self.seed = images, augmentation, seed

    def __getitem__(self, positions: range) -> Fetched:
        """The batch of consecutive positions, an even number of them from an even one.

        Raises:
            ValueError: image after image cannot be read.
        """
        skipped: list[str] = []
        pairs = [self._pair(first, skipped) for first in positions[::2]]
        batch = {name: torch.cat([pair[name] for pair in pairs]) for name in pairs[0]}
        return self.augmentation.collate(batch), skipped

    def _pair(self, first: int, skipped: list[str]) -> Batch:
        """Two consecutive positions, the first of them even."""
        rows = []
        for position in (first, first + 1):
            sample = self._sample(position, skipped)
            with fixed_randomness(self.seed, position):
                rows.append(self.augmentation(sample))
        with fixed_randomness(self.seed, first, 1):
            return self.augmentation.mix({name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    def _sample(self, position: int, skipped: list[str]) -> Sample:
        epoch, place = divmod(position, len(self.images))
        index = int(_epoch_order(self.seed, epoch, len(self.images))[place])
        for attempt in range(MAX_ATTEMPTS):
            try:
                label = None if self.images.labels is None else int(self.images.labels[index])
                return Sample(self.images.image(index), label, self.images.captions(index), index)
            except ImageError as error:
                skipped.append(str(error))
                index = int(np.random.default_rng((self.seed, position, attempt)).integers(len(self.images)))
        raise ValueError(f"{MAX_ATTEMPTS} images in a row cannot be read, the last: {skipped[-1]}")


@functools.lru_cache(maxsize=2)  # a batch spans two epochs at most
def _epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_images)


def fetch(
    stream: SampleStream, processes: Distributed, *, batch_size: int, accumulation: int, steps: range, num_workers: int
) -> Generator[Fetched, None, None]:
    """This process's micro-batches, step by step; closing it ends the workers.

    Each process has a contiguous part of a step's positions, and its micro-batches are contiguous parts of that.

    Args:
        stream: the images.
        processes: who shares a batch.
        batch_size: images a step, over all processes.
        accumulation: micro-batches a step and process.
        steps: which steps are wanted.
        num_workers: processes that decode, beside this one; 0 decodes in this one.
    """
    size = batch_size // (processes.world * accumulation)
    # One by one as they are asked for: a run may have millions.
    starts = (
        step * batch_size + (processes.rank * accumulation + k) * size for step in steps for k in range(accumulation)
    )
    loader = DataLoader(
        _Told(stream),
        batch_size=None,
        sampler=(range(start, start + size) for start in starts),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=processes.device.type == "cuda",
        worker_init_fn=_start_worker,
    )
    return _given(iter(loader))


def _given(found: Iterator[Fetched | ValueError]) -> Generator[Fetched, None, None]:
    try:
        for batch in found:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    finally:
        del found  # and with it the workers, which an error's traceback would keep


class _Told(Dataset[Fetched | ValueError]):
    """Hands errors on as values: raised in a worker, they would come with its traceback as their message."""

    def __init__(self, stream: SampleStream) -> None:
        self._stream = stream

    def __getitem__(self, positions: range) -> Fetched | ValueError:
        try:
            return self._stream[positions]
        except ValueError as error:
            return error


def _start_worker(worker: int) -> None:
    """One thread for each worker; and the process that trains, when it is told to stop, ends its workers itself."""
    torch.set_num_threads(1)
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)


def hold_out(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training images and a twentieth of the set, at most 1000, that is kept from training."""
    order = np.random.default_rng((seed, 20)).permutation(len(images))
    count = max(1, min(1000, len(images) // 20))
    return Subset(images, np.sort(order[count:])), Subset(images, np.sort(order[:count]))


def default_workers(processes: Distributed) -> int:
    """Decoding processes: all cores for a GPU; one where the model computes on the same cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 1 if processes.device.type == "cpu" else max(1, min(16, available_cores() // local))
