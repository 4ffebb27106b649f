"""Images shard by shard: a tar, a row group of Parquet, or so many images of a set."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from threading import RLock

import numpy as np
from PIL import Image

from vitreg.images.labeled import ImageSet, Subset
from vitreg.images.parquet import RowGroup, row_groups
from vitreg.images.reading import ImageError
from vitreg.images.sets import open_image_set, shard_files
from vitreg.images.tars import TarImages

_STRIDE = 2**40
_OPEN = 8
"""Archives that are kept open: threads read ahead into the next."""


class Shards(ABC):
    """A source in parts that are read one after the other, by any number of processes.

    Attributes:
        images: read by number, those of shard i from `i * stride` on.
        stride: between the first numbers of two shards.
        num_images: of all shards; None where these are not opened yet.
    """

    images: ImageSet
    stride: int
    num_images: int | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def numbers(self, index: int) -> range:
        """Of the images of a shard."""

    def absent(self) -> frozenset[int]:
        """Numbers of images whose files are missing now."""
        return frozenset()

    @abstractmethod
    def open(self, index: int) -> ImageSet:
        """The images of a shard by themselves."""

    def share(self, index: int) -> float:
        """Of all images, roughly, that are in a shard."""
        return len(self.open(index)) / (self.num_images or 1)

    @abstractmethod
    def digest(self, index: int | None = None) -> str:
        """32 hexadecimal digits that change with what a shard holds, or all of them."""


class SetShards(Shards):
    """So many images of a set each.

    Args:
        images: the set.
        size: images a shard.
    """

    def __init__(self, images: ImageSet, size: int) -> None:
        self.images, self.stride, self.num_images = images, size, len(images)
        self._digests: dict[int, str] = {}

    def __len__(self) -> int:
        return -(-len(self.images) // self.stride)

    def numbers(self, index: int) -> range:
        return range(index * self.stride, min((index + 1) * self.stride, len(self.images)))

    def open(self, index: int) -> ImageSet:
        return Subset(self.images, np.array(self.numbers(index)))

    def digest(self, index: int | None = None) -> str:
        if index is None:
            return self.images.digest()
        # What it held when it was first asked for: files may vanish on the way.
        if index not in self._digests:
            self._digests[index] = self.images.digest(self.numbers(index))
        return self._digests[index]

    def absent(self) -> frozenset[int]:
        return frozenset(n for n in range(len(self.images)) if not os.path.exists(self.images.file(n)))


class ArchiveShards(Shards):
    """Tars, or the row groups of Parquet files, which are opened when their turn comes.

    An archive that cannot be opened is one image that cannot be read.

    Args:
        source: where they are from, for messages.
        states: path of each file, its size and time of change, and what part of it a shard is.
        openers: open the shards.
    """

    stride = _STRIDE

    def __init__(
        self, source: str, states: Sequence[tuple[str, int, int, int]], openers: Sequence[Callable[[], ImageSet]]
    ) -> None:
        self._states = states
        self.images = self._opened = _Opened(source, openers, [state[0] for state in states])

    def __len__(self) -> int:
        return len(self._states)

    def numbers(self, index: int) -> range:
        return range(index * _STRIDE, index * _STRIDE + len(self.open(index)))

    def open(self, index: int) -> ImageSet:
        return self._opened.shard(index)

    def share(self, index: int) -> float:
        return self._states[index][1] / sum(state[1] for state in self._states)

    def digest(self, index: int | None = None) -> str:
        states = self._states if index is None else self._states[index]
        return hashlib.blake2b(repr(states).encode(errors="surrogateescape"), digest_size=16).hexdigest()


class _Opened(ImageSet):
    """Numbers are the shard's times the stride, and from there those in the shard."""

    def __init__(self, source: str, openers: Sequence[Callable[[], ImageSet]], files: list[str]) -> None:
        self.source, self._openers, self._files, self._lock = source, openers, files, RLock()
        self._open = lru_cache(_OPEN)(self._open_now)

    def __reduce__(self) -> tuple[type[_Opened], tuple[str, Sequence[Callable[[], ImageSet]], list[str]]]:
        return _Opened, (self.source, self._openers, self._files)

    def __len__(self) -> int:
        return len(self._openers) * _STRIDE

    def shard(self, index: int) -> ImageSet:
        with self._lock:
            return self._open(index)

    def _open_now(self, index: int) -> ImageSet:
        try:
            return self._openers[index]()
        except (OSError, ValueError) as error:
            return _Unreadable(self._files[index], str(error))

    def _at(self, number: int) -> tuple[ImageSet, int]:
        index, row = divmod(number, _STRIDE)
        return self.shard(index), row

    def image(self, index: int) -> Image.Image:
        images, row = self._at(index)
        return images.image(row)

    def name(self, index: int) -> str:
        images, row = self._at(index)
        return images.name(row)

    def id(self, index: int) -> str:
        images, row = self._at(index)
        return images.id(row)

    def file(self, index: int) -> str:
        return self._files[index // _STRIDE]

    def label(self, index: int) -> int | None:
        images, row = self._at(index)
        return images.label(row)


class _Unreadable(ImageSet):
    def __init__(self, file: str, reason: str) -> None:
        self.source, self._reason = file, reason

    def __len__(self) -> int:
        return 1

    def image(self, index: int) -> Image.Image:
        raise ImageError(self._reason)

    def name(self, index: int) -> str:
        return self.source


def open_shards(images: ImageSet | str | os.PathLike[str], size: int) -> Shards:
    """The shards of a set, or of what `open_image_set` opens: tars and row groups are one each.

    Args:
        images: the images, or where they are.
        size: images a shard, where they are not in archives.

    Raises:
        ValueError: there is nothing of the kind, or a file of Parquet cannot be read.
    """
    if isinstance(images, ImageSet):
        return SetShards(images, size)
    path = Path(images).expanduser()
    if not (files := shard_files(path)):
        return SetShards(open_image_set(path), size)
    states: list[tuple[str, int, int, int]] = []
    openers: list[Callable[[], ImageSet]] = []
    num_images: int | None = None
    for file in files:
        status = file.stat()
        state = (str(file), status.st_size, status.st_mtime_ns)
        if file.suffix == ".parquet":
            for number, (first_row, count) in enumerate(row_groups(file)):
                states.append((*state, number))
                openers.append(partial(RowGroup, file, number, first_row))
                num_images = (num_images or 0) + count
        else:
            states.append((*state, 0))
            openers.append(partial(TarImages, [file]))
    shards = ArchiveShards(str(path), states, openers)
    shards.num_images = num_images
    return shards
