"""Images that have a value for every pixel: a class, or a depth."""

from __future__ import annotations

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from vitreg.images.ahead import map_ahead
from vitreg.images.files import ImageFiles
from vitreg.images.listed import read_list
from vitreg.images.packed import PackedStrings
from vitreg.images.reading import ImageError, image_size, walk_images

_NAMED = 3
_HEADERS_AHEAD = 256
_TARGETS_AHEAD = 32

Pair = tuple[str, str]
Targets = TypeVar("Targets", bound="DenseSet")
Read = TypeVar("Read")


class DenseSet(ImageFiles):
    """Image files with a target each, an array of the image's own height and width.

    Attributes:
        kind: what a target is called in messages: `"mask"`.
        modes: Pillow's modes that a target may have.
        wanted: these in words.
        meaning: all that a target follows from besides its file.
    """

    kind: str
    modes: frozenset[str]
    wanted: str
    meaning: tuple[object, ...]

    def __init__(self, source: str, pairs: Sequence[Pair]) -> None:
        """Takes pairs of paths, of the image and of its target, and compares their headers.

        Raises:
            ValueError: there are none, or targets are missing, unreadable, of another size or another mode; it names
                the first ones.
        """
        if not pairs:
            raise ValueError(f"{source} holds no image with a {self.kind}")
        super().__init__(source, (image for image, _ in pairs))
        self._targets = PackedStrings(target for _, target in pairs)
        found = map_ahead(self._misfit, range(len(self)), ahead=_HEADERS_AHEAD)
        raise_if_any(f"{self.kind}s of {source} do not fit their images", [misfit for misfit in found if misfit])

    def part(self: Targets, indices: Iterable[int]) -> Targets:
        """Some of the images, with their targets."""
        part, chosen = copy.copy(self), list(indices)
        part._paths = PackedStrings(self._paths[index] for index in chosen)
        part._targets = PackedStrings(self._targets[index] for index in chosen)
        return part

    def target_name(self, index: int) -> str:
        """What to call a target in messages: its path."""
        return self._targets[index]

    def targets_digest(self) -> str:
        """32 hexadecimal digits that change with any byte of the targets' files, their order, and what they mean.

        The files are read: a mask is often replaced by one of the same size.
        """

        def content(index: int) -> bytes:
            try:
                return hashlib.blake2b(Path(self.target_name(index)).read_bytes(), digest_size=16).digest()
            except OSError:  # `target` will say so
                return b"missing"

        found = hashlib.blake2b(repr(self.meaning).encode(), digest_size=16)
        for digest in map_ahead(content, range(len(self)), ahead=_HEADERS_AHEAD):
            found.update(digest)
        return found.hexdigest()

    @abstractmethod
    def target(self, index: int) -> Shaped[np.ndarray, "H W"]:
        """The value of every pixel, read from the file.

        Raises:
            ImageError: it cannot be read or holds what it may not; the message names it.
        """

    def map_targets(self, function: Callable[[np.ndarray], Read], indices: Iterable[int]) -> list[Read]:
        """What a function makes of targets, which threads read ahead.

        Raises:
            ValueError: some cannot be used; it names the first ones.
        """

        def read(index: int) -> Read | ImageError:
            try:
                return function(self.target(index))
            except ImageError as error:
                return error

        found = list(map_ahead(read, indices, ahead=_TARGETS_AHEAD))
        errors = [str(error) for error in found if isinstance(error, ImageError)]
        raise_if_any(f"{self.kind}s of {self.source} cannot be used", errors)
        return [made for made in found if not isinstance(made, ImageError)]

    def _misfit(self, index: int) -> str:
        """Why a target cannot be the image's, by their headers; nothing where it can."""
        try:
            height, width = image_size(self.name(index))
            with Image.open(self.target_name(index)) as target:
                size, mode = (target.height, target.width), target.mode
        except ImageError as error:
            return str(error)
        except OSError as error:
            return f"{self.target_name(index)} cannot be read ({error.strerror or 'it is not an image'})"
        if size != (height, width):
            return f"{self.target_name(index)} is {size[1]} x {size[0]}, its image {width} x {height} pixels"
        if mode not in self.modes:
            return f"{self.target_name(index)} is of mode {mode}, not {self.wanted}"
        return ""

    def _read(self, index: int) -> Shaped[np.ndarray, "H W"]:
        """The numbers in a target's file, palette indices as they are."""
        name = self.target_name(index)
        try:
            with Image.open(name) as target:
                return np.asarray(target)
        # As with images: damaged files raise whatever the parsing trips over.
        except Exception as error:
            raise ImageError(f"{name} is damaged ({error or type(error).__name__}); replace it") from error


def raise_if_any(what: str, found: Sequence[str]) -> None:
    """Refuses several files in one sentence.

    Args:
        what: is wrong with them.
        found: the files, or a sentence about each; none is well.

    Raises:
        ValueError: there are some; it counts them and has the first ones.
    """
    if found:
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise ValueError(f"{what} ({len(found)}): {'; '.join(found[:_NAMED])}{more}")


def folder_pairs(images: Path, targets: Path) -> list[Pair]:
    """The images below a folder, each with the file of the same name, but for the suffix, below another.

    Raises:
        ValueError: a folder does not exist, a name comes twice in one, or only in one of the two.
    """
    found = []
    for folder in (images, targets):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; expected {images.name} and {targets.name} side by side")
        paths = sorted(walk_images(folder))
        by_name = {str(path.relative_to(folder).with_suffix("")): str(path) for path in paths}
        kept = set(by_name.values())
        raise_if_any(
            f"files of {folder} have the name of another", [str(path) for path in paths if str(path) not in kept]
        )
        found.append(by_name)
    ours, theirs = found
    raise_if_any(f"images have no partner in {targets}", [ours[name] for name in ours if name not in theirs])
    raise_if_any(f"files have no image in {images}", [theirs[name] for name in theirs if name not in ours])
    return [(ours[name], theirs[name]) for name in ours]


def listed_pairs(listed: Path, of: str, pair: Callable[[str], tuple[Path, Path]]) -> list[Pair]:
    """The pairs that a list names: `pair` has the paths that a line stands for, and `of` what lies beside the list.

    Raises:
        ValueError: there is no such list, or files that it names do not exist.
    """
    pairs = [pair(line) for line in read_list(listed, of)]
    raise_if_any(
        f"files of {listed} do not exist", [str(file) for each in pairs for file in each if not file.is_file()]
    )
    return [(str(image), str(target)) for image, target in pairs]


def open_folders(
    folder: Path, targets: str, released: str, make: Callable[[str, list[Pair]], Targets]
) -> tuple[Targets, Targets]:
    """The sets `train` and `val` of a folder, each of them a folder of `images` and one of `targets`.

    Args:
        folder: which.
        targets: what the folders of targets are called.
        released: other ways to name a set, for the message.
        make: a set, of its source and pairs.

    Raises:
        ValueError: a folder does not exist, or files are in one of two only.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with train/ and val/, or {released}")
    parts = folder / "train", folder / "val"
    train, val = (make(str(part), folder_pairs(part / "images", part / targets)) for part in parts)
    return train, val
