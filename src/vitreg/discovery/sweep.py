"""Many settings on many images: features once per model, boxes kept on disk, so that nothing is computed twice."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vitreg.checkpoints.state import digest
from vitreg.common.disk import replace_text, writing
from vitreg.common.progress import OnProgress
from vitreg.discovery.discover import check_size, find_regions, native_stream
from vitreg.discovery.features import patch_features
from vitreg.discovery.protocol import DEFAULT, Axis, Protocol
from vitreg.images import BoxedImage, image_size
from vitreg.images.files import ImageFiles
from vitreg.model import VisionTransformer

VALUES: dict[Axis, tuple[Any, ...]] = {
    "blocks": (-4, -3, -2, -1),
    "facets": ("queries", "keys", "values"),
    "normalize": (False, True),
    "center": (False, True),
    "bias": (-0.4, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1),
}
"""Of every axis what a sweep goes over."""

Box = list[int]


def settings(axes: Sequence[str]) -> list[Protocol]:
    """Every combination of the values of these axes; the other axes as in the default protocol, but without a bias.

    The last four blocks, as Jiang et al. (arXiv 2506.08010) sweep them; queries, keys and values; raw and normalized;
    centered and not; and biases from -0.4 to 0.1. A bias goes with normalized features only: on raw ones it would mean
    something else in every model.

    Raises:
        ValueError: an axis is unknown.
    """
    if unknown := [axis for axis in axes if axis not in VALUES]:
        raise ValueError(f"sweep {unknown[0]!r} is unknown; choose from {', '.join(VALUES)}")
    if not axes:
        return []
    fixed: tuple[Any, ...] = (DEFAULT.block, DEFAULT.facet, DEFAULT.normalize, DEFAULT.center, 0.0)
    chosen = (values if axis in axes else (one,) for (axis, values), one in zip(VALUES.items(), fixed, strict=True))
    every = [Protocol(facet, block, *rest) for block, facet, *rest in itertools.product(*chosen)]
    return [protocol for protocol in every if protocol.normalize or not protocol.bias]


def find_boxes(
    vit: VisionTransformer,
    name: str,
    images: Sequence[BoxedImage],
    protocols: Sequence[Protocol],
    record: Path,
    *,
    batch_size: int = 8,
    on_progress: OnProgress | None = None,
) -> list[list[Box]]:
    """LOST's box for every image and setting.

    Boxes are written to `record` (JSON lines: what was run, then an image a line) as soon as they are known. A file
    that an interrupted run left behind is read first, and what it holds is not computed again.

    Args:
        vit: the model.
        name: what to call it.
        images: distinct images.
        protocols: the settings.
        record: the file, made or continued.
        batch_size: images at a time.
        on_progress: called with the number of images done and their total.

    Returns:
        Boxes, by image and setting.

    Raises:
        ValueError: an image is too small or unreadable, the model lacks a block, or `record` is of another run.
    """
    for image in images:
        check_size(image_size(image.path), vit.config.patch_size, str(image.path))
    header = {
        "format": "vitreg-sweep/1",
        "model": name,
        "weights": digest(vit.config, vit.state_dict()),
        "images": [str(image.path) for image in images],
        "files": ImageFiles(name, [str(image.path) for image in images]).digest(),
        "settings": [asdict(protocol) for protocol in protocols],
    }
    boxes = _read(record, header)
    numbers = {image.path: number for number, image in enumerate(images)}
    if on_progress is not None:
        on_progress(len(boxes), len(images))
    stream = native_stream(
        vit, [image.path for image in images if numbers[image.path] not in boxes], batch_size=batch_size, strict=True
    )
    for batch in stream:
        found = _boxes(vit, batch.images, batch.sizes, protocols)
        rows = {numbers[path]: row for path, row in zip(batch.paths, found, strict=True)}
        with writing(record.parent), record.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps({"image": number, "boxes": row}) + "\n" for number, row in rows.items()))
        boxes |= rows
        if on_progress is not None:
            on_progress(len(boxes), len(images))
    return [boxes[number] for number in range(len(images))]


def _boxes(
    vit: VisionTransformer, images: torch.Tensor, sizes: Sequence[tuple[int, int]], protocols: Sequence[Protocol]
) -> list[list[Box]]:
    """Boxes of every image of a batch, for every setting, from one forward pass."""
    patch = vit.config.patch_size
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    blocks = list(dict.fromkeys(protocol.block for protocol in protocols))
    features = patch_features(vit, images, [protocol.facet for protocol in protocols], blocks)
    return [
        [list(find_regions(features[p.facet, p.block][i], grid, p)[0].box(patch, *size)) for p in protocols]
        for i, size in enumerate(sizes)
    ]


def _read(record: Path, header: dict[str, Any]) -> dict[int, list[Box]]:
    """The images that an earlier run finished; the file begins with the header afterwards and ends with a line."""
    lines = record.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if record.exists() else []
    # A process that was killed may have left half a line.
    whole = [line for line in lines if line.endswith("\n")]
    if not whole:
        replace_text(record, json.dumps(header) + "\n")
        return {}
    try:
        earlier = dict(json.loads(whole[0]))
        done = {entry["image"]: entry["boxes"] for entry in map(json.loads, whole[1:])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{record} is no record of a sweep; delete it or choose another folder") from None
    if differing := [key for key in header if earlier.get(key) != header[key]]:
        raise ValueError(
            f"{record} is of another sweep (its {differing[0]} differ); delete it or choose another folder"
        )
    if whole != lines:
        replace_text(record, "".join(whole))
    return done
