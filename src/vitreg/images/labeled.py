"""Sets of images that can be read in any order, with their labels or captions."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Item = TypeVar("Item")


class ImageSet(ABC):
    """Images with what is known of them; safe to hand to worker processes.

    Attributes:
        source: where they are from, for messages.
        classes: names of the classes, in the order of the labels; empty where there are no labels.
        labels: class number of every image; None where there are no labels.
    """

    source: str
    classes: tuple[str, ...] = ()
    labels: Sequence[int] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """An image, upright and in RGB.

        Raises:
            ImageError: it cannot be read; the message names it.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in messages: its path, or its place in an archive."""

    def file(self, index: int) -> str:
        """The file that an image is in: its own, or an archive's."""
        return self.name(index)

    def id(self, index: int) -> str:
        """What to call an image in results: as `name`, but without the place that the set is in."""
        return self.name(index)

    def label(self, index: int) -> int | None:
        """The number of its class; None where there are no labels."""
        return None if self.labels is None else int(self.labels[index])

    def captions(self, index: int) -> tuple[str, ...]:
        """Sentences about an image."""
        return ()

    def digest(self, numbers: range | None = None) -> str:
        """32 hexadecimal digits that change with the images, their order, their labels and the classes.

        An image is told by its name, and by size and time of change of the file that it is in: reading the bytes of a
        million images again would take longer than most of what this is asked for. What it does not see is a file that
        was replaced by one of the same size whose time was set back.

        Args:
            numbers: of some of the images; by default it is of all.
        """
        found = hashlib.blake2b(digest_size=16)
        last, state = "", b""
        for index in range(len(self)) if numbers is None else numbers:
            if (file := self.file(index)) != last:
                last, state = file, _state(file)
            found.update(self.name(index).encode(errors="surrogateescape") + b"\0" + state)
        found.update(repr(self.classes).encode())
        if self.labels is not None:
            labels = np.asarray(self.labels, np.int64)
            found.update((labels if numbers is None else labels[numbers.start : numbers.stop]).tobytes())
        return found.hexdigest()


class Subset(ImageSet):
    """Some images of a set, by their indices."""

    def __init__(self, images: ImageSet, indices: NDArray[np.int64]) -> None:
        self._images, self._indices = images, indices
        self.source, self.classes = images.source, images.classes
        self.labels = None if images.labels is None else np.asarray(images.labels)[indices].tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Image.Image:
        return self._images.image(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._images.name(int(self._indices[index]))

    def file(self, index: int) -> str:
        return self._images.file(int(self._indices[index]))

    def id(self, index: int) -> str:
        return self._images.id(int(self._indices[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._images.captions(int(self._indices[index]))


def _state(file: str) -> bytes:
    try:
        status = os.stat(file)
    except OSError:  # reading it will say so
        return b"missing"
    return b"%d %d" % (status.st_size, status.st_mtime_ns)


def source_of(files: Sequence[Path]) -> str:
    """What to call a set that is in several files."""
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def spaced_indices(total: int, count: int) -> NDArray[np.int64]:
    """`count` of `total` numbers, at equal distances; all where there are fewer."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def spaced(items: Sequence[Item], count: int | None) -> list[Item]:
    """`count` of the items, at equal distances; all by default."""
    return list(items) if count is None else [items[i] for i in spaced_indices(len(items), count)]
