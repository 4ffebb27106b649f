"""The files of a feature store: some images each, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from vitreg.probes.store.tensor_file import UNREADABLE, open_tensors, write_tensors


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read: its position in the set, its name, and the sentence that says why."""

    number: int
    name: str
    reason: str


@dataclass(frozen=True)
class Shard:
    """A finished file: how many images are in it, of how many with patch tokens, and which could not be read."""

    path: Path
    num_images: int
    num_with_patches: int
    names: frozenset[str]
    skipped: tuple[Skipped, ...]

    def read(self, name: str, *, block: int | None = None) -> Tensor:
        """One tensor; of `norms` maybe one block only."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name) if block is None else file.get_slice(name)[:, block]


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard is."""
    return folder / f"shard-{index:05d}.safetensors"


def write_shard(
    folder: Path, index: int, origin: str, tensors: Mapping[str, Tensor], skipped: tuple[Skipped, ...]
) -> None:
    """Write one, with the digest of what its store is of; where it cannot be written, the shards before it are whole.

    `numbers` among its tensors are the images' positions in the set, and `patch_rows` the rows of those whose patch
    tokens are kept, which `registers`, `norms` and `patches` are of.
    """
    note = {
        "origin": origin,
        "index": index,
        "images": len(tensors["numbers"]),
        "with_patches": len(tensors["patch_rows"]),
        "skipped": [[image.number, image.name, image.reason] for image in skipped],
    }
    write_tensors(shard_path(folder, index), tensors, note)


def open_shard(folder: Path, index: int, origin: str) -> Shard:
    """A shard that was written.

    Raises:
        ValueError: it is damaged, or belongs to another store.
    """
    path = shard_path(folder, index)
    try:
        with open_tensors(path) as (file, note):
            names = frozenset(file.keys())
        skipped = tuple(Skipped(*image) for image in note["skipped"])
        shard = Shard(path, int(note["images"]), int(note["with_patches"]), names, skipped)
        belongs = (note["origin"], note["index"]) == (origin, index)
    except UNREADABLE as error:
        raise ValueError(f"{path} is damaged or missing ({error}); delete it and run the feature pass again") from error
    if not belongs:
        raise ValueError(f"{path} belongs to another store; delete it and run the feature pass again")
    return shard
