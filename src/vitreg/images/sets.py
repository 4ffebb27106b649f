"""Recognizes how a set of images is stored, and which part of it is held out."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path

from vitreg.images.files import ImageFiles, open_captions, open_folder
from vitreg.images.labeled import ImageSet, source_of
from vitreg.images.labels import check_same_classes
from vitreg.images.parquet import ParquetImages
from vitreg.images.reading import EXTENSIONS, find_images
from vitreg.images.tars import TarImages

_HELD_OUT = ("val", "validation", "test")
_SHARDS: dict[str, Callable[[list[Path]], ImageSet]] = {".parquet": ParquetImages, ".tar": TarImages}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_image_set(path: str | Path) -> ImageSet:
    """The images at a path, whichever of these it is.

    - A folder of images, or of folders for the classes, as ImageNet's.
    - `captions.csv` (rows of `image,caption`), or the folder that holds it.
    - Parquet with a column `image`: a file, a folder of them, or a pattern like `train-*.parquet`.
    - WebDataset: a `.tar`, a folder of them, or a pattern like `shard-*.tar` or `shard-{000000..000099}.tar`.

    Raises:
        ValueError: there is nothing of the kind, it is malformed, or it is a folder with a part for training and one
            that is held out, which `open_split` opens.
    """
    path = Path(path).expanduser()
    parts = _parts(path)
    if len(parts) > 1:
        raise ValueError(f"{path} holds the parts {' and '.join(parts)}; give one of them, such as {parts['train'][0]}")
    return _open(parts["train"] if parts else _files(path))


def shard_files(path: str | Path) -> list[Path]:
    """The tars or Parquet files at a path, none of which is read; nothing where images are files of their own.

    Raises:
        ValueError: as `open_image_set`, where a folder has a part that is held out.
    """
    path = Path(path).expanduser()
    if len(parts := _parts(path)) > 1:
        raise ValueError(f"{path} holds the parts {' and '.join(parts)}; give one of them, such as {parts['train'][0]}")
    files = parts["train"] if parts else _files(path)
    if len(files) == 1 and files[0].is_dir():
        captions = (files[0] / "captions.csv").is_file()
        return next((found for suffix in _SHARDS if not captions and (found := _shards(files[0], suffix))), [])
    kinds = {_kind(file) for file in files}
    return files if len(kinds) == 1 and kinds <= {*_SHARDS} else []


def open_split(path: str | Path) -> tuple[ImageSet, ImageSet | None]:
    """The images to train on, and those that are held out where the folder has both.

    These are its folders `train` and `val` (or `validation`, or `test`), or its Parquet files or tars that have these
    words in their names. Otherwise everything is for training.

    Raises:
        ValueError: as `open_image_set`, or the two parts have different classes.
    """
    path = Path(path).expanduser()
    parts = _parts(path)
    if len(parts) < 2:
        return open_image_set(path), None
    train, held_out = (_open(files) for files in list(parts.values())[:2])
    check_classes(train, held_out)
    return train, held_out


def _parts(folder: Path) -> dict[str, list[Path]]:
    """What is for training, and after it what is held out, by name; nothing where a folder is no such division."""
    if not folder.is_dir():
        return {}
    names = ("train", *_HELD_OUT)
    folders = {name: [folder / name] for name in names if (folder / name).is_dir()}
    # A class may be called train, too: then it has other neighbors.
    if "train" in folders and (len(folders) > 1 or sum(entry.is_dir() for entry in folder.iterdir()) == 1):
        return folders
    for suffix in _SHARDS:
        files = {name: [f for f in _shards(folder, suffix) if name in _words(f)] for name in names}
        found = {name: shards for name, shards in files.items() if shards}
        if "train" in found and len(found) > 1:
            return found
    return {}


def _words(file: Path) -> list[str]:
    return re.split("[^a-z]+", file.stem.lower())


def _shards(folder: Path, suffix: str) -> list[Path]:
    return sorted(file for file in folder.glob(f"*{suffix}") if not file.name.startswith("."))


def _files(path: Path) -> list[Path]:
    """What a path stands for: itself, or the files that a pattern matches."""
    if path.exists():
        return [path]
    if _RANGE.search(str(path)):
        files = [Path(name) for name in _numbered(str(path))]
        if missing := [str(file) for file in files if not file.is_file()]:
            more = ", ..." if len(missing) > 3 else ""
            raise ValueError(f"{len(missing)} files of {path} do not exist: {', '.join(missing[:3])}{more}")
        return files
    return sorted(map(Path, glob.glob(str(path), recursive=True))) or [path]


def _numbered(pattern: str) -> list[str]:
    """`a-{08..11}.tar` as a-08.tar, a-09.tar, a-10.tar, a-11.tar."""
    if not (match := _RANGE.search(pattern)):
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    width = max(map(len, match.groups())) if any(number.startswith("0") for number in match.groups()) else 0
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [name for number in numbers for name in _numbered(f"{before}{number:0{width}}{after}")]


def _open(files: list[Path]) -> ImageSet:
    first, kinds = files[0], {_kind(file) for file in files}
    if kinds == {"folder"} and len(files) == 1:
        if (first / "captions.csv").is_file():
            return open_captions(first / "captions.csv")
        for suffix, open_shards in _SHARDS.items():
            if shards := _shards(first, suffix):
                return open_shards(shards)
        return open_folder(first)
    if kinds == {".csv"} and len(files) == 1:
        return open_captions(first)
    if kinds <= {"folder", "image", "missing"}:
        return ImageFiles(source_of(files), map(str, find_images(files)))
    if len(kinds) == 1 and (open_shards := _SHARDS.get(kinds.pop())):
        return open_shards(files)
    raise ValueError(f"no set of images in {source_of(files)}; give a folder, one CSV file, Parquet files or tars")


def _kind(file: Path) -> str:
    if not file.exists():
        return "missing"
    if file.is_dir():
        return "folder"
    # Compressed tars, too: opening them says what to do.
    if ".tar" in file.suffixes or file.suffix == ".tgz":
        return ".tar"
    return "image" if file.suffix[1:].lower() in EXTENSIONS else file.suffix.lower()


def check_classes(train: ImageSet, held_out: ImageSet) -> None:
    """Refuses labels that mean different classes.

    Raises:
        ValueError: the two sets have different classes.
    """
    check_same_classes(train.classes, held_out.classes, train.source, held_out.source)
