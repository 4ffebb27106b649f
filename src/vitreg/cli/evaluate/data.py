"""What probes are asked on, from the command line's words."""

from __future__ import annotations

from pathlib import Path

from vitreg.cli.options import Size, sides
from vitreg.images import (
    image_size,
    open_depth,
    open_segmentation,
    open_split,
)
from vitreg.probes.evaluation import Data, hold_out

_SHORT_SIDE = {"segmentation": 512, "depth": 480}
"""Of pictures, in pixels, where no size is given: that of the usual crops of ADE20k, and NYUv2's own."""


def classification_data(data: str, class_names: Path | None = None) -> Data:
    train, val = open_split(data)
    if val is None:
        train, val = hold_out(train)
    names = None
    if class_names is not None:
        try:
            names = tuple(line.strip() for line in class_names.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {class_names}: {error}; give a text file with a name a line") from error
    return Data("classification", train, val, class_names=names)


def segmentation_data(source: str, size: Size | None, ignore: int | None) -> Data:
    train, val = open_segmentation(source, ignore=ignore)
    return Data("segmentation", train, val, sides(size) if size else _size(train.name(0), _SHORT_SIDE["segmentation"]))


def depth_data(source: str, size: Size | None, scale: float) -> Data:
    train, val = open_depth(source, scale=scale)
    return Data("depth", train, val, sides(size) if size else _size(train.name(0), _SHORT_SIDE["depth"]))


def _size(picture: str, short_side: int) -> tuple[int, int]:
    height, width = image_size(picture)
    scale = short_side / min(height, width)
    return round(height * scale), round(width * scale)
