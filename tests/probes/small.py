"""A small model and small sets of real images, for passes of a second; also in processes that tests kill."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vitreg
from peers import perturb
from vitreg.images import ImageError, ImageSet, open_image_set
from vitreg.probes import FeaturesConfig, extract
from vitreg.probes.store.shards import open_shard

BLOCKS = FeaturesConfig(blocks=(0, -1), dtype="float32", shard_size=8)
KILLED = FeaturesConfig(blocks=(1, 2), patches=20, shard_size=4)


def small_vit(seed: int = 0) -> vitreg.VisionTransformer:
    """Three blocks of 48 channels, two registers, images of 64 pixels in 4 x 4 patches."""
    config = vitreg.ViTConfig(
        embed_dim=48, depth=3, num_heads=3, mlp_dim=96, patch_size=16, image_size=(64, 64), num_registers=2,
        preprocess=vitreg.Preprocess(size=(64, 64), crop_pct=1.0), name="small",
    )  # fmt: skip
    torch.manual_seed(seed)
    vit = vitreg.VisionTransformer(config)
    perturb(vit, seed)
    return vit


class Images(ImageSet):
    """Some images of a set.

    Args:
        images: the set.
        indices: which ones.
        broken: positions of those that cannot be read.
    """

    def __init__(self, images: ImageSet, indices: Sequence[int], broken: Sequence[int] = ()) -> None:
        self._images, self._indices, self._broken = images, indices, broken
        self.source, self.classes = images.source, images.classes
        self.labels = None if images.labels is None else [images.labels[index] for index in indices]

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Image.Image:
        if index in self._broken:
            raise ImageError(f"{self.name(index)} is damaged; replace it")
        return self._images.image(self._indices[index])

    def name(self, index: int) -> str:
        return self._images.name(self._indices[index])


def spoil_first_value(store: Path, column: str) -> None:
    """Make the first number of a column of the first shard one that is not finite, in place."""
    path = min(store.glob("shards/*.parquet"))
    first = open_shard(path).mapped(column)[0][:1].copy()
    at = path.read_bytes().index(first.tobytes())
    first.flat[0] = np.nan
    with path.open("r+b") as file:
        file.seek(at)
        file.write(first.tobytes())


def validation(data: Path, number: int, broken: Sequence[int] = ()) -> Images:
    """Images of tiny-imagenet-100, one in every few."""
    images = open_image_set(data / "tiny-imagenet-100" / "val.parquet")
    return Images(images, range(0, number * 7, 7), broken)


_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["vitreg.probes", "pyarrow.parquet"])


def _pass(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    extract(small_vit(), validation(data, 100, broken=(30,)), out, KILLED, batch_size=3)


def killed_pass(data: Path, out: Path, when: Callable[[], bool], delay: float) -> int:
    """A pass over 100 images that is killed some time after something is there; its exit status."""
    os.environ["OMP_NUM_THREADS"] = "1"
    process = _CONTEXT.Process(target=_pass, args=(data, out))
    process.start()
    end = time.monotonic() + 60
    while not when() and process.is_alive():
        assert time.monotonic() < end
        time.sleep(0.001)
    time.sleep(delay)
    assert process.pid is not None
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def finish_pass(data: Path, out: Path) -> None:
    """The same pass, to its end."""
    process = _CONTEXT.Process(target=_pass, args=(data, out))
    process.start()
    process.join(60)
    assert process.exitcode == 0
