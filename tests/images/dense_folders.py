"""Small folders of images with masks or depth, for tests to break."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (40, 30)


def image(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "white").save(path)
    return path


def mask(path: Path, numbers: tuple[int, ...] = (0, 1), size: tuple[int, int] = SIZE) -> Path:
    """Stripes of class numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.resize(np.array(numbers, np.uint8), (size[1], size[0]))
    Image.fromarray(stripes).save(path)
    return path


def depth_map(path: Path, steps: int = 1500, size: tuple[int, int] = SIZE) -> Path:
    """One depth, with a hole in the first pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((size[1], size[0]), steps, np.uint16)
    values[0, 0] = 0
    Image.fromarray(values).save(path)
    return path


def mask_folder(folder: Path) -> Path:
    """Four images to train on and two to judge by."""
    for part, names in (("train", "abcd"), ("val", "ef")):
        for name in names:
            image(folder / part / "images" / f"{name}.jpg")
            mask(folder / part / "masks" / f"{name}.png")
    return folder


def depth_folder(folder: Path) -> Path:
    """Two images to train on and one to judge by."""
    for part, names in (("train", "ab"), ("val", "c")):
        for name in names:
            image(folder / part / "images" / f"{name}.jpg")
            depth_map(folder / part / "depth" / f"{name}.png")
    return folder
