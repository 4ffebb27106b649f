"""Many images to a model: decoded by background threads, in order, in full batches, in constant memory."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitreg.images.ahead import default_threads, map_ahead
from vitreg.images.reading import ImageError, read_image
from vitreg.model.preprocess import Preprocess

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class SkippedImage:
    """A file that a stream left out, and the sentence that says why."""

    path: Path
    reason: str


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Images ready for the model, the files they are from, and (height, width) of the upright images in these."""

    images: Float[Tensor, "B 3 h w"]
    paths: list[Path]
    sizes: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class _Pixels:
    pixels: UInt8[Tensor, "3 h w"]
    size: tuple[int, int]


_Decoded = tuple[Path, _Pixels | ImageError]


class ImageStream:
    """Batches of preprocessed images from files, any number of them; iterate as often as you like.

    Threads decode while the model computes. They stay at most `_BATCHES_AHEAD` batches ahead, so memory does
    not grow with the number of files, and they end with the iteration, also when it is left early.

    Skipped files are made up for by those that follow: only the last batch may be short. But where images
    come out in different sizes (`Preprocess(crop="none")`), a batch ends where the size changes.

    Attributes:
        skipped: The files that the latest iteration could not read so far.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        preprocess: Preprocess,
        *,
        batch_size: int = 32,
        strict: bool = False,
        num_threads: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Prepares a stream; nothing is read before it is iterated.

        Args:
            paths: Files, as from `find_images`.
            preprocess: What is done to each image, `vit.preprocess`.
            batch_size: Images a batch.
            strict: Raise `ImageError` at the first file that cannot be read, instead of skipping it.
            num_threads: Decoding threads; by default one for each core this process may use, at most 8.
            device: Where batches are put. They travel as bytes and are normalized there.

        Raises:
            ValueError: `paths` is a single path, or a count is below 1.
        """
        if isinstance(paths, str | Path):
            raise ValueError(
                f"paths is the single path {str(paths)!r}; give a list, as from find_images({str(paths)!r})"
            )
        for name, count in (("batch_size", batch_size), ("num_threads", num_threads)):
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}; it must be at least 1")
        self.paths = [Path(path) for path in paths]
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.strict = strict
        self.num_threads = num_threads or default_threads()
        self.device = device
        self.skipped: list[SkippedImage] = []

    def __len__(self) -> int:
        """The number of files, those that will be skipped included."""
        return len(self.paths)

    def __iter__(self) -> Iterator[ImageBatch]:
        skipped = self.skipped = []
        batch: list[tuple[Path, _Pixels]] = []
        ahead = _BATCHES_AHEAD * self.batch_size
        with closing(map_ahead(self._decode, self.paths, ahead=ahead, num_threads=self.num_threads)) as decoded:
            for path, found in decoded:
                if isinstance(found, ImageError):
                    if self.strict:
                        raise found
                    skipped.append(SkippedImage(path, str(found)))
                    continue
                if batch and batch[0][1].pixels.shape != found.pixels.shape:
                    yield self._collate(batch)
                    batch = []
                batch.append((path, found))
                if len(batch) == self.batch_size:
                    yield self._collate(batch)
                    batch = []
            if batch:
                yield self._collate(batch)

    def _collate(self, batch: list[tuple[Path, _Pixels]]) -> ImageBatch:
        paths, decoded = zip(*batch, strict=True)
        stacked = torch.from_numpy(np.stack([one.pixels.numpy() for one in decoded]))
        images = self.preprocess.normalize(stacked.to(self.device))
        return ImageBatch(images, list(paths), [one.size for one in decoded])

    def _decode(self, path: Path) -> _Decoded:
        try:
            image = read_image(path)
            return path, _Pixels(self.preprocess.pixels(image), (image.height, image.width))
        except ImageError as error:
            return path, error
