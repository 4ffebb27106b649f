"""Attention maps of one picture, to look at and as files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vitreg.disk import replacing
from vitreg.report.sheet import GAP, MARGIN, TITLE, Sheet, root_scale


def overlay(
    photo: UInt8[np.ndarray, "H W 3"], attention: Float[np.ndarray, "h w"], *, highest: float | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Lay an attention map over a photograph, patches as sharp rectangles.

    The colour goes with the square root of the attention: a few patches often hold most of it, and on a
    linear scale everything else would be black.

    Args:
        photo: The photograph; the h x w patches tile it.
        attention: What each patch receives, not negative.
        highest: The attention of the brightest colour, to compare several maps; by default the
            map's own maximum.
    """
    import matplotlib

    highest = float(attention.max()) if highest is None else highest
    rows, columns = (np.arange(n) * m // n for n, m in zip(photo.shape[:2], attention.shape, strict=True))
    heat = np.sqrt(np.clip(attention / (highest or 1.0), 0, 1))[rows[:, None], columns]
    colour = matplotlib.colormaps["magma"](heat)[..., :3]
    # Grey, since the photograph's own colours would be read as heat, and less of it where there is more to
    # show, so that the brightest patches have the colour that the colour bar gives them.
    grey = (photo @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    strength = 0.45 + 0.5 * heat[..., None]
    return (255 * ((1 - strength) * grey + strength * colour)).round().astype(np.uint8)


def attention_figure(
    photo: UInt8[np.ndarray, "H W 3"], attention: Float[np.ndarray, "heads h w"], *, title: str, path: Path
) -> Path:
    """Write a PNG of a photograph, its attention averaged over heads, and the attention of every head.

    All maps share one colour scale, the share of a query's attention that a patch receives.

    Returns:
        `path`.
    """
    heads, highest = len(attention), float(attention.max())
    aspect = photo.shape[0] / photo.shape[1]
    # Two large pictures beside the heads: next to each other over two rows of heads, or stacked over four.
    stacked = heads > 8
    rows = 4 if stacked else 2
    columns = math.ceil(heads / rows)
    small, label = 1.25, 0.24
    step_x, step_y = small + GAP, small * aspect + label
    # A large picture is as tall as two small ones with the label between them.
    tall = small * aspect + step_y
    large = tall / aspect
    left = MARGIN + (large + GAP) * (1 if stacked else 2)
    top = 0.35
    sheet = Sheet(left + columns * step_x + 0.85, top + rows * step_y + MARGIN)
    sheet.text(title, MARGIN, 0.1, **TITLE)
    mean = overlay(photo, attention.mean(axis=0), highest=highest)
    second = (MARGIN, top + label + 2 * step_y) if stacked else (MARGIN + large + GAP, top + label)
    for picture, (x, y), name in (
        (photo, (MARGIN, top + label), "photograph"),
        (mean, second, f"mean of {heads} heads"),
    ):
        sheet.picture(picture, x, y, large, tall, name)
    for i, head in enumerate(attention):
        x, y = left + i % columns * step_x, top + label + i // columns * step_y
        sheet.picture(overlay(photo, head, highest=highest), x, y, small, small * aspect, f"head {i}")
    ticks = [highest * t**2 for t in (0, 0.5, 0.75, 1)]
    bar = left + columns * step_x, top + label, rows * step_y - label
    sheet.colour_bar(*bar, root_scale(highest), "magma", ticks, "attention a patch receives", percent=True)
    return sheet.write(path)


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
        query: who attends.
        block: counted from 0.
        name: of the picture, as the files shall begin.
        folder: where they go.

    Returns:
        The paths, under `array`, `heads` and `overlay`.
    """
    label = "".join(c if c.isalnum() else "-" for c in query).strip("-")
    stem = f"{name}_block{block}_{label}"
    paths = {
        "array": folder / f"{stem}.npy",
        "heads": folder / f"{stem}.png",
        "overlay": folder / f"{stem}_overlay.png",
    }
    with replacing(paths["array"]) as temporary:
        np.save(temporary, attention.astype(np.float32))
    attention = attention.clip(min=0)  # differential attention may be negative; colours begin at nothing
    attention_figure(photo, attention, title=f"{name}: attention of {query}, block {block}", path=paths["heads"])
    with replacing(paths["overlay"]) as temporary:
        Image.fromarray(overlay(photo, attention.mean(0))).save(temporary)
    return {kind: str(path) for kind, path in paths.items()}
