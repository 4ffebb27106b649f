"""What a method finds in one image, on the grid of patches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Region:
    """An object on the grid of patches.

    Attributes:
        seed: (row, column) of the patch that the object was found from.
        mask: the patches of the object, the 4-connected component that holds the seed.
        degree: how many other patches each patch is similar to.
    """

    seed: tuple[int, int]
    mask: Bool[np.ndarray, "h w"]
    degree: Int64[np.ndarray, "h w"]

    def box(self, patch_size: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The tight box around the mask, x0, y0, x1, y1 in pixels of a `height` x `width` image.

        The image's top left corner is the grid's. What the last patches hold besides the image is padding and
        cut off.
        """
        rows, columns = (np.flatnonzero(self.mask.any(axis)) for axis in (1, 0))
        right, bottom = (int(edge[-1] + 1) * patch_size for edge in (columns, rows))
        return int(columns[0]) * patch_size, int(rows[0]) * patch_size, min(right, width), min(bottom, height)


def region_of_seed(
    seed: int, mask: Bool[Tensor, " N"], degree: Int64[Tensor, " N"] | Float[Tensor, " N"], grid: tuple[int, int]
) -> Region:
    """The region of the mask's 4-connected component that holds the seed, or of the seed alone if none does."""
    row, column = divmod(seed, grid[1])
    labels = np.empty(grid, dtype=np.int32)
    scipy.ndimage.label(mask.cpu().numpy().reshape(grid), output=labels)
    component = labels == labels[row, column]
    if not labels[row, column]:
        component = np.zeros(grid, dtype=bool)
        component[row, column] = True
    return Region((row, column), component, degree.cpu().numpy().reshape(grid))
