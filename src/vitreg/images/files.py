"""Images that are files: folders of them, with or without a folder for each class, and lists with captions."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from vitreg.images.labeled import ImageSet
from vitreg.images.listed import read_rows
from vitreg.images.packed import PackedStrings
from vitreg.images.reading import EXTENSIONS, ImageError, is_folder, read_image, walk_images

_BETWEEN = "\0"
"""What no sentence contains."""


class ImageFiles(ImageSet):
    """Image files, in the order they are given.

    Args:
        source: where they are from, for messages.
        paths: of the files; nothing is read.
        classes: names of the classes.
        labels: class number of every file.
        captions: sentences about every file.
    """

    def __init__(
        self,
        source: str,
        paths: Iterable[str],
        *,
        classes: tuple[str, ...] = (),
        labels: Sequence[int] | None = None,
        captions: Iterable[Sequence[str]] | None = None,
    ) -> None:
        self.source, self.classes, self.labels = source, classes, labels
        self._paths = PackedStrings(paths)
        self._captions = None if captions is None else PackedStrings(map(_BETWEEN.join, captions))

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> Image.Image:
        return read_image(self._paths[index])

    def name(self, index: int) -> str:
        return self._paths[index]

    def id(self, index: int) -> str:
        return self._paths[index].removeprefix(self.source.rstrip(os.sep) + os.sep)

    def captions(self, index: int) -> tuple[str, ...]:
        return () if self._captions is None else tuple(self._captions[index].split(_BETWEEN))


def open_folder(folder: Path) -> ImageFiles:
    """The images below a folder, sorted by their paths.

    A folder that holds two or more others and no image is one of classes, as ImageNet's: the classes are these
    folders in sorted order, and their images may be nested deeper. Otherwise there are no labels.

    Raises:
        ValueError: there is no image, or none in the folder of a class.
    """
    classes, found, labels = _class_folders(folder), list[str](), array("q")
    for label, name in enumerate(classes or [""]):
        paths = sorted(map(str, walk_images(folder / name)))
        if not paths and name:
            raise ValueError(f"class folder {folder / name} holds no image; put some in it or remove the folder")
        if not paths:
            raise ValueError(
                f"{folder} holds no image; expected class folders, files ending in {', '.join(sorted(EXTENSIONS))}, "
                "*.parquet, *.tar or captions.csv"
            )
        found += paths
        labels.extend([label] * len(paths))
    return ImageFiles(str(folder), found, classes=tuple(classes), labels=labels if classes else None)


def _class_folders(folder: Path) -> list[str]:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise ImageError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from None
    names = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if is_folder(entry):
            names.append(entry.name)
        elif Path(entry.name).suffix[1:].lower() in EXTENSIONS:
            return []
    return sorted(names) if len(names) > 1 else []


def open_captions(path: Path) -> ImageFiles:
    """The images of a CSV file with columns `image` and `caption`, in the order in which it first names them.

    An image has as many captions as rows. Paths are relative to the folder `images` beside the file where one of the
    images is there, else to the file. Some images may be missing, which reading them reports.

    Raises:
        ValueError: the file is malformed, empty, or all of its images are missing.
    """
    captions: dict[str, list[str]] = {}
    for image, caption in read_rows(path, "image", "caption"):
        captions.setdefault(image, []).append(caption)
    if not captions:
        raise ValueError(f"{path} has no rows; expected one for each caption of an image")
    folders = (path.parent / "images", path.parent)
    folder = next((folder for folder in folders if any((folder / name).is_file() for name in captions)), None)
    if folder is None:
        first = ", ".join(list(captions)[:3])
        raise ValueError(
            f"none of the {len(captions)} images of {path} exists ({first}, ...); "
            f"put them into {folders[0]} or beside the file"
        )
    return ImageFiles(str(path), (str(folder / name) for name in captions), captions=captions.values())
