"""Images of object discovery: what was found in a photograph, and how settings compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from vitreg.common.disk import replacing
from vitreg.common.words import counted, shorten
from vitreg.report.colors import color_table

BOX = (255, 90, 60)
MASK = np.array((60, 160, 255))
SEED = (255, 225, 60)
_STRIP, _GAP, _MARGIN = 26, 6, 6
_LARGEST = 1600


def discovery_overlay(
    photo: UInt8[np.ndarray, "H W 3"],
    *,
    boxes: Sequence[tuple[int, int, int, int]],
    seed: tuple[int, int],
    mask: Bool[np.ndarray, "h w"],
    degree: Integer[np.ndarray, "h w"],
    patch_size: int,
    title: str,
) -> Image.Image:
    """A photograph with box, seed and mask, beside or above its map of degrees, under a line of text.

    Args:
        photo: the image at its own resolution; patches lie from its top left corner and may reach beyond it.
        boxes: x0, y0, x1, y1 in pixels; the first belongs to seed and mask, further ones are drawn thinner.
        seed: (row, column) of the patch.
        mask: the patches of the object.
        degree: to how many others each patch is similar; bright is few, as the seed is where they are fewest.
        patch_size: in pixels.
        title: the line of text.
    """
    height, width = photo.shape[:2]
    # Images larger than a screen are drawn smaller: encoding them would take longer than finding the object.
    step = -(-max(height, width) // _LARGEST)
    rows, columns = (np.arange(0, side, step) // patch_size for side in (height, width))
    photo = photo[::step, ::step]
    inside = mask[rows[:, None], columns]
    found = photo.copy()
    found[inside] = (found[inside] // 2 + MASK // 2).astype(np.uint8)
    spread = max(int(degree.max() - degree.min()), 1)
    levels = ((degree.max() - degree) * 255 // spread).astype(np.uint8)
    degrees = color_table("magma")[levels][rows[:, None], columns]
    # Beside each other, or below where they are wide.
    across, down = (0, len(rows) + _GAP) if width > 2 * height else (len(columns) + _GAP, 0)
    texts = [
        title,
        f"box, seed (dot), object (blue){', further boxes (thin)' if len(boxes) > 1 else ''}",
        f"{'below' if down else 'right'}: how many patches are similar, {degree.min()} (bright) to {degree.max()}",
    ]
    font = ImageFont.load_default(14)
    least = math.ceil(max(font.getlength(text) for text in texts[1:])) + 2 * _MARGIN
    size = max(len(columns) + across, least), len(rows) + down + 3 * _STRIP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    line = max(2, len(rows) // 160)
    for image, left, top in ((found, 0, _STRIP), (degrees, across, _STRIP + down)):
        sheet.paste(Image.fromarray(image), (left, top))
        for number, box in reversed(list(enumerate(boxes))):
            x0, y0, x1, y1 = (side / step for side in box)
            outline = (x0 + left, y0 + top, x1 + left - 1, y1 + top - 1)
            draw.rectangle(outline, outline=BOX, width=line if number == 0 else 1)
        # The middle of a patch that reaches beyond the image may lie outside.
        y, x = (
            min((place + 0.5) * patch_size, side - 1) / step for place, side in zip(seed, (height, width), strict=True)
        )
        radius = max(3.0, 0.4 * patch_size / step)
        draw.ellipse((x + left - radius, y + top - radius, x + left + radius, y + top + radius), SEED, (0, 0, 0))
    most = len(title)
    while font.getlength(shorten(title, most)) > size[0] - 2 * _MARGIN:
        most -= 1
    below = size[1] - 2 * _STRIP
    for text, y, grey in ((shorten(title, most), 4, 0), (texts[1], below + 4, 90), (texts[2], below + _STRIP, 90)):
        draw.text((_MARGIN, y), text, fill=(grey,) * 3, font=font)
    return sheet


def sweep_figure(summary: Mapping[str, Any], path: Path, *, most: int = 48) -> Path:
    """Write a PNG of an evaluation: CorLoc and its interval for the protocol and the best settings of every model.

    Args:
        summary: format `vitreg-discovery/1`.
        path: the file to write; its folder is made.
        most: settings shown, the best.
    """
    from matplotlib.figure import Figure

    models = summary["models"]
    columns = [model.get("settings", []) for model in models]
    rows = sorted(zip(*columns, strict=True), key=lambda row: -sum(entry["corloc"] for entry in row))[:most]
    lines: list[tuple[str, list[Mapping[str, Any]]]] = [("protocol", [model["protocol"] for model in models])]
    settings = counted(len(columns[0]), "setting")
    if rows:
        lines.append((f"mean of {settings}", [model["mean"] for model in models]))
    lines += [(row[0]["name"], list(row)) for row in rows]
    figure = Figure(figsize=(8.5, 1.6 + 0.2 * len(lines) + 0.18 * len(models)), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    shift = 0.5 / len(models)
    for m, model in enumerate(models):
        places = np.arange(len(lines)) + (m - (len(models) - 1) / 2) * shift
        shares = np.array([entries[m]["corloc"] for _, entries in lines])
        low, high = np.array([entries[m]["interval"] for _, entries in lines]).T
        # An interval of percentiles need not hold the mean it is of, if only by a rounding.
        reach = np.clip([shares - low, high - shares], 0, None)
        style = {"fmt": "o", "markersize": 4, "elinewidth": 1, "color": f"C{m}"}
        axes.errorbar(shares, places, xerr=reach, label=shorten(model["model"], 80), **style)
    whole = summary["whole_image"]["corloc"]
    axes.axvline(whole, color="grey", linestyle=":", label=f"box around the whole image, {whole:.1f}")
    axes.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("CorLoc in percent, with 95 % bootstrap intervals over images")
    best = f", the best {len(rows)} of {settings}" if len(rows) < len(columns[0]) else ""
    title = f"{shorten(summary['data'], 60)}: {counted(summary['num_images'], 'image')}{best}"
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.legend(loc="outside lower center", ncols=1, fontsize=8, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary)
    return path
