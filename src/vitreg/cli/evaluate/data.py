"""What probes are asked on, from the command line's words."""

from __future__ import annotations

from pathlib import Path

from vitreg.cli.options import Size, sides
from vitreg.images import open_depth, open_segmentation, open_split
from vitreg.probes.choosing import hold_out
from vitreg.probes.evaluation import EvalData


def classification_data(data: str, class_names: Path | None = None) -> EvalData:
    train, val = open_split(data)
    if val is None:
        train, val = hold_out(train)
    names = None
    if class_names is not None:
        try:
            names = tuple(line.strip() for line in class_names.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {class_names}: {error}; give a text file with a name a line") from error
    return EvalData("classification", train, val, class_names=names)


def segmentation_data(source: str, ignore: int | None, size: Size | None = None) -> EvalData:
    return EvalData("segmentation", *open_segmentation(source, ignore=ignore), sides(size) if size else None)


def depth_data(source: str, scale: float, size: Size | None = None) -> EvalData:
    return EvalData("depth", *open_depth(source, scale=scale), sides(size) if size else None)
