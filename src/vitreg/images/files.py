"""Images that are files: folders of them, with or without a folder for each class."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from vitreg.images.labeled import ImageSet
from vitreg.images.packed import PackedStrings
from vitreg.images.reading import EXTENSIONS, ImageError, is_folder, read_image, walk_images


class ImageFiles(ImageSet):
    """Image files, in the order they are given."""

    def __init__(
        self,
        source: str,
        paths: Iterable[str],
        *,
        classes: tuple[str, ...] = (),
        labels: Sequence[int] | None = None,
    ) -> None:
        """Takes their paths; nothing is read.

        Args:
            source: where they are from, for messages.
            paths: of the files.
            classes: names of the classes.
            labels: class number of every file.
        """
        self.source, self.classes, self.labels = source, classes, labels
        self._paths = PackedStrings(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> Image.Image:
        return read_image(self._paths[index])

    def name(self, index: int) -> str:
        return self._paths[index]


def open_folder(folder: Path) -> ImageFiles:
    """The images below a folder, sorted by their paths.

    A folder that holds two or more others and no image is one of classes, as ImageNet's: the classes are these
    folders in sorted order, and their images may be nested deeper. Otherwise there are no labels.

    Raises:
        ValueError: there is no image, or none in the folder of a class.
    """
    names = _class_folders(folder)
    if not names:
        paths = sorted(map(str, walk_images(folder)))
        if not paths:
            raise ValueError(
                f"{folder} holds no image; expected class folders, files ending in {', '.join(sorted(EXTENSIONS))}, "
                "*.parquet, *.tar or captions.csv"
            )
        return ImageFiles(str(folder), paths)
    found: list[str] = []
    labels = array("q")
    for label, name in enumerate(names):
        paths = sorted(map(str, walk_images(folder / name)))
        if not paths:
            raise ValueError(f"class folder {folder / name} holds no image; put some in it or remove the folder")
        found += paths
        labels.extend([label] * len(paths))
    return ImageFiles(str(folder), found, classes=tuple(names), labels=labels)


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
