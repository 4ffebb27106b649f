"""Sets of images with a class for every pixel: ADE20k, Pascal VOC 2012, and folder pairs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vitreg.images.dense import DenseSet, folder_pairs, listed_pairs, open_folders
from vitreg.images.listed import read_numbered_names, read_text
from vitreg.images.reading import ImageError

IGNORED = 255
"""The class of pixels that do not count."""

_UNCOUNTED = frozenset({"ignore", "unlabeled", "void"})
_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)


class SegmentationSet(DenseSet):
    """Image files with a class for every pixel."""

    kind = "mask"
    modes = frozenset({"1", "L", "P", "I;16", "I"})
    wanted = "one channel of class numbers (L or P)"

    class_names: tuple[str, ...] = ("",) * 256
    """Of the classes that a target holds, from 0."""
    meaning = ()
    # The class of every number in a file, -1 where it may not be there; at first these are the same.
    _classes = np.arange(256, dtype=np.int16)

    def with_classes(self, names: Mapping[int, str], ignored: Iterable[int] = ()) -> SegmentationSet:
        """The same masks with these classes, in the order of their numbers.

        Args:
            names: of the numbers in the files.
            ignored: numbers of pixels that do not count; 255 is always one.
        """
        other, ignored = copy.copy(self), [IGNORED, *ignored]
        counted = [number for number in sorted(names) if number not in ignored]
        other.class_names = tuple(names[number] for number in counted)
        other._classes = np.full(256, -1, np.int16)
        other._classes[ignored] = IGNORED
        other._classes[counted] = np.arange(len(counted))
        known = other._classes >= 0
        other.meaning = other.class_names, np.where(known, other._classes, IGNORED).tolist(), known.tolist()
        return other

    def target(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """The class of every pixel, `IGNORED` (255) where it does not count.

        Raises:
            ImageError: the mask cannot be read, or has a number that is no class; the message names it.
        """
        mask = self._read(index)
        present = np.unique(mask) if mask.dtype.itemsize > 1 else np.flatnonzero(np.bincount(mask.ravel()))
        unknown = [number for number in present.tolist() if not 0 <= number < 256 or self._classes[number] < 0]
        if unknown:
            numbers = np.flatnonzero((self._classes >= 0) & (self._classes != IGNORED))
            raise ImageError(
                f"{self.target_name(index)} has the class number{'s' * (len(unknown) > 1)} "
                f"{', '.join(map(str, unknown[:5]))}, but the {len(numbers)} classes are {numbers[0]} to {numbers[-1]}"
            )
        return self._classes.astype(np.uint8)[mask.astype(np.uint8, copy=False)]


Parts = tuple[SegmentationSet, SegmentationSet]
"""To train on, and to judge by."""


def open_segmentation(source: str, *, num_classes: int | None = None, ignore: int | None = None) -> Parts:
    """The images with masks that `source` names: those to train on, and those to judge by.

    - `ade20k:PATH`: PATH holds `ADEChallengeData2016` as released; 150 classes, 0 in a mask does not count.
    - `voc2012:PATH`: PATH holds `VOCdevkit`; the lists `train` and `val` of `ImageSets/Segmentation`, 21 classes.
    - PATH: a folder with `train/images`, `train/masks`, `val/images` and `val/masks`. A mask has its image's name and
      one channel, or a palette, of class numbers.

    A folder's `classes.csv` (columns `label` and `name`) or `classes.txt` (a name a line, from 0) says what the numbers
    mean; those named void, ignore or unlabeled do not count. Without either, classes are the numbers from 0 to the
    largest in the training masks, all of which are read for it. 255 never counts.

    Args:
        source: as above.
        num_classes: of a folder without names.
        ignore: a number that does not count in a folder's masks, beside 255.

    Raises:
        ValueError: there is nothing of the kind, or masks do not fit their images; the message has the first files.
    """
    kind, _, path = source.partition(":")
    if kind not in _RELEASED:
        return _open_folder(Path(source).expanduser(), num_classes, () if ignore is None else (ignore,))
    if num_classes is not None or ignore is not None:
        raise ValueError(f"{kind} has classes of its own; leave out num_classes and ignore")
    return _RELEASED[kind](Path(path).expanduser())


def _open_folder(folder: Path, num_classes: int | None, ignored: tuple[int, ...]) -> Parts:
    names = _read_names(folder)
    if num_classes is not None and not 2 <= num_classes <= IGNORED:
        raise ValueError(f"num_classes is {num_classes}; it must be 2 to {IGNORED}")
    if names and num_classes is not None:
        raise ValueError(f"{folder} names its classes; leave out num_classes")
    if strange := [number for number in ignored if not 0 <= number <= IGNORED]:
        raise ValueError(f"ignore is {strange[0]}; numbers in masks are 0 to {IGNORED}")
    train, val = open_folders(folder, "masks", f"{', '.join(_RELEASED)}:PATH", SegmentationSet)
    if not names:
        if num_classes is None:

            def largest(mask: np.ndarray) -> int:
                return int(mask[~np.isin(mask, (IGNORED, *ignored))].max(initial=0))

            num_classes = 1 + max(train.map_targets(largest, range(len(train))))
        names = {number: str(number) for number in range(num_classes)}
    ignored += tuple(number for number, name in names.items() if name.lower() in _UNCOUNTED)
    train, val = train.with_classes(names, ignored), val.with_classes(names, ignored)
    if len(train.class_names) < 2:
        raise ValueError(f"{folder} has {len(train.class_names)} class; segmentation needs at least 2")
    return train, val


def _read_names(folder: Path) -> dict[int, str]:
    """The names of the numbers in a folder's masks; none where no file says them."""
    listed, plain = folder / "classes.csv", folder / "classes.txt"
    if plain.is_file():
        # A line that is empty is the place of a number without a name.
        names = {number: line.strip() for number, line in enumerate(read_text(plain).splitlines()) if line.strip()}
    elif listed.is_file():
        names = read_numbered_names(listed)
    else:
        return {}
    if max(names, default=0) > IGNORED:
        raise ValueError(f"{folder} names the number {max(names)}; numbers in masks are 0 to {IGNORED}")
    return names


def _ade20k(folder: Path) -> Parts:
    root = folder / "ADEChallengeData2016"
    if not root.is_dir():
        raise ValueError(f"{root} does not exist; give the folder that holds ADEChallengeData2016")
    listed = root / "objectInfo150.txt"
    rows = [row.split("\t") for row in read_text(listed).splitlines()[1:]] if listed.is_file() else []
    names = {number: str(number) for number in range(1, 151)} | {int(row[0]): row[-1].strip() for row in rows}

    def part(name: str) -> SegmentationSet:
        pairs = folder_pairs(root / "images" / name, root / "annotations" / name)
        return SegmentationSet(str(root / "images" / name), pairs).with_classes(names, ignored=[0])

    return part("training"), part("validation")


def _voc2012(folder: Path) -> Parts:
    root = folder / "VOCdevkit" / "VOC2012"

    def part(name: str) -> SegmentationSet:
        listed = root / "ImageSets" / "Segmentation" / f"{name}.txt"
        images, masks = root / "JPEGImages", root / "SegmentationClass"
        pairs = listed_pairs(listed, "VOCdevkit", lambda line: (images / f"{line}.jpg", masks / f"{line}.png"))
        return SegmentationSet(str(listed), pairs).with_classes(dict(enumerate(_VOC.split())))

    return part("train"), part("val")


_RELEASED: dict[str, Callable[[Path], Parts]] = {"ade20k": _ade20k, "voc2012": _voc2012}
