"""Fits pictures and maps into a page small enough to send: JPEG, one byte a value, zlib, base64."""

import base64
import io
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vitreg.report.examples import ExampleMaps

# Small enough for any mail server and for a chat.
MAX_BYTES = 5_000_000
# 255 steps over this ratio are 3.6 % apart, so a value decodes to within 1.8 %.
MAX_RATIO = 1e4
PHOTO_STEPS = ((448, 85), (336, 75), (256, 65))


def pack_examples(summary: dict, examples: Sequence[ExampleMaps], max_bytes: int = MAX_BYTES) -> dict:
    """Pack the examples into JSON types, in at most `max_bytes` where that is possible.

    Photographs shrink first, then blocks are left out; the reported, the onset and the last always stay.

    Returns:
        `blocks` (the indices kept), `queries` (who attends), `norm_range[block]` and
        `attention_range[query][block]` (`[low, high]`, over all examples: code c of 0..255 means
        `low * (high / low) ** (c / 255)`), and `examples`: `name`, `photo` (a data URL) and `maps` (base64 of
        the zlib-compressed bytes; per kept block the norm codes, the attention codes of each query, and the
        outlier bits, most significant first).
    """
    depth = len(summary["blocks"])
    photos: list[str] = []
    blocks = list(range(depth))
    maps = _pack_maps(summary, examples, blocks)
    for side, quality in PHOTO_STEPS:
        photos = [_photo_url(example.photo, side, quality) for example in examples]
        if _size(photos + maps["maps"]) <= max_bytes:
            break
    must = {depth - 1, *(k for k in (summary["block"], summary["onset_block"]) if k is not None)}
    while _size(photos + maps["maps"]) > max_bytes and set(blocks) != must:
        # Compressed maps are nearly independent of each other, so bytes are nearly proportional to blocks.
        room = max(0, max_bytes - _size(photos))
        count = min(len(blocks) - 1, int(len(blocks) * room / _size(maps["maps"])))
        blocks = sorted({*must, *np.linspace(0, depth - 1, max(0, count - len(must))).round().astype(int).tolist()})
        maps = _pack_maps(summary, examples, blocks)
    coded = zip(examples, photos, maps.pop("maps"), strict=True)
    return {**maps, "examples": [{"name": e.name, "photo": p, "maps": m} for e, p, m in coded]}


def _pack_maps(summary: dict, examples: Sequence[ExampleMaps], blocks: list[int]) -> dict:
    """Quantise the maps of the given blocks, with one range per block (and query) over all examples."""
    queries = list(examples[0].attention) if examples else []
    thresholds = [summary["blocks"][k]["threshold"] for k in blocks]
    limits = np.array([np.inf if t is None else t for t in thresholds])[:, None, None]
    packed = {"blocks": blocks, "queries": queries, "norm_range": [], "attention_range": [], "maps": []}
    if not examples:
        return packed
    norms = np.stack([e.norms[blocks] for e in examples])
    norm_codes, packed["norm_range"] = _quantise(norms)
    # Outliers are bits of their own: codes are rounded, and a patch near the threshold would change sides.
    outliers = np.packbits((norms >= limits).reshape(*norms.shape[:2], -1), axis=-1)
    parts = [norm_codes]
    for query in queries:
        codes, ranges = _quantise(np.stack([e.attention[query][blocks] for e in examples]))
        parts.append(codes)
        packed["attention_range"].append(ranges)
    data = np.concatenate([*parts, outliers], axis=-1)
    packed["maps"] = [base64.b64encode(zlib.compress(image.tobytes(), 9)).decode() for image in data]
    return packed


def _quantise(values: np.ndarray) -> tuple[np.ndarray, list[list[float]]]:
    """Code `values [B, L, h, w]` as bytes on a log scale from the lowest to the highest of each block."""
    values = values.reshape(*values.shape[:2], -1).astype(np.float64)
    high = values.max(axis=(0, 2)).clip(min=1e-12)
    low = values.min(axis=(0, 2)).clip(min=high / MAX_RATIO)
    span = np.log(high / low).clip(min=1e-9)
    levels = np.log(values.clip(low[:, None], high[:, None]) / low[:, None]) / span[:, None]
    ranges = [[float(f"{a:.6g}"), float(f"{b:.6g}")] for a, b in zip(low, high, strict=True)]
    return (levels * 255).round().astype(np.uint8), ranges


def _photo_url(photo: np.ndarray, side: int, quality: int) -> str:
    image = Image.fromarray(photo)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _size(texts: list[str]) -> int:
    return sum(map(len, texts))
