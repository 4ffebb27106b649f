"""Pictures in whatever form they come, as batches on the model's device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.images.reading import find_images
from vitreg.images.stream import ImageBatch, ImageStream, SkippedImage
from vitreg.model.preprocess import Preprocess

Images = Float[Tensor, "B 3 H W"] | str | os.PathLike[str] | Iterable[Any]
"""A normalised batch, a file, folder or glob, a list of these, or a DataLoader (or any iterable) of batches, or of
tuples that begin with a batch."""


class Batches:
    """Iterates over `(batch [B, 3, H, W], a name for each image)`.

    Attributes:
        total: number of images, None where it is not known beforehand.
    """

    def __init__(
        self,
        images: Images,
        preprocess: Preprocess,
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
        strict: bool = False,
        limit: int | None = None,
        select: Callable[[int], bool] | None = None,
    ) -> None:
        """Prepares; nothing is read before it is iterated.

        Args:
            images: what there is.
            preprocess: what is done to files; tensors are taken as they are.
            batch_size: images at a time, where `images` is no iterable of batches.
            device: where the batches are put.
            strict: a file that cannot be read is an error, instead of being skipped and listed.
            limit: use only this many files, the first.
            select: use only the images for whose number (from 0) this is true.

        Raises:
            ValueError: no files are found.
        """
        self.total: int | None = None
        self._device, self._select = device, select
        self._stream: ImageStream | None = None
        if isinstance(images, str | os.PathLike):
            images = [images]
        if isinstance(images, Tensor):
            images = images if select is None else images[[i for i in range(len(images)) if select(i)]]
            self.total, self._select = len(images), None
            self._source: Iterable[Any] = images.split(batch_size)
        elif isinstance(images, list | tuple) and images and isinstance(images[0], str | os.PathLike):
            paths = [path for i, path in enumerate(find_images(images)) if select is None or select(i)]
            self._stream = ImageStream(
                paths, preprocess, batch_size=batch_size, strict=strict, limit=limit, device=device
            )
            self.total = len(self._stream)
        else:
            self._source = images
            if isinstance(images, Batches) and select is None:
                self.total = images.total

    @property
    def repeatable(self) -> bool:
        """Whether the images can be gone through more than once; those of a generator cannot."""
        if self._stream is not None:
            return True
        return self._source.repeatable if isinstance(self._source, Batches) else iter(self._source) is not self._source

    @property
    def skipped(self) -> tuple[SkippedImage, ...]:
        """The files that the latest iteration could not read."""
        return () if self._stream is None else tuple(self._stream.skipped)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        if self._stream is not None:
            for batch in self._stream:
                yield batch.images, [path.name for path in batch.paths]
            return
        number = count()
        for source in self._source:
            batch = _tensor(source)
            numbers = [next(number) for _ in range(len(batch))]
            if self._select is not None:
                rows = [row for row, i in enumerate(numbers) if self._select(i)]
                batch, numbers = batch[rows], [numbers[row] for row in rows]
            if numbers:
                yield batch.to(self._device), [f"image {i + 1}" for i in numbers]


def _tensor(batch: Any) -> Tensor:
    """The images of what a DataLoader yields."""
    if isinstance(batch, ImageBatch):
        return batch.images
    if isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise ValueError(f"images yields {type(batch).__name__}; expected batches [B, 3, H, W] or tuples beginning so")
    return batch
