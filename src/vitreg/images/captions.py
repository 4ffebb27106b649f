"""Images with sentences about them, listed in a CSV file."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitreg.images.files import ImageFiles
from vitreg.images.listed import read_rows
from vitreg.images.packed import PackedStrings


class CaptionedFiles(ImageFiles):
    """Image files with one sentence or more about each."""

    def __init__(self, source: str, captions: Mapping[str, Sequence[str]]) -> None:
        """Takes paths and their sentences.

        Args:
            source: where they are from, for messages.
            captions: the sentences about every file, by path.
        """
        super().__init__(source, captions)
        self._captions = PackedStrings(sentence for sentences in captions.values() for sentence in sentences)
        self._ends = array("q", [0])
        for sentences in captions.values():
            self._ends.append(self._ends[-1] + len(sentences))

    def captions(self, index: int) -> tuple[str, ...]:
        index = range(len(self))[index]
        return tuple(self._captions[row] for row in range(self._ends[index], self._ends[index + 1]))


def open_captions(path: Path) -> CaptionedFiles:
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
    return CaptionedFiles(str(path), {str(folder / name): sentences for name, sentences in captions.items()})
