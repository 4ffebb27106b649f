"""Sets of images with boxes around their objects: Pascal VOC, COCO20k, YOLO folders, and plain JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float64

from vitreg.images.listed import read_list, read_text
from vitreg.images.reading import find_images, image_size

COCO20K_LISTS = ("coco_20k_filenames.txt", "coco20k.txt")

_VOC_SIDES = (("xmin", 1), ("ymin", 1), ("xmax", 0), ("ymax", 0))


@dataclass(frozen=True, eq=False)
class BoxedImage:
    """An image and the boxes of its objects: x0, y0, x1, y1 in pixels of the upright image, none or more."""

    path: Path
    boxes: Float64[np.ndarray, "n 4"]


@dataclass(frozen=True, eq=False)
class BoxSet:
    """Images with boxes, in the data set's order.

    Attributes:
        images: images, those without any object included.
        missing: images that the annotations name and that do not exist.
    """

    images: tuple[BoxedImage, ...]
    missing: tuple[Path, ...] = ()


def open_box_set(source: str) -> BoxSet:
    """The data set that `KIND:PATH` names.

    - `voc2007:PATH`, `voc2012:PATH`: Pascal VOC's trainval, PATH being the folder that holds `VOCdevkit`. As in LOST's
      protocol (Simeoni et al. 2021; `valeoai/LOST`, `datasets.py`), objects marked difficult or truncated count like
      any other, and pixel numbers from 1 become coordinates from 0.
    - `coco20k:PATH`: PATH holds `annotations/instances_train2014.json`, the images in `train2014/`, and LOST's
      list `coco_20k_filenames.txt` (a file name or an image id a line). Crowd regions are left out and corners rounded
      to whole pixels, as there.
    - `yolo:PATH`: PATH holds `images/` and `labels/`; a row is `class cx cy w h`, relative to the image. An image
      without a label file has no objects.
    - `json:FILE`: a list of `{"image": "a.jpg", "boxes": [[x0, y0, x1, y1], ...]}`, paths relative to the file.

    Raises:
        ValueError: the kind is unknown, an annotation file is missing or malformed, or there is not one image.
    """
    kind, colon, path = source.partition(":")
    if not colon or kind not in _READERS:
        kinds = ", ".join(f"{kind}:PATH" for kind in _READERS)
        raise ValueError(f"data {source!r} is unknown; give one of {kinds}")
    images = _READERS[kind](Path(path).expanduser())
    if len({image.path for image in images}) < len(images):
        raise ValueError(f"{source} names an image twice; give each image once, with all of its boxes")
    present = tuple(image for image in images if image.path.is_file())
    missing = tuple(image.path for image in images if not image.path.is_file())
    if not present:
        raise ValueError(f"{source} has no images{f'; {missing[0]} does not exist' if missing else ''}")
    return BoxSet(present, missing)


def _voc(year: str, folder: Path) -> list[BoxedImage]:
    root = folder / "VOCdevkit" / f"VOC{year}"
    images = []
    for name in read_list(root / "ImageSets" / "Main" / "trainval.txt", "VOCdevkit"):
        annotation = root / "Annotations" / f"{name}.xml"
        with _reading(annotation):
            # Not `iter`: parts of objects have boxes too. Some of VOC2012 have fractions, which the reference's int()
            # would refuse.
            corners = [
                [float(entry.findtext(f"bndbox/{side}", "")) - first for side, first in _VOC_SIDES]
                for entry in ElementTree.parse(annotation).getroot().findall("object")
            ]
            images.append(BoxedImage(root / "JPEGImages" / f"{name}.jpg", _boxes(corners)))
    return images


def _coco20k(folder: Path) -> list[BoxedImage]:
    annotations = folder / "annotations" / "instances_train2014.json"
    with _reading(annotations):
        found = json.loads(read_text(annotations))
        names = {entry["id"]: entry["file_name"] for entry in found["images"]}
        corners: dict[int, list[list[int]]] = {}
        for entry in found["annotations"]:
            x, y, width, height = entry["bbox"]
            if not entry.get("iscrowd"):
                corners.setdefault(entry["image_id"], []).append(
                    [round(side) for side in (x, y, x + width, y + height)]
                )
    chosen = next((folder / name for name in COCO20K_LISTS if (folder / name).is_file()), None)
    if chosen is None:
        raise ValueError(f"{folder / COCO20K_LISTS[0]} does not exist; it comes with the code of LOST (valeoai/LOST)")
    images = []
    for line in read_text(chosen).split():
        number = Path(line).stem.rpartition("_")[2]
        if not number.isdecimal() or int(number) not in names:
            raise ValueError(f"{chosen} lists {line!r}, which {annotations.name} does not know")
        with _reading(annotations):
            boxes = _boxes(corners.get(int(number), []))
        images.append(BoxedImage(folder / "train2014" / names[int(number)], boxes))
    return images


def _yolo(folder: Path) -> list[BoxedImage]:
    photos, labels = folder / "images", folder / "labels"
    for part in (photos, labels):
        if not part.is_dir():
            raise ValueError(f"{part} is not a folder; a YOLO folder holds images/ and labels/")
    unused = {path for path in labels.rglob("*.txt") if path.name != "classes.txt"}
    images = []
    for path in find_images(photos):
        label = labels / path.relative_to(photos).with_suffix(".txt")
        rows = [row for row in read_text(label).splitlines() if row.strip()] if label in unused else []
        unused.discard(label)
        images.append(BoxedImage(path, _yolo_boxes(rows, path, label)))
    # Labels of images that are not there: `open_box_set` sorts them out.
    for label in sorted(unused):
        images.append(BoxedImage(photos / label.relative_to(labels).with_suffix(".jpg"), _boxes([])))
    return images


def _yolo_boxes(rows: list[str], path: Path, label: Path) -> Float64[np.ndarray, "n 4"]:
    height, width = image_size(path) if rows else (0, 0)
    corners = []
    with _reading(label):
        for row in rows:
            try:
                x, y, w, h = (float(value) for value in row.split()[1:])
            except ValueError:
                raise ValueError(f"row {row!r} is not `class cx cy w h`") from None
            corners.append([(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height])
        return _boxes(corners)


def _plain_json(path: Path) -> list[BoxedImage]:
    with _reading(path):
        entries = json.loads(read_text(path))
        if not isinstance(entries, list):
            raise ValueError('expected a list of {"image": ..., "boxes": [[x0, y0, x1, y1], ...]}')
    images = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise ValueError(f'{path} is malformed: entry {number} has no "image"')
        with _reading(f"{path}, entry {number}"):
            images.append(BoxedImage(path.parent / entry["image"], _boxes(entry.get("boxes") or [])))
    return images


def _boxes(corners: Any) -> Float64[np.ndarray, "n 4"]:
    try:
        boxes = np.array(corners, dtype=np.float64) if len(corners) else np.empty((0, 4))
    except (TypeError, ValueError):
        boxes = np.empty(0)
    if boxes.shape[1:] != (4,) or not np.isfinite(boxes).all():
        raise ValueError("boxes must be rows of four finite numbers")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError("a box ends before it begins")
    return boxes


@contextlib.contextmanager
def _reading(what: Path | str) -> Iterator[None]:
    """Says of all that can be wrong with an annotation where it is."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{what} does not exist") from None
    except (OSError, SyntaxError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        told = error if type(error) is ValueError else f"{type(error).__name__} {error}"
        raise ValueError(f"{what} is malformed: {told}") from error


_READERS: dict[str, Callable[[Path], list[BoxedImage]]] = {
    "voc2007": partial(_voc, "2007"),
    "voc2012": partial(_voc, "2012"),
    "coco20k": _coco20k,
    "yolo": _yolo,
    "json": _plain_json,
}
