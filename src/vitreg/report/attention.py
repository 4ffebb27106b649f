"""Attention maps of one image, to look at and as files."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from vitreg.common.disk import replacing
from vitreg.common.words import counted, safe_name
from vitreg.report.colors import attention_scale
from vitreg.report.sheet import GAP, MARGIN, TITLE, Sheet, outline


def overlay(
    photo: UInt8[np.ndarray, "H W 3"], attention: Float[np.ndarray, "h w"], *, highest: float | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Lay an attention map over a photograph, patches as sharp rectangles.

    The color goes with the square root of the attention: a few patches often hold most of it, and on a
    linear scale everything else would be black.

    Args:
        photo: The photograph; the h x w patches tile it.
        attention: What each patch receives, not negative.
        highest: The attention of the brightest color, to compare several maps; by default the
            map's own maximum.
    """
    import matplotlib

    highest = float(attention.max()) if highest is None else highest
    rows, columns = (np.arange(n) * m // n for n, m in zip(photo.shape[:2], attention.shape, strict=True))
    heat = np.sqrt(np.clip(attention / (highest or 1.0), 0, 1))[rows[:, None], columns]
    color = matplotlib.colormaps["magma"](heat)[..., :3]
    # Grey, since the photograph's own colors would be read as heat, and less of it where there is more to
    # show, so that the brightest patches have the color that the color bar gives them.
    grey = (photo @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    strength = 0.45 + 0.5 * heat[..., None]
    return (255 * ((1 - strength) * grey + strength * color)).round().astype(np.uint8)


def attention_figure(
    photo: UInt8[np.ndarray, "H W 3"],
    attention: Float[np.ndarray, "heads h w"],
    *,
    title: str,
    path: Path,
    patch: tuple[int, int] | None = None,
) -> Path:
    """Write a PNG of a photograph, its attention averaged over heads, and the attention of every head.

    All maps share one color scale, the share of a query's attention that a patch receives.

    Args:
        photo: what the model saw.
        attention: share of the query's attention that each patch receives, per head.
        title: the line of text.
        path: the file to write; its folder is made.
        patch: (row, column) of the query where it is a patch, to be marked.
    """
    heads, highest = len(attention), float(attention.max())
    aspect = photo.shape[0] / photo.shape[1]
    # Two large images beside the heads: next to each other over two rows of heads, or stacked over four.
    stacked = aspect < 0.5 or (heads > 8 and aspect < 2)
    rows = 4 if stacked else 2
    columns = math.ceil(heads / rows)
    # A head's image has the same area whatever its shape, except where a side would be too long or short to look at.
    label, small = 0.24, min(max(1.25 / math.sqrt(aspect), 0.6), 2.5)
    step_x, step_y = small + GAP, small * aspect + label
    # A large image is as tall as two small ones with the label between them.
    tall = small * aspect + step_y
    large = tall / aspect
    left = MARGIN + (large + GAP) * (1 if stacked else 2)
    top = 0.35
    sheet = Sheet(left + columns * step_x + 0.85, top + rows * step_y + MARGIN)
    sheet.text(title, MARGIN, 0.1, **TITLE)
    mean = overlay(photo, attention.mean(axis=0), highest=highest)
    second = (MARGIN, top + label + 2 * step_y) if stacked else (MARGIN + large + GAP, top + label)
    drawn = [
        sheet.image(photo, MARGIN, top + label, large, tall, "photograph"),
        sheet.image(mean, *second, large, tall, f"mean of {counted(heads, 'head')}"),
    ]
    for i, head in enumerate(attention):
        x, y = left + i % columns * step_x, top + label + i // columns * step_y
        drawn.append(sheet.image(overlay(photo, head, highest=highest), x, y, small, small * aspect, f"head {i}"))
    if patch is not None:
        for axes in drawn:
            for color, line in (("black", 2.6), ("white", 1.2)):  # white on black shows on any image
                outline(axes, _place(patch, attention, photo), edgecolor=color, linewidth=line)
    scale = attention_scale(highest, "attention a patch receives")
    sheet.color_bar(left + columns * step_x, top + label, rows * step_y - label, scale)
    return sheet.write(path)


def _place(patch: tuple[int, int], attention: np.ndarray, photo: np.ndarray) -> tuple[float, float, float, float]:
    """The box of a patch, x0, y0, x1, y1 in pixels of the photograph."""
    height, width = (side / count for side, count in zip(photo.shape[:2], attention.shape[-2:], strict=True))
    row, column = patch
    return column * width, row * height, (column + 1) * width, (row + 1) * height


def write_attention(
    photo: UInt8[np.ndarray, "H W 3"],
    attention: Float[np.ndarray, "heads h w"],
    *,
    query: str,
    block: int,
    name: str,
    folder: Path,
) -> dict[str, str]:
    """Write `NAME_blockB_QUERY.npy`, `.png` (every head) and `_overlay.png` (the mean over heads on the photograph).

    Args:
        photo: what the model saw.
        attention: share of the query's attention that each patch receives, per head.
        query: who attends, as a trace names it; a `patch (row, column)` is marked.
        block: counted from 0.
        name: of the image, as the files shall begin.
        folder: where they go.

    Returns:
        The paths, under `array`, `heads` and `overlay`.
    """
    stem = f"{name}_block{block}_{safe_name(query)}"
    paths = {
        "array": folder / f"{stem}.npy",
        "heads": folder / f"{stem}.png",
        "overlay": folder / f"{stem}_overlay.png",
    }
    with replacing(paths["array"]) as temporary:
        np.save(temporary, attention.astype(np.float32))
    attention = attention.clip(min=0)  # differential attention may be negative; colors begin at nothing
    title = f"{name}: attention of {query}, block {block}"
    named = re.fullmatch(r"patch \((\d+), (\d+)\)", query)
    patch = None if named is None else (int(named[1]), int(named[2]))
    attention_figure(photo, attention, title=title, path=paths["heads"], patch=patch)
    image = Image.fromarray(overlay(photo, attention.mean(0)))
    if patch is not None:
        x0, y0, x1, y1 = _place(patch, attention, photo)
        for inset, color in ((0, "black"), (1, "white")):
            box = (round(x0) + inset, round(y0) + inset, round(x1) - 1 - inset, round(y1) - 1 - inset)
            ImageDraw.Draw(image).rectangle(box, outline=color)
    with replacing(paths["overlay"]) as temporary:
        image.save(temporary)
    return {kind: str(path) for kind, path in paths.items()}
