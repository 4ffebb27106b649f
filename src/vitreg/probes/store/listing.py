"""The list of a store's images, written once: images are added at its end, so that shards stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vitreg.common.disk import replacing
from vitreg.common.words import counted
from vitreg.images import ImageSet, Subset

LISTING = "listing"
_BETWEEN = "\0"


def write_listing(images: ImageSet, path: Path) -> None:
    """Write the names of the images."""
    names = _BETWEEN.join(images.name(number) for number in range(len(images)))
    with replacing(path) as temporary:
        temporary.write_bytes(names.encode(errors="surrogateescape"))


def in_listed_order(images: ImageSet, path: Path, update: bool, say: Callable[[str], None] | None) -> ImageSet:
    """The images that a store lists, in its order, and behind them, for an update, those that it does not.

    Args:
        images: what there is now.
        path: of the listing; where there is none, the images are as they come.
        update: take those that were added.
        say: told that images were added, where they are left out.

    Raises:
        ValueError: some that are listed are gone.
    """
    if not path.exists():
        return images
    listed = path.read_bytes().decode(errors="surrogateescape").split(_BETWEEN)
    at = {images.name(number): number for number in range(len(images))}
    if gone := [name for name in listed if name not in at]:
        raise ValueError(f"{counted(len(gone), 'image')} of {path} are gone, such as {gone[0]}; restore them")
    added = sorted({*at} - {*listed})
    if added and not update and say is not None:
        told = counted(len(added), "image")
        say(f"{told} were added to {images.source} after {path} and are left out; --update extends the store")
    order = [at[name] for name in (listed + added if update else listed)]
    return images if order == list(range(len(images))) else Subset(images, np.array(order))
