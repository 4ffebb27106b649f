"""Fits images and maps into a page small enough to send: JPEG, one byte a value, zlib, base64."""

import base64
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from vitreg.report.data_urls import jpeg_url
from vitreg.report.examples import ExampleMaps

# Small enough for any mail server and for a chat.
MAX_BYTES = 5_000_000
# What is not an example is a few hundred bytes a block and model; a tenth of the budget covers it many times over.
MAX_EXAMPLE_BYTES = MAX_BYTES * 9 // 10
# 255 steps over this ratio are 3.6 % apart, so a value decodes to within 1.8 %.
MAX_RATIO = 1e4
PHOTO_STEPS = ((448, 85), (336, 75), (256, 65), (192, 60), (128, 50))


def pack_examples(
    summary: dict,
    models: Sequence[Sequence[ExampleMaps]],
    keep: Iterable[int | None] = (),
    max_bytes: int = MAX_EXAMPLE_BYTES,
) -> dict:
    """Pack the examples into JSON types, in at most `max_bytes` where that is possible.

    Photographs shrink first, then blocks are left out; the last, the summary's `block` and those in `keep` stay.

    Args:
        summary: Its `blocks` hold the `threshold` from which patches are outliers.
        models: For each model its maps, of the same images in the same order.
        keep: Blocks that stay; None stands for no block.
        max_bytes: Of photographs and maps together.

    Returns:
        `blocks` (the indices kept), `queries` (who attends in any model), `models` (who attends in each),
        `norm_range[block]` and `attention_range[query][block]` (`[low, high]`, over all examples and models: code c of
        0..255 means `low * (high / low) ** (c / 255)`), and `examples`: `name`, `photo` (a data URL) and `maps` (base64
        of the zlib-compressed bytes; per kept block and model the norm codes, the attention codes of each of its
        queries, and the outlier bits, most significant first).
    """
    depth = len(summary["blocks"])
    photos: list[str] = []
    blocks = list(range(depth))
    maps = _pack_maps(summary, models, blocks)
    for side, quality in PHOTO_STEPS:
        photos = [jpeg_url(example.photo, side, quality) for example in models[0]]
        if _size(photos + maps["maps"]) <= max_bytes:
            break
    must = {depth - 1, summary["block"], *(k for k in keep if k is not None)}
    while _size(photos + maps["maps"]) > max_bytes and set(blocks) != must:
        # Compressed maps are nearly independent of each other, so bytes are nearly proportional to blocks.
        room = max(0, max_bytes - _size(photos))
        count = min(len(blocks) - 1, int(len(blocks) * room / _size(maps["maps"])))
        blocks = sorted({*must, *np.linspace(0, depth - 1, max(0, count - len(must))).round().astype(int).tolist()})
        maps = _pack_maps(summary, models, blocks)
    coded = zip(models[0], photos, maps.pop("maps"), strict=True)
    return {**maps, "examples": [{"name": e.name, "photo": p, "maps": m} for e, p, m in coded]}


def _pack_maps(summary: dict, models: Sequence[Sequence[ExampleMaps]], blocks: list[int]) -> dict:
    """Quantize the maps of the given blocks, with one range per block (and query) over all examples and models."""
    queries = list(dict.fromkeys(query for examples in models for query in (examples[0].attention if examples else ())))
    having = [[q for q in queries if q in examples[0].attention] for examples in models if examples]
    packed = {"blocks": blocks, "queries": queries, "models": having, "norm_range": [], "attention_range": []}
    if not models[0]:
        return {**packed, "maps": []}
    thresholds = [summary["blocks"][k]["threshold"] for k in blocks]
    limits = np.array([np.inf if t is None else t for t in thresholds])[:, None, None]
    norms = [np.stack([e.norms[blocks] for e in examples]) for examples in models]
    codes, packed["norm_range"] = _quantize(norms)
    layers = [[layer] for layer in codes]
    for query in queries:
        attending = [m for m, names in enumerate(having) if query in names]
        codes, ranges = _quantize([np.stack([e.attention[query][blocks] for e in models[m]]) for m in attending])
        packed["attention_range"].append(ranges)
        for m, layer in zip(attending, codes, strict=True):
            layers[m].append(layer)
    for of_model, values in zip(layers, norms, strict=True):
        # Outliers are bits of their own: codes are rounded, and a patch near the threshold would change sides.
        of_model.append(np.packbits((values >= limits).reshape(*values.shape[:2], -1), axis=-1))
    data = np.concatenate([layer for of_model in layers for layer in of_model], axis=-1)
    return {**packed, "maps": [base64.b64encode(zlib.compress(image.tobytes(), 9)).decode() for image in data]}


def _quantize(maps: list[np.ndarray]) -> tuple[list[np.ndarray], list[list[float]]]:
    """Code every model's `[B, L, h, w]` as bytes on a log scale from the lowest to the highest of each block."""
    values = np.stack(maps).astype(np.float64)
    values = values.reshape(*values.shape[:3], -1)
    high = values.max(axis=(0, 1, 3)).clip(min=1e-12)
    low = values.min(axis=(0, 1, 3)).clip(min=high / MAX_RATIO)
    span = np.log(high / low).clip(min=1e-9)
    levels = np.log(values.clip(low[:, None], high[:, None]) / low[:, None]) / span[:, None]
    ranges = [[float(f"{a:.6g}"), float(f"{b:.6g}")] for a, b in zip(low, high, strict=True)]
    return list((levels * 255).round().astype(np.uint8)), ranges


def _size(texts: list[str]) -> int:
    return sum(map(len, texts))
