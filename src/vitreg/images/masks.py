"""Sets of images with a class for every pixel: ADE20k, Pascal VOC 2012, and folder pairs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from vitreg.images.ahead import map_ahead
from vitreg.images.dense import DenseSet, Pair, existing_pairs, folder_pairs, read_list, refuse
from vitreg.images.listed import read_numbered_names, read_text
from vitreg.images.reading import ImageError

IGNORED = 255
"""The class of pixels that do not count."""

_UNCOUNTED = frozenset({"ignore", "unlabeled", "void"})
_MASKS_AHEAD = 32
_PARTS = ("train", "val")
_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)


@dataclass(frozen=True, eq=False)
class PixelClasses:
    """What the numbers in masks mean.

    Attributes:
        names: of the classes.
        table: the class of every number, from 0; `IGNORED` where pixels do not count.
        known: which numbers may be in a mask.
    """

    names: tuple[str, ...]
    table: UInt8[np.ndarray, " 256"]
    known: Bool[np.ndarray, " 256"]

    @classmethod
    def of(cls, names: Mapping[int, str], ignored: Iterable[int] = ()) -> PixelClasses:
        """Classes in the order of their numbers.

        Args:
            names: of the numbers in masks.
            ignored: numbers of pixels that do not count; 255 is always one.
        """
        ignored = {IGNORED, *ignored}
        counted = [number for number in sorted(names) if number not in ignored]
        table, known = np.full(256, IGNORED, np.uint8), np.zeros(256, dtype=bool)
        table[counted] = np.arange(len(counted))
        known[[*counted, *ignored]] = True
        return cls(tuple(names[number] for number in counted), table, known)


class SegmentationSet(DenseSet):
    """Image files with a class for every pixel."""

    kind = "mask"
    modes = frozenset({"1", "L", "P", "I;16", "I"})
    wanted = "one channel of class numbers (L or P)"

    def __init__(self, source: str, pairs: Sequence[Pair], classes: PixelClasses) -> None:
        """As of `DenseSet`, with what the numbers in the masks mean."""
        super().__init__(source, pairs)
        self._meaning = classes

    def with_classes(self, classes: PixelClasses) -> SegmentationSet:
        """The same masks, their numbers meaning something else."""
        other = copy.copy(self)
        other._meaning = classes
        return other

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes that a target holds, from 0."""
        return self._meaning.names

    @property
    def meaning(self) -> tuple[object, ...]:
        """The class of every number."""
        return self._meaning.names, self._meaning.table.tolist(), self._meaning.known.tolist()

    def target(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """The class of every pixel, `IGNORED` (255) where it does not count.

        Raises:
            ImageError: the mask cannot be read, or has a number that is no class; the message names it.
        """
        mask = self._read(index)
        present = np.unique(mask) if mask.dtype.itemsize > 1 else np.flatnonzero(np.bincount(mask.ravel()))
        unknown = [number for number in present.tolist() if not 0 <= number < 256 or not self._meaning.known[number]]
        if unknown:
            classes = np.flatnonzero(self._meaning.table != IGNORED)
            raise ImageError(
                f"{self.target_name(index)} has the class number{'s' * (len(unknown) > 1)} "
                f"{', '.join(map(str, unknown[:5]))}, but the {len(classes)} classes are {classes[0]} to {classes[-1]}"
            )
        return self._meaning.table[mask.astype(np.uint8, copy=False)]


def open_segmentation(
    source: str, *, num_classes: int | None = None, ignore: int | None = None
) -> tuple[SegmentationSet, SegmentationSet]:
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


def _open_folder(folder: Path, num_classes: int | None, ignored: tuple[int, ...]) -> tuple:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with train/ and val/, or {', '.join(_RELEASED)}:PATH")
    names = _read_names(folder)
    if num_classes is not None and not 2 <= num_classes <= IGNORED:
        raise ValueError(f"num_classes is {num_classes}; it must be 2 to {IGNORED}")
    if names and num_classes is not None:
        raise ValueError(f"{folder} names its classes; leave out num_classes")
    if strange := [number for number in ignored if not 0 <= number <= IGNORED]:
        raise ValueError(f"ignore is {strange[0]}; numbers in masks are 0 to {IGNORED}")
    # Numbers as they are, so that the largest of them is one.
    anything = PixelClasses(("",) * 256, np.arange(256, dtype=np.uint8), np.ones(256, dtype=bool))
    train, val = (
        SegmentationSet(str(folder / part), folder_pairs(folder / part / "images", folder / part / "masks"), anything)
        for part in _PARTS
    )
    if not names:
        largest = _largest(train, ignored) if num_classes is None else num_classes - 1
        names = {number: str(number) for number in range(largest + 1)}
    ignored += tuple(number for number, name in names.items() if name.lower() in _UNCOUNTED)
    classes = PixelClasses.of(names, ignored)
    if len(classes.names) < 2:
        raise ValueError(f"{folder} has {len(classes.names)} class; segmentation needs at least 2")
    return train.with_classes(classes), val.with_classes(classes)


def _largest(masks: SegmentationSet, ignored: tuple[int, ...]) -> int:
    """The largest number in masks whose numbers are as in the files, of those that count."""

    def largest(index: int) -> int | str:
        try:
            present = np.unique(masks.target(index))
        except ImageError as error:
            return str(error)
        return int(present[~np.isin(present, (IGNORED, *ignored))].max(initial=0))

    found = list(map_ahead(largest, range(len(masks)), ahead=_MASKS_AHEAD))
    refuse(f"masks of {masks.source} cannot be used", [error for error in found if isinstance(error, str)])
    return max(number for number in found if isinstance(number, int))


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


def _ade20k(folder: Path) -> tuple[SegmentationSet, SegmentationSet]:
    root = folder / "ADEChallengeData2016"
    if not root.is_dir():
        raise ValueError(f"{root} does not exist; give the folder that holds ADEChallengeData2016")
    listed = root / "objectInfo150.txt"
    rows = [row.split("\t") for row in read_text(listed).splitlines()[1:]] if listed.is_file() else []
    names = {number: str(number) for number in range(1, 151)} | {int(row[0]): row[-1].strip() for row in rows}
    classes = PixelClasses.of(names, ignored=[0])
    train, val = (
        SegmentationSet(
            str(root / "images" / part), folder_pairs(root / "images" / part, root / "annotations" / part), classes
        )
        for part in ("training", "validation")
    )
    return train, val


def _voc2012(folder: Path) -> tuple[SegmentationSet, SegmentationSet]:
    root = folder / "VOCdevkit" / "VOC2012"
    classes = PixelClasses.of(dict(enumerate(_VOC.split())))
    parts = []
    for part in _PARTS:
        listed = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        names = map(str.strip, read_list(listed, "VOCdevkit"))
        pairs = [
            (str(root / "JPEGImages" / f"{name}.jpg"), str(root / "SegmentationClass" / f"{name}.png"))
            for name in names
        ]
        parts.append(SegmentationSet(str(listed), existing_pairs(listed, pairs), classes))
    train, val = parts
    return train, val


_RELEASED: dict[str, Callable[[Path], tuple[SegmentationSet, SegmentationSet]]] = {
    "ade20k": _ade20k,
    "voc2012": _voc2012,
}
