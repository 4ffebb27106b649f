"""Sets of images with a depth for every pixel: NYUv2, and folder pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from vitreg.images.dense import DenseSet, Pair, listed_pairs, open_folders
from vitreg.images.reading import ImageError

MILLIMETERS = 1 / 1000


class DepthSet(DenseSet):
    """Image files with a depth for every pixel."""

    kind = "depth map"
    # Which one a 16-bit PNG gets depends on Pillow's version.
    modes = frozenset({"I;16", "I;16B", "I"})
    wanted = "one channel of 16 bits"

    def __init__(
        self, source: str, pairs: Sequence[Pair], scale: float = MILLIMETERS, *, eigen_crop: bool = False
    ) -> None:
        """As of `DenseSet`, with meters in one step of a file's numbers.

        It may be the custom to judge by the middle of the images (`eigen_crop`; Eigen et al. 2014).
        """
        super().__init__(source, pairs)
        self.scale, self.eigen_crop = scale, eigen_crop
        self.meaning = scale, eigen_crop

    def target(self, index: int) -> Float32[np.ndarray, "H W"]:
        """Meters; 0 where nothing was measured.

        Raises:
            ImageError: the map cannot be read, or nothing at all was measured; the message names it.
        """
        steps = self._read(index)
        if not steps.any():
            raise ImageError(f"{self.target_name(index)} is all holes (0 everywhere); leave it and its image out")
        return steps.astype(np.float32) * np.float32(self.scale)


def open_depth(source: str, *, scale: float = MILLIMETERS) -> tuple[DepthSet, DepthSet]:
    """The images with depth that `source` names: those to train on, and those to judge by.

    - PATH: a folder with `train/images`, `train/depth`, `val/images` and `val/depth`; depth maps are PNG of 16 bits
      with their images' names, 0 where nothing was measured.
    - `nyu:PATH`: NYUv2 as exported for BTS, AdaBins and the Monocular-Depth-Estimation-Toolbox, which DINOv2 evaluates
      with: scene folders of `rgb_*.jpg` and `sync_depth_*.png` in millimeters, and the lists `nyu_train.txt` and
      `nyu_test.txt`, whose lines are an image, its depth and a focal length.

    Args:
        source: as above.
        scale: meters in one step of the files' numbers; 1/1000, millimeters, by default.

    Raises:
        ValueError: there is nothing of the kind, or maps do not fit their images; the message has the first files.
    """
    if not 0 < scale < 1:
        raise ValueError(f"scale is {scale}; it must be the meters in one step, such as 0.001 for millimeters")
    kind, _, path = source.partition(":")
    if kind == "nyu":
        train, val = (_nyu(Path(path).expanduser(), part, scale) for part in ("train", "test"))
        return train, val
    return open_folders(Path(source).expanduser(), "depth", "nyu:PATH", partial(DepthSet, scale=scale))


def _nyu(folder: Path, part: str, scale: float) -> DepthSet:
    listed = folder / f"nyu_{part}.txt"

    def pair(line: str) -> tuple[Path, Path]:
        # Paths begin with a slash there, and are of the folder all the same.
        image, *rest = (folder / name.lstrip("/") for name in line.split())
        if not rest:
            raise ValueError(f"{listed} is malformed: {line!r} is not an image and its depth")
        return image, rest[0]

    pairs = listed_pairs(listed, "the scenes of NYUv2 and this list", pair)
    return DepthSet(str(listed), pairs, scale, eigen_crop=True)
