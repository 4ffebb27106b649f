"""Stochastic depth: in training, pictures skip a block's branches at random."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.model import VisionTransformer
from vitreg.training.processes import Processes


class StochasticDepth(nn.Module):
    """Drops a residual branch for some pictures and scales it up for the others (arXiv 1603.09382).

    timm's `DropPath`, but the draws are those of the global batch, of which each process takes its part: with the same
    generator state everywhere, a batch is treated the same way however many processes share it.

    Args:
        rate: the probability to drop.
        processes: who takes part.
    """

    def __init__(self, rate: float, processes: Processes) -> None:
        super().__init__()
        self.rate, self.rank, self.world = rate, processes.rank, processes.world

    def forward(self, branch: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The branch, zero for dropped pictures."""
        if not self.training:
            return branch
        mine = branch.shape[0]
        draws = torch.rand(mine * self.world, device=branch.device)[self.rank * mine : (self.rank + 1) * mine]
        kept = (draws >= self.rate).to(branch.dtype) / (1 - self.rate)
        return branch * kept.view(-1, 1, 1)


def add_stochastic_depth(vit: VisionTransformer, rate: float, processes: Processes) -> None:
    """The same rate in every block, as DeiT-III and DINOv2 have it."""
    for block in vit.blocks if rate else ():
        block.drop_path = StochasticDepth(rate, processes)
