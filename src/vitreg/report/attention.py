"""Attention maps of one picture as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vitreg.report.figures import attention_figure, overlay


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
    np.save(paths["array"], attention.astype(np.float32))
    attention = attention.clip(min=0)  # differential attention may be negative; colours begin at nothing
    attention_figure(photo, attention, title=f"{name}: attention of {query}, block {block}", path=paths["heads"])
    Image.fromarray(overlay(photo, attention.mean(0))).save(paths["overlay"])
    return {kind: str(path) for kind, path in paths.items()}
