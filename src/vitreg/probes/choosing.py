"""Which images of a set are asked about, and which are held out."""

from __future__ import annotations

import numpy as np

from vitreg.images import DenseSet, ImageSet, Subset, spaced_indices

_HELD_OUT = 5


def choose(images: ImageSet, count: int | None) -> ImageSet:
    """So many images of a set, as many of each class, spread over the set; all where `count` is None or too large.

    Numbers differ by one where `count` is no multiple of the number of classes. A class that has fewer images than its
    share gives all of them, and the others make up for it in equal parts.
    """
    if count is None or count >= len(images):
        return images
    classes = _by_class(images)
    sizes = np.array([len(rows) for rows in classes])
    taken = np.zeros_like(sizes)
    while left := count - int(taken.sum()):
        more = np.flatnonzero(taken < sizes)
        if share := left // len(more):
            taken[more] += np.minimum(share, (sizes - taken)[more])
        else:
            taken[more[spaced_indices(len(more), left)]] += 1
    chosen = [rows[spaced_indices(len(rows), number)] for rows, number in zip(classes, taken.tolist(), strict=True)]
    return _part(images, np.sort(np.concatenate(chosen)))


def hold_out(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Training and validation images of a set that is not divided: every fifth of each class is held out.

    Classes of one or two images are for training only.

    Raises:
        ValueError: no class has three images.
    """
    held_out = np.zeros(len(images), dtype=bool)
    for rows in _by_class(images):
        held_out[rows[_HELD_OUT // 2 :: _HELD_OUT]] = True
    if not held_out.any():
        few = "" if images.labels is None else ", and three of no class"
        raise ValueError(
            f"{images.source} has {len(images)} images{few}, of which none can be held out; give more, or a folder "
            "with train/ and val/"
        )
    return _part(images, np.flatnonzero(~held_out)), _part(images, np.flatnonzero(held_out))


def _by_class(images: ImageSet) -> list[np.ndarray]:
    """The rows of each class; of all, where there are none."""
    if images.labels is None:
        return [np.arange(len(images))]
    labels = np.asarray(images.labels)
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _part(images: ImageSet, indices: np.ndarray) -> ImageSet:
    return images.part(indices.tolist()) if isinstance(images, DenseSet) else Subset(images, indices)
