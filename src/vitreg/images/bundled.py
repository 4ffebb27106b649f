"""Photographs that need no download."""

from __future__ import annotations

from pathlib import Path

NAMES = (
    "astronaut.jpg",
    "rocket.jpg",
    "camera.jpg",
    "coffee.jpg",
    "chelsea.jpg",
    "clock_motion.jpg",
    "coins.jpg",
    "retina.jpg",
    "hubble_deep_field.jpg",
)
"""Those with one object on a plain ground first: figures show the first few."""


def bundled_photographs() -> list[Path]:
    """Nine photographs in the public domain or CC0: `photographs/README.md` tells whose they are."""
    return [Path(__file__).parent / "photographs" / name for name in NAMES]
