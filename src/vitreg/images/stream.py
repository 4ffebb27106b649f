"""The one path from images to batches: decoded by background threads, in order, in full batches, in constant memory."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitreg.common.devices import available_cores
from vitreg.images.ahead import map_ahead
from vitreg.images.files import ImageFiles
from vitreg.images.labeled import ImageSet
from vitreg.images.reading import ImageError
from vitreg.model.preprocess import Preprocess

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class SkippedImage:
    """An image that a stream left out, the sentence that says why, and its number in the set."""

    path: Path
    reason: str
    number: int = field(default=-1, compare=False)

    def to_dict(self) -> dict[str, str]:
        """As results list it."""
        return {"path": str(self.path), "reason": self.reason}


def no_images(skipped: Sequence[SkippedImage]) -> ValueError:
    """The error where no image was left to look at."""
    return ValueError(f"there were no images to look at{f': {skipped[0].reason}' if skipped else ''}")


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Images ready for the model: their numbers in the set, what that calls them, and (height, width) when upright."""

    images: Float[Tensor, "B 3 h w"]
    numbers: list[int]
    paths: list[Path]
    sizes: list[tuple[int, int]]


_Decoded = tuple[int, UInt8[np.ndarray, "3 h w"] | ImageError, tuple[int, int]]
"""Number of an image, its pixels when preprocessed, and its size before."""


class ImageStream:
    """Batches of preprocessed images, any number of them; iterate as often as you like.

    Threads decode while the model computes, at most `_BATCHES_AHEAD` batches ahead, so that memory does not grow with
    the number of images; where the model needs all cores itself, they decode a batch while it waits for that. They end
    with the iteration, also when it is left early.

    Skipped images are made up for by those that follow: only the last batch may be short. But where images
    come out in different sizes (`Preprocess(crop="none")`), a batch ends where the size changes.

    Attributes:
        skipped: The images that the latest iteration could not read so far.
    """

    def __init__(
        self,
        images: ImageSet | Iterable[str | Path],
        preprocess: Preprocess,
        *,
        numbers: Iterable[int] | None = None,
        batch_size: int = 32,
        strict: bool = False,
        num_threads: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Prepares a stream; nothing is read before it is iterated.

        Args:
            images: A set, or files, as from `find_images`.
            preprocess: What is done to each image, `vit.preprocess`.
            numbers: Which of the images, in this order; all by default.
            batch_size: Images a batch.
            strict: Raise `ImageError` at the first image that cannot be read, instead of skipping it.
            num_threads: Decoding threads; by default one for each core this process may use, at most 8.
            device: Where batches are put. They travel as bytes and are normalized there.

        Raises:
            ValueError: `images` is a single path, or a count is below 1.
        """
        if isinstance(images, str | Path):
            raise ValueError(
                f"images is the single path {str(images)!r}; give a list, as from find_images({str(images)!r})"
            )
        for name, count in (("batch_size", batch_size), ("num_threads", num_threads)):
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}; it must be at least 1")
        self.images = images if isinstance(images, ImageSet) else ImageFiles("", map(str, images))
        self.preprocess, self.device = preprocess, device
        self.numbers = range(len(self.images)) if numbers is None else numbers
        self.batch_size, self.strict, self.num_threads = batch_size, strict, num_threads
        self.skipped: list[SkippedImage] = []

    def __len__(self) -> int:
        """The number of images, those that will be skipped included."""
        assert isinstance(self.numbers, Sized)
        return len(self.numbers)

    def __iter__(self) -> Iterator[ImageBatch]:
        with closing(self.parts(len(self.images) or 1)) as parts:
            for _, batches in parts:
                yield from batches

    def parts(self, size: int) -> Generator[tuple[int, Iterator[ImageBatch]], None, None]:
        """The batches of every `size` images of the set, none of which reaches into the next.

        Yields:
            The number of a part, and its batches, which must be taken before the next part. Close the generator where
            it is left early.
        """
        skipped = self.skipped = []
        # Where the model computes on all cores, it and the threads would wait for each other.
        in_bursts = torch.device(self.device or "cpu").type == "cpu" and torch.get_num_threads() >= available_cores()
        decoded = map_ahead(
            self._decode,
            self.numbers,
            ahead=self.batch_size if in_bursts else _BATCHES_AHEAD * self.batch_size,
            num_threads=self.num_threads,
            in_bursts=in_bursts,
        )
        with closing(decoded):
            for part, members in groupby(decoded, lambda one: one[0] // size):
                yield part, self._batches(members, skipped)

    def _batches(self, decoded: Iterable[_Decoded], skipped: list[SkippedImage]) -> Iterator[ImageBatch]:
        batch: list[_Decoded] = []
        shape: tuple[int, ...] = ()
        for number, pixels, size in decoded:
            if isinstance(pixels, ImageError):
                if self.strict:
                    raise pixels
                skipped.append(SkippedImage(Path(self.images.name(number)), str(pixels), number))
                continue
            if batch and shape != pixels.shape:
                yield self._collate(batch)
                batch = []
            batch.append((number, pixels, size))
            shape = pixels.shape
            if len(batch) == self.batch_size:
                yield self._collate(batch)
                batch = []
        if batch:
            yield self._collate(batch)

    def _collate(self, batch: list[_Decoded]) -> ImageBatch:
        numbers, pixels, sizes = map(list, zip(*batch, strict=True))
        stacked = torch.from_numpy(np.stack(pixels))  # torch's threads would take the cores of those that decode
        images = self.preprocess.normalize(stacked.to(self.device))
        return ImageBatch(images, numbers, [Path(self.images.name(number)) for number in numbers], sizes)

    def _decode(self, number: int) -> _Decoded:
        try:
            image = self.images.image(number)
            return number, self.preprocess.pixels(image).numpy(), (image.height, image.width)
        except ImageError as error:
            return number, error, (0, 0)
