"""Pictures that are not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitreg.images import ImageError, ImageSet, evenly
from vitreg.model import Preprocess


def stream_pictures(
    images: ImageSet, preprocess: Preprocess, *, batch_size: int, device: torch.device, limit: int | None = None
) -> Iterator[tuple[Tensor, list[int]]]:
    """Normalised batches `[B, 3, H, W]` and the numbers of their pictures; those that cannot be read are left out.

    Args:
        images: the set, gone through in its own order.
        preprocess: of the model.
        batch_size: pictures at a time.
        device: where batches are put.
        limit: only so many pictures, spread evenly over the set, which may be sorted by class.
    """

    def read(index: int) -> Tensor | None:
        try:
            return preprocess.pixels(images.picture(index))
        except ImageError:
            return None

    chosen = evenly(len(images), limit or len(images)).tolist()
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            found = [(i, pixels) for i, pixels in zip(part, pool.map(read, part), strict=True) if pixels is not None]
            if found:
                batch = torch.stack([pixels for _, pixels in found])
                yield preprocess.normalize(batch.to(device)), [i for i, _ in found]


class Part(ImageSet):
    """Some pictures of a set.

    Args:
        images: the set.
        indices: which of its pictures.
    """

    def __init__(self, images: ImageSet, indices: NDArray[np.int64]) -> None:
        self._images, self._indices = images, indices
        self.source, self.classes = images.source, images.classes
        self.labels = None if images.labels is None else np.asarray(images.labels)[indices].tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def picture(self, index: int) -> Image.Image:
        """As of the set."""
        return self._images.picture(int(self._indices[index]))

    def name(self, index: int) -> str:
        """As of the set."""
        return self._images.name(int(self._indices[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        """As of the set."""
        return self._images.captions(int(self._indices[index]))


def hold_out(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training pictures and a twentieth of the set, at most 1000, that is kept from training."""
    order = np.random.default_rng((seed, 20)).permutation(len(images))
    count = max(1, min(1000, len(images) // 20))
    return Part(images, np.sort(order[count:])), Part(images, np.sort(order[:count]))
