"""Stochastic depth: in training, images skip a block's branches at random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vitreg.model.block import Subset
from vitreg.training.engine.distributed import Distributed


@dataclass(frozen=True)
class StochasticDepth:
    """Draws the images that take a residual branch, which adds the more to them (arXiv 1603.09382).

    The rate is the same in every block, as DeiT-III and DINOv2 have it. Only these images are computed, as in DINOv2
    (`dinov2/layers/block.py: drop_add_residual_stochastic_depth`). Their number is the expected one, up to one, for the
    global batch, of which each process takes its part: with the same generator state everywhere, a batch is treated
    the same way however many processes share it. Over a step's many branches the parts of the processes even out.

    Draws are NumPy's, on the CPU, and reach the device in one copy, so that nothing waits for it.

    Attributes:
        rate: the probability to skip.
        depth: number of blocks, of two branches each.
        processes: who takes part.
    """

    rate: float
    depth: int
    processes: Distributed

    def __call__(self, batch: int, device: torch.device) -> list[tuple[Subset, Subset]]:
        """Of every block, the subsets of its two branches, for so many images of this process."""
        drawn = [self._draw(batch) for _ in range(2 * self.depth)]
        indices = torch.from_numpy(np.concatenate([images for images, _ in drawn]))
        if device.type == "cuda":
            indices = indices.pin_memory()
        parts = indices.to(device, non_blocking=True).split([len(images) for images, _ in drawn])
        subsets = [(part, factor) for part, (_, factor) in zip(parts, drawn, strict=True)]
        return list(zip(subsets[::2], subsets[1::2], strict=True))

    def _draw(self, batch: int) -> tuple[np.ndarray, float]:
        """Numbers of this process's images that take a branch, and the branch's factor."""
        total, kept = batch * self.processes.world, 1 - self.rate
        count = int(total * kept + np.random.random())
        images = np.sort(np.random.permutation(total)[:count]) - batch * self.processes.rank
        images = images[(images >= 0) & (images < batch)]
        # One image to which nothing is added: without any, this process would have no gradients for the others'.
        return (images, 1 / kept) if len(images) else (np.zeros(1, np.int64), 0.0)
