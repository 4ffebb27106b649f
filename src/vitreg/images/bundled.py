"""Photographs that need no download."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def bundled_photographs() -> list[Path]:
    """Freely licensed photographs that scikit-image carries (see its `data/README.txt`)."""
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    return [Path(str(resources.files("skimage") / "data" / name)) for name in names]
