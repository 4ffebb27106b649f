"""What a sweep says: CorLoc of every setting, the best setting judged on images that did not choose it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

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
    default = protocols.index(DEFAULT)
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
        "models": [
            {"model": name, **_measured(hit, default, rows), **(_sweep(hit[rows], swept) if rows else {})}
            for name, hit in found.items()
        ],
        "differences": [
            {"model": name, "minus": first, **_measured(found[name].astype(float) - found[first], default, rows)}
            for name in others
        ],
    }


def _measured(values: Shaped[np.ndarray, "settings n"], default: int, rows: list[int]) -> dict[str, Any]:
    """In the protocol, and in the mean of the settings of a sweep."""
    return {"protocol": _share(values[default])} | ({"mean": _share(values[rows].mean(0))} if rows else {})


def _sweep(found: Bool[np.ndarray, "rows n"], protocols: Sequence[Protocol]) -> dict[str, Any]:
    """Every setting, the best one, and the best one on one half of the images judged on the other."""
    chosen = half(found.shape[1])
    best, choice = int(found.mean(1).argmax()), int(found[:, chosen].mean(1).argmax())
    named = [{"name": describe(protocol), "setting": asdict(protocol)} for protocol in protocols]
    entries = [
        {**name, "corloc": 100 * float(hit.mean()), "interval": interval.tolist()}
        for name, hit, interval in zip(named, found, bootstrap_interval(100 * found).T, strict=True)
    ]
    halves = {
        "on_the_half_that_chose_it": _share(found[choice, chosen]),
        "on_the_other_half": _share(found[choice, ~chosen]),
    }
    return {"best": entries[best], "halves": named[choice] | halves, "settings": entries}


def _share(values: np.ndarray) -> dict[str, Any]:
    values = 100 * np.asarray(values, dtype=np.float64)
    return {"corloc": float(values.mean()), "interval": bootstrap_interval(values).tolist(), "num_images": len(values)}
