"""Images that are not trained on."""

from __future__ import annotations

import numpy as np

from vitreg.images import ImageSet, Subset


def hold_out(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training images and a twentieth of the set, at most 1000, that is kept from training."""
    order = np.random.default_rng((seed, 20)).permutation(len(images))
    count = max(1, min(1000, len(images) // 20))
    return Subset(images, np.sort(order[count:])), Subset(images, np.sort(order[:count]))
