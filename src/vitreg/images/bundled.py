"""Photographs that need no download."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

NAMES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "camera.png",
    "clock_motion.png",
    "coins.png",
    "retina.jpg",
    "hubble_deep_field.jpg",
)


def bundled_photographs() -> list[Path]:
    """Nine photographs that scikit-image's wheel carries, in the public domain or CC0 (see `skimage.data`'s docs)."""
    return [Path(str(resources.files("skimage") / "data" / name)) for name in NAMES]
