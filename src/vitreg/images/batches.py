"""What users hand in, in whatever form, as batches on the model's device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitreg.images.files import ImageFiles
from vitreg.images.labeled import ImageSet, spaced_indices
from vitreg.images.reading import as_rgb, find_images
from vitreg.images.stream import ImageBatch, ImageStream, SkippedImage
from vitreg.model.preprocess import Preprocess

Images = Float[Tensor, "B 3 H W"] | str | os.PathLike[str] | Image.Image | Iterable[Any]
"""A normalized batch or image; a file, folder or glob, an open image or an array of pixels, or a list of these; a
DataLoader (or any iterable) of batches, or of tuples that begin with a batch."""

MAX_NORMALIZED = 20.0
"""Normalized values are within about 3; pixels go to 255."""


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
        """Prepares; no file is read before it is iterated.

        Args:
            images: what there is.
            preprocess: what is done to files and open images; batches are taken as they are.
            batch_size: images at a time, where `images` is no iterable of batches.
            device: where the batches are put.
            strict: a file that cannot be read is an error, instead of being skipped and listed.
            limit: use only this many images, at equal distances; of an iterable of batches the first.
            select: use only the images for whose number (from 0) this is true.

        Raises:
            ValueError: no files are found, a count is below 1, or a batch is not what a model takes.
        """
        for name, value in (("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.total: int | None = None
        self._preprocess, self._device = preprocess, device
        self._limit, self._select = limit, select
        self._stream: ImageStream | None = None
        self._source: Iterable[Any] = ()
        if isinstance(images, str | os.PathLike):
            images = [images]
        of_set: ImageSet | None = in_memory(images)
        strict = strict or of_set is not None
        if of_set is None and isinstance(images, list | tuple) and images and isinstance(images[0], str | os.PathLike):
            of_set = ImageFiles("the files that were given", map(str, find_images(images)))
        if of_set is not None:
            numbers = self._numbers(len(of_set))
            self._stream = ImageStream(
                of_set, preprocess, numbers=numbers, batch_size=batch_size, strict=strict, device=device
            )
        elif isinstance(images, Tensor | np.ndarray):
            batch = check_batch(torch.as_tensor(images))
            self._source = batch[self._numbers(len(batch))].split(batch_size)
        else:
            if not isinstance(images, Iterable):
                what = "None" if images is None else type(images).__name__
                raise ValueError(f"images is {what}; give a batch, files, open images in a list, or a DataLoader")
            self._source = images
            if isinstance(images, Batches) and select is None:
                self.total = images.total

    def _numbers(self, total: int) -> list[int]:
        """Which of so many images are used."""
        numbers = range(total) if self._limit is None else spaced_indices(total, self._limit).tolist()
        chosen = [i for i in numbers if self._select is None or self._select(i)]
        self.total, self._limit, self._select = len(chosen), None, None
        return chosen

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
        first = 0
        for source in self._source:
            batch = check_batch(self._tensor(source), first)
            rows = [row for row in range(len(batch)) if self._uses(first + row)]
            if rows:
                used = batch if len(rows) == len(batch) else batch[rows]
                yield used.to(self._device), [f"image {first + row + 1}" for row in rows]
            first += len(batch)
            if self._limit is not None and first >= self._limit:
                return

    def _uses(self, number: int) -> bool:
        """Whether this image of an iterable is used."""
        return (self._limit is None or number < self._limit) and (self._select is None or self._select(number))

    def _tensor(self, source: Any) -> Tensor:
        """The images of an open image, a list of such, or what a DataLoader yields."""
        if isinstance(source, ImageBatch):
            return source.images
        if (opened := in_memory(source)) is not None:
            return torch.stack([self._preprocess(opened.image(i)) for i in range(len(opened))])
        if isinstance(source, list | tuple) and source:
            source = source[0]
        if not isinstance(source, Tensor | np.ndarray):
            what = (
                f"{source!r}; give files as a list" if isinstance(source, str | os.PathLike) else type(source).__name__
            )
            raise ValueError(f"images yields {what}; expected batches [B, 3, H, W] or tuples beginning so")
        return torch.as_tensor(source)


class _OpenImages(ImageSet):
    source = "the images that were given"

    def __init__(self, images: Sequence[Any]) -> None:
        self._images, self._lock = images, Lock()

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        with self._lock:  # the same image may be given twice, and two threads cannot load it at once
            return as_rgb(self._images[index])

    def name(self, index: int) -> str:
        return f"image {index + 1}"


def in_memory(images: object) -> ImageSet | None:
    """The images that are pixels: of Pillow, or 8-bit arrays `[H, W, 3]` or `[B, H, W, 3]`. None if these are not.

    The first of a list or tuple decides.
    """
    if isinstance(images, Image.Image):
        return _OpenImages([images])
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[-1] in (3, 4):
        return _OpenImages([images] if images.ndim == 3 else list(images))
    if isinstance(images, list | tuple) and images:
        first = images[0]
        if isinstance(first, Image.Image) or (isinstance(first, np.ndarray) and first.ndim == 3 and in_memory(first)):
            return _OpenImages(images)
    return None


def check_batch(batch: Tensor, first: int = 0) -> Float[Tensor, "B 3 H W"]:
    """The batch, or the batch of one image `[3, H, W]`.

    Args:
        batch: what is given for normalized images.
        first: number of its first image, for messages.

    Raises:
        ValueError: another shape, pixels instead of normalized values, or values that are not finite.
    """
    if batch.ndim == 3:
        batch = batch.unsqueeze(0)
    if batch.ndim != 4 or batch.shape[1] != 3:
        hint = "; move the channels: images.movedim(-1, -3)" if batch.ndim == 4 and batch.shape[-1] == 3 else ""
        raise ValueError(f"images has the shape {list(batch.shape)}; expected [B, 3, H, W], or [3, H, W] for one{hint}")
    advice = "normalize them: vit.preprocess.normalize(images) of 8-bit values, or give files or Pillow's images"
    if not batch.is_floating_point():
        raise ValueError(f"images holds {str(batch.dtype).removeprefix('torch.')} values, models take floats; {advice}")
    if batch.numel():
        lowest, highest = batch.flatten(1).amin(1), batch.flatten(1).amax(1)  # `aminmax` takes eight times as long
        if bad := (~(lowest + highest).isfinite()).nonzero().flatten().tolist():
            raise ValueError(
                f"image {first + bad[0]} (counted from 0) holds values that are not finite, as do {len(bad)} of "
                f"{len(batch)}; leave them out, or look at how they were made"
            )
        if float(highest.max()) > MAX_NORMALIZED:
            raise ValueError(f"images holds values up to {float(highest.max()):g}, which are pixels; {advice}")
    return batch
