"""Stochastic depth: in training, images skip a block's branches at random."""

from __future__ import annotations

import numpy as np
import torch

from vitreg.model import VisionTransformer
from vitreg.model.block import Subset
from vitreg.training.engine.distributed import Distributed


class StochasticDepth:
    """Draws the images that take a residual branch, which adds the more to them (arXiv 1603.09382).

    Only these are computed, as in DINOv2 (`dinov2/layers/block.py: drop_add_residual_stochastic_depth`). Their number
    is the expected one, up to one, for the global batch, of which each process takes its part: with the same generator
    state everywhere, a batch is treated the same way however many processes share it. Over a step's many branches the
    parts of the processes even out.

    Draws are NumPy's, on the CPU, and reach the device in one copy, so that nothing waits for it.

    Args:
        rate: the probability to skip.
        depth: number of blocks, of two branches each.
        processes: who takes part.
    """

    def __init__(self, rate: float, depth: int, processes: Distributed) -> None:
        self.rate, self.depth, self.rank, self.world = rate, depth, processes.rank, processes.world

    def __call__(self, batch: int, device: torch.device) -> list[tuple[Subset, Subset]]:
        """Of every block, the subsets of its two branches.

        Args:
            batch: images of this process.
            device: where they are.
        """
        drawn = [self._draw(batch) for _ in range(2 * self.depth)]
        indices = torch.from_numpy(np.concatenate([images for images, _ in drawn]))
        if device.type == "cuda":
            indices = indices.pin_memory()
        parts = indices.to(device, non_blocking=True).split([len(images) for images, _ in drawn])
        subsets = [(part, factor) for part, (_, factor) in zip(parts, drawn, strict=True)]
        return list(zip(subsets[::2], subsets[1::2], strict=True))

    def _draw(self, batch: int) -> tuple[np.ndarray, float]:
        """Numbers of this process's images that take a branch, and the branch's factor."""
        total, kept = batch * self.world, 1 - self.rate
        count = int(total * kept + np.random.random())
        images = np.sort(np.random.permutation(total)[:count]) - batch * self.rank
        images = images[(images >= 0) & (images < batch)]
        # One image to which nothing is added: without any, this process would have no gradients for the others'.
        return (images, 1 / kept) if len(images) else (np.zeros(1, np.int64), 0.0)


def add_stochastic_depth(vit: VisionTransformer, rate: float, processes: Distributed) -> None:
    """The same rate in every block, as DeiT-III and DINOv2 have it."""
    if rate:
        vit.stochastic_depth = StochasticDepth(rate, vit.config.depth, processes)
