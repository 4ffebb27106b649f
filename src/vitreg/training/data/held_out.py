"""Images that are not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from vitreg.images import ImageError, ImageSet, Subset, spaced_indices
from vitreg.model import Preprocess


def stream_images(
    images: ImageSet, preprocess: Preprocess, *, batch_size: int, device: torch.device, limit: int | None = None
) -> Iterator[tuple[Tensor, list[int]]]:
    """Normalized batches `[B, 3, H, W]` and the numbers of their images; those that cannot be read are left out.

    Args:
        images: the set, gone through in its own order.
        preprocess: of the model.
        batch_size: images at a time.
        device: where batches are put.
        limit: only so many images, spread evenly over the set, which may be sorted by class.
    """

    def read(index: int) -> Tensor | None:
        try:
            return preprocess.pixels(images.image(index))
        except ImageError:
            return None

    chosen = spaced_indices(len(images), limit or len(images)).tolist()
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            found = [(i, pixels) for i, pixels in zip(part, pool.map(read, part), strict=True) if pixels is not None]
            if found:
                batch = torch.stack([pixels for _, pixels in found])
                yield preprocess.normalize(batch.to(device)), [i for i, _ in found]


def hold_out(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training images and a twentieth of the set, at most 1000, that is kept from training."""
    order = np.random.default_rng((seed, 20)).permutation(len(images))
    count = max(1, min(1000, len(images) // 20))
    return Subset(images, np.sort(order[count:])), Subset(images, np.sort(order[:count]))
