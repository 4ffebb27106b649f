"""Rotary position embedding over the grid of patches."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.model.config import RopeConfig

Rotation = tuple[Tensor, Tensor]


def rotation(rope: RopeConfig, grid: tuple[int, int], num_prefix: int, device: torch.device) -> Rotation:
    """Cosines and sines `[num_prefix + N, head_dim]`, float32, for every token of a sequence.

    Prefix tokens get the identity, so that one multiplication serves the whole sequence. DINOv3 (arXiv
    2508.10104, `RopePositionEmbedding`) and EVA-02 (timm `RotaryEmbeddingCat`) differ only in coordinates and
    channel layout.
    """
    # Under torch.compile the table is part of the graph.
    table = _table if torch.compiler.is_compiling() else _cached_table
    return table(rope, grid, num_prefix, device)


@functools.lru_cache(maxsize=32)
def _cached_table(rope: RopeConfig, grid: tuple[int, int], num_prefix: int, device: torch.device) -> Rotation:
    """The table depends on nothing that trains, so it is kept."""
    # A cached inference tensor could not take part in a later training step.
    with torch.inference_mode(False), torch.no_grad():
        return _table(rope, grid, num_prefix, device)


def _table(rope: RopeConfig, grid: tuple[int, int], num_prefix: int, device: torch.device) -> Rotation:
    axes = []
    for side, size in enumerate(grid):
        axis = torch.arange(size, dtype=torch.float32, device=device)
        if rope.coordinates == "centered":
            axis = 2.0 * ((axis + 0.5 + rope.offset) / size) - 1.0
        else:
            axis = axis + rope.offset
            if rope.reference_grid:
                axis = axis / size * rope.reference_grid[side]
        axes.append(axis)
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    frequencies = (rope.frequencies, rope.column_frequencies or rope.frequencies)
    angles = coordinates[:, :, None] * torch.tensor(frequencies, dtype=torch.float32, device=device)
    angles = (angles.flip(1) if rope.swap_axes else angles).flatten(1)
    angles = angles.repeat_interleave(2, -1) if rope.interleaved else angles.repeat(1, 2)
    angles = torch.cat([angles.new_zeros(num_prefix, angles.shape[1]), angles])
    return angles.cos(), angles.sin()


def mixed_rotation(frequencies: Float[Tensor, "2 L H F"], grid: tuple[int, int], num_prefix: int) -> list[Rotation]:
    """For each block, cosines and sines `[H, num_prefix + N, head_dim]`, float32.

    The angle at row y, column x is `y * frequencies[0] + x * frequencies[1]` (RoPE-Mixed, arXiv 2403.13298).
    """
    rows, columns = (torch.arange(side, dtype=torch.float32, device=frequencies.device) for side in grid)
    y, x = (axis.flatten()[:, None] for axis in torch.meshgrid(rows, columns, indexing="ij"))
    along_y, along_x = frequencies.float().unsqueeze(-2)
    angles = (y * along_y + x * along_x).repeat_interleave(2, -1)
    angles = torch.cat([angles.new_zeros(*angles.shape[:2], num_prefix, angles.shape[-1]), angles], dim=-2)
    return list(zip(angles.cos(), angles.sin(), strict=True))


def rotate(x: Float[Tensor, "B H T d"], table: Rotation, *, interleaved: bool) -> Float[Tensor, "B H T d"]:
    """Rotate queries or keys; computed in float32 and returned in x's dtype."""
    cos, sin = table
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
