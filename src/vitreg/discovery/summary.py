"""What a sweep says: CorLoc of every setting, the best setting judged on images that did not choose it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import numpy as np
from jaxtyping import Bool

from vitreg.discovery.corloc import are_found, bootstrap_interval, half
from vitreg.discovery.protocol import DEFAULT, Protocol
from vitreg.images import BoxedImage, BoxSet, image_size


def describe(protocol: Protocol) -> str:
    """A setting in a few words."""
    parts = [f"{protocol.facet} of block {protocol.block}", "normalized" if protocol.normalize else "raw"]
    if protocol.center:
        parts.append("centered")
    if protocol.bias:
        parts.append(f"bias {protocol.bias:+g}")
    return ", ".join(parts)


def hits(
    boxes: Sequence[Sequence[Sequence[float | int]]], images: Sequence[BoxedImage]
) -> Bool[np.ndarray, "settings n"]:
    """Whether each setting found an object of each image, from boxes by image and setting."""
    return np.stack([are_found(np.array(row), image.boxes) for row, image in zip(boxes, images, strict=True)], axis=1)


def summarize(
    found: Mapping[str, Bool[np.ndarray, "settings n"]],
    protocols: Sequence[Protocol],
    images: Sequence[BoxedImage],
    *,
    data: str,
    boxed: BoxSet,
    swept: Sequence[Protocol],
) -> dict[str, Any]:
    """The evaluation in JSON types, format `vitreg-discovery/1`; docs/discovery.md describes the keys.

    Shares are in percent. Intervals are 95 % bootstrap intervals over images.

    Args:
        found: `hits` by model.
        protocols: the settings of its rows; the default protocol is among them.
        images: its columns.
        data: name of the data set.
        boxed: the data set, for what was left out of it.
        swept: the settings that `mean` and `best` are of.
    """
    whole = [[[0, 0, width, height]] for height, width in (image_size(image.path) for image in images)]
    rows = [protocols.index(protocol) for protocol in swept]
    models = {name: _model(name, share, protocols, rows) for name, share in found.items()}
    first, *others = found
    return {
        "format": "vitreg-discovery/1",
        "version": metadata.version("vitreg"),
        "data": data,
        "num_images": len(images),
        "num_images_without_boxes": len(boxed.images) - len(images),
        "missing_images": [str(path) for path in boxed.missing],
        "whole_image": _share(hits(whole, images)[0]),
        "protocol": asdict(DEFAULT),
        "models": list(models.values()),
        "differences": [
            {"model": name, "minus": first, **_differences(found[name], found[first], protocols, rows)}
            for name in others
        ],
    }


def _model(name: str, found: Bool[np.ndarray, "settings n"], protocols: Sequence[Protocol], rows: list[int]) -> Any:
    summary: dict[str, Any] = {"model": name, "protocol": _share(found[protocols.index(DEFAULT)])}
    if not rows:
        return summary
    chosen = half(found.shape[1])
    swept = found[rows]
    best, choice = int(swept.mean(1).argmax()), int(swept[:, chosen].mean(1).argmax())
    intervals = bootstrap_interval(100 * swept)
    entries = [
        {
            "name": describe(protocols[row]),
            "setting": asdict(protocols[row]),
            "corloc": 100 * float(found[row].mean()),
            "interval": intervals[:, i].tolist(),
        }
        for i, row in enumerate(rows)
    ]
    return {
        **summary,
        "mean": _share(swept.mean(0)),
        "best": entries[best],
        "halves": {
            "name": describe(protocols[rows[choice]]),
            "setting": asdict(protocols[rows[choice]]),
            "on_the_half_that_chose_it": _share(swept[choice, chosen]),
            "on_the_other_half": _share(swept[choice, ~chosen]),
        },
        "settings": entries,
    }


def _differences(
    ours: Bool[np.ndarray, "settings n"],
    theirs: Bool[np.ndarray, "settings n"],
    protocols: Sequence[Protocol],
    rows: list[int],
) -> dict[str, Any]:
    default = protocols.index(DEFAULT)
    difference: dict[str, Any] = {"protocol": _share(ours[default].astype(float) - theirs[default])}
    if rows:
        difference["mean"] = _share(ours[rows].mean(0) - theirs[rows].mean(0))
    return difference


def _share(values: np.ndarray) -> dict[str, Any]:
    values = 100 * np.asarray(values, dtype=np.float64)
    return {"corloc": float(values.mean()), "interval": bootstrap_interval(values).tolist(), "num_images": len(values)}
