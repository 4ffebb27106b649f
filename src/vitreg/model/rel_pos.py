"""A bias on attention that depends on where a key is, seen from a query."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitreg.model.config import ViTConfig

Grid = tuple[int, int]


class RelPosBias(nn.Module):
    """What is added to the products of queries and keys, by head and offset of their patches.

    The offsets' biases are a table, which has entries for the class token too (BEiT, arXiv 2106.08254; Swin), or what
    an MLP makes of the logarithms of the offsets (timm's `RelPosMlp`, after Swin V2, arXiv 2111.09883). Registers are
    nowhere, so theirs is zero, and the class token's beside an MLP.
    """

    def __init__(self, config: ViTConfig, block: int = 0) -> None:
        super().__init__()
        self.grid, self.class_token = config.grid, config.class_token
        waiting = config.num_waiting(block)
        self.num_copies = 0 if waiting else config.num_attention_copies
        self.num_prefix = config.num_prefix_tokens - waiting
        self.rule = config.position_interpolation
        self.table = None
        if config.rel_pos == "table":
            self.table = nn.Parameter(torch.empty(_num_offsets(config.grid) + 3, config.num_heads))
        else:
            self.fc1 = nn.Linear(2, config.rel_pos_dim)
            self.fc2 = nn.Linear(config.rel_pos_dim, config.num_heads)

    def forward(self, grid: Grid, like: Tensor) -> Float[Tensor, "1 H T T"]:
        """The bias for a grid of patches, in the dtype of the queries, between all tokens that attention sees."""
        index = _index if torch.compiler.is_compiling() else _cached_index
        where = index(grid, self.num_copies, self.num_prefix, self.class_token, like.device)
        biases = self._of_offsets(grid)
        biases = F.pad(biases, (0, 0, 0, _num_offsets(grid) + 4 - len(biases)))
        return biases.to(like.dtype).T[:, where].unsqueeze(0)

    @torch.no_grad()
    def resize(self, grid: Grid) -> None:
        """Make a grid the table's own, so that an exported graph has no resampling in it."""
        if self.table is not None:
            self.table = nn.Parameter(self._of_offsets(grid).clone(), requires_grad=self.table.requires_grad)
        self.grid = grid

    def _of_offsets(self, grid: Grid) -> Float[Tensor, "offsets H"]:
        """Rows by offset; of a table, three more: from the class token, to it, and from it to itself."""
        if self.table is None:
            weight = self.fc1.weight
            axes = [torch.arange(1 - side, side, device=weight.device, dtype=torch.float32) for side in grid]
            offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
            return self.fc2(F.relu(self.fc1((offsets.sign() * offsets.abs().log1p()).to(weight.dtype))))
        if grid == self.grid:
            return self.table
        patches, others = self.table.float().split((_num_offsets(self.grid), 3))
        patches = patches.unflatten(0, [2 * side - 1 for side in self.grid])
        if self.rule.mode == "bilinear":  # transformers
            size = [2 * side - 1 for side in grid]
            image = F.interpolate(patches.permute(2, 0, 1).unsqueeze(0), size, mode="bilinear")[0]
            return torch.cat([image.permute(1, 2, 0).flatten(0, 1), others])
        rows, columns = (_resampling(*sides).to(patches.device) for sides in zip(self.grid, grid, strict=True))
        return torch.cat([torch.einsum("ya,xb,abh->yxh", rows, columns, patches).flatten(0, 1), others])


def _num_offsets(grid: Grid) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def _index(grid: Grid, num_copies: int, num_prefix: int, class_token: bool, device: torch.device) -> Int[Tensor, "T T"]:
    """Which row of the biases belongs to a query and a key; the last is zero."""
    first, count = num_copies + num_prefix, _num_offsets(grid)
    row, column = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
    down, right = (at.flatten()[:, None] - at.flatten() for at in (row, column))
    of_patches = (down + grid[0] - 1) * (2 * grid[1] - 1) + right + grid[1] - 1
    index = F.pad(of_patches, (first, 0, first, 0), value=count + 3)
    if class_token:  # copies of registers come before it
        index[num_copies, first:], index[first:, num_copies], index[num_copies, num_copies] = (
            count,
            count + 1,
            count + 2,
        )
    return index


@functools.lru_cache(maxsize=4)
def _cached_index(
    grid: Grid, num_copies: int, num_prefix: int, class_token: bool, device: torch.device
) -> Int[Tensor, "T T"]:
    # A cached inference tensor could not take part in a later training step.
    with torch.inference_mode(False):
        return _index(grid, num_copies, num_prefix, class_token, device)


@functools.lru_cache(maxsize=32)
def _resampling(old: int, new: int) -> Float[Tensor, "to from"]:
    """Weights that resize one axis of a table, linear between offsets that lie the farther apart the larger they are.

    The positions are a geometric progression of which as many entries as the table has reach as far as the new grid
    does (BEiT's `run_class_finetuning.py`, timm's `resize_rel_pos_bias_table`). With a ratio of at least 1.01, an axis
    that keeps its length changes a little where the other one does not.
    """
    if old == 1:
        return torch.ones(2 * new - 1, 1)
    low, high = ratio, _ = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio ** (old - 1)) / (1 - ratio) > new - 1 else (ratio, high)
    steps = torch.tensor([ratio**i for i in range(old - 1)], dtype=torch.float64).cumsum(0)
    known = torch.cat([-steps.flip(0), steps.new_zeros(1), steps])
    wanted = torch.arange(1 - new, new, dtype=torch.float64).clamp(known[0], known[-1])
    right = torch.bucketize(wanted, known).clamp(min=1)
    share = (wanted - known[right - 1]) / (known[right] - known[right - 1])
    weights = torch.zeros(len(wanted), len(known), dtype=torch.float64)
    weights.scatter_(1, right[:, None], share[:, None]).scatter_(1, right[:, None] - 1, 1 - share[:, None])
    return weights.float()
