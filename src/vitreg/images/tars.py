"""Images in tar archives, as WebDataset stores them."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from vitreg.common.cache import cached
from vitreg.images.labeled import ImageSet, source_of
from vitreg.images.labels import classes_of, read_class_names
from vitreg.images.packed import PackedStrings
from vitreg.images.reading import ImageError, decode_image
from vitreg.images.tar_index import tar_members

# Where a sample has several, the first of these is its image.
_IMAGES = ("jpg", "jpeg", "png", "webp")
# As WebDataset splits names: the key ends at the first dot of the file's own name.
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")

_LARGEST = 2**63 - 1
_IMAGE, _CAPTION = slice(1, 3), slice(3, 5)

_Member = tuple[int, int]


class TarImages(ImageSet):
    """Images of uncompressed tar archives, in the order of the archives and of the samples in them.

    Files whose names are the same up to the first dot are one sample: the image (jpg, jpeg, png or webp), and maybe
    its label (`cls`, a number, or `label` in `json`) and its caption (`txt`, or `caption` in `json`). The first sample
    decides which of these are used. Class names are taken from a `classes.csv` (`label,name`) beside the archives.

    Archives are scanned once for where everything is, which is kept in the cache (`VITREG_CACHE`) while their sizes and
    times stay the same; without a cache they are scanned each time. An image is then one read.
    """

    def __init__(self, archives: Sequence[Path]) -> None:
        """Scans the archives, or reads what an earlier scan found.

        Raises:
            ValueError: an archive is compressed, damaged or holds no image, or the label of an image is missing.
        """
        self.source = source_of(archives)
        self._archives = tuple(archives)
        index = cached(archives, ".tars.npz", partial(_write_index, archives), _read_index) or _scan(archives)
        self._places, self._caption_in = index["places"], str(index["caption_in"])
        self._names = PackedStrings(index["names"].tobytes().decode(errors="surrogateescape").split("\0"))
        labels = array("q", index["labels"].tobytes())
        self.classes = classes_of(labels, read_class_names(archives[0].parent), self.source)
        self.labels = labels if self.classes else None

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> Image.Image:
        return decode_image(self._read(index, _IMAGE), self.name(index))

    def name(self, index: int) -> str:
        return f"{self.file(index)}, {self._names[index]}"

    def id(self, index: int) -> str:
        return self._names[index]

    def file(self, index: int) -> str:
        return str(self._archives[self._places[index, 0]])

    def captions(self, index: int) -> tuple[str, ...]:
        data = self._read(index, _CAPTION)
        if self._caption_in == "json" and data:
            caption = str(_fields(data, self.name(index)).get("caption", "")).strip()
        else:
            caption = data.decode(errors="replace").strip()
        return (caption,) if caption else ()

    def _read(self, index: int, columns: slice) -> bytes:
        # A file that is open in several processes shares its position; opening it for each read costs little beside
        # decoding, and no number of archives runs out of file descriptors.
        try:
            with open(self.file(index), "rb", buffering=0) as file:
                return _read(file, *self._places[index, columns].tolist())
        except OSError as error:
            raise ImageError(f"{self.name(index)} cannot be read ({error.strerror}); check the archive") from None


def _write_index(archives: Sequence[Path], path: Path) -> None:
    np.savez(path, **_scan(archives))  # pyright: ignore[reportArgumentType]


def _read_index(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def _scan(archives: Sequence[Path]) -> dict[str, np.ndarray]:
    """Of all images the `names`, `labels` and `places`: number of the archive, offset and size of image and caption."""
    names: list[str] = []
    places, labels = array("q"), array("q")
    label_in = caption_in = ""
    for number, archive in enumerate(archives):
        before, samples = len(names), _samples(archive)
        with archive.open("rb") as file:
            for key, members in samples.items():
                image = next((extension for extension in _IMAGES if extension in members), None)
                if image is None:
                    continue
                where = f"{archive}, {key}"
                if not names:
                    label_in, caption_in = _extensions(file, members, where)
                if label_in or "cls" in members:
                    labels.append(_label(file, members, label_in, where))
                names.append(f"{key}.{image}")
                places.extend((number, *members[image], *members.get(caption_in, (0, 0))))
        if len(names) == before:
            raise ValueError(f"{archive} holds no image; expected members named KEY.{', KEY.'.join(_IMAGES)}")
    return {
        "names": np.frombuffer("\0".join(names).encode(errors="surrogateescape"), np.uint8),
        "labels": np.array(labels, np.int64),
        "places": np.array(places, np.int64).reshape(-1, 5),
        "caption_in": np.array(caption_in),
    }


def _samples(archive: Path) -> dict[str, dict[str, _Member]]:
    """Where the files of each sample are, by key and extension."""
    samples: dict[str, dict[str, _Member]] = {}
    for name, offset, size in tar_members(archive):
        if not (match := _KEY.fullmatch(name)):
            continue
        members = samples.setdefault(match[1], {})
        if (extension := match[2].lower()) in members:
            raise ValueError(f"{archive} holds {name} twice; give every sample a key of its own")
        members[extension] = offset, size
    return samples


def _extensions(file: BinaryIO, members: dict[str, _Member], where: str) -> tuple[str, str]:
    """The extensions of the files that hold labels and captions; "" for neither."""
    fields = _fields(_read(file, *members["json"]), where) if "json" in members else {}
    label = "cls" if "cls" in members else "json" if "label" in fields else ""
    caption = "txt" if "txt" in members else "json" if "caption" in fields else ""
    return label, caption


def _label(file: BinaryIO, members: dict[str, _Member], extension: str, where: str) -> int:
    if extension not in members:
        raise ValueError(f"{where} and the first image do not both have a label in a .cls; write one for each")
    data = _read(file, *members[extension])
    value: Any = data.decode(errors="replace") if extension == "cls" else _fields(data, where).get("label")
    try:
        label = int(value)
        if (isinstance(value, float) and label != value) or abs(label) > _LARGEST:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}.{extension} has no class number but {value!r:.30}; write one") from None
    return label


def _fields(data: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} has malformed JSON ({error}); write it again") from None
    return fields if isinstance(fields, dict) else {}


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
