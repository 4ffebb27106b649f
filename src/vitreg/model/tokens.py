"""The named parts of a token sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """What a Vision Transformer returns: every token under its name.

    A forward pass returns a batch axis `B`; recorded facets of several blocks carry `L B` (see `Trace`).

    Attributes:
        cls: class token `[*B, D]`, None where the model has none.
        registers: `[*B, R, D]`, R is 0 without registers.
        patches: `[*B, N, D]`, row by row.
        grid: (rows, columns), `N = rows * columns`.
        normed: whether the final norm has been applied. False for checkpoints that norm only after pooling
            (MAE-style mean pooling, CLIP in transformers) and for hidden states.
    """

    cls: Float[Tensor, "*B D"] | None
    registers: Float[Tensor, "*B R D"]
    patches: Float[Tensor, "*B N D"]
    grid: tuple[int, int]
    normed: bool = True

    @classmethod
    def split(
        cls,
        sequence: Float[Tensor, "*B T D"],
        *,
        class_token: bool,
        grid: tuple[int, int],
        normed: bool = True,
    ) -> Tokens:
        """Name the parts of a sequence `[cls, registers, patches]`; nothing else slices one."""
        num_patches = grid[0] * grid[1]
        first = int(class_token)
        num_registers = sequence.shape[-2] - num_patches - first
        registers, patches = sequence[..., first:, :].split((num_registers, num_patches), dim=-2)
        return cls(sequence[..., 0, :] if class_token else None, registers, patches, grid, normed)

    def patch_map(self) -> Float[Tensor, "*B D h w"]:
        """The patches as an image of features."""
        return self.patches.transpose(-1, -2).unflatten(-1, self.grid)

    def sequence(self) -> Float[Tensor, "*B T D"]:
        """All tokens, in the model's order `[cls, registers, patches]`."""
        parts = [self.registers, self.patches]
        if self.cls is not None:
            parts.insert(0, self.cls.unsqueeze(-2))
        return torch.cat(parts, dim=-2)


@dataclass(frozen=True)
class Masked:
    """Patches that are hidden from a model (iBOT, arXiv 2111.07832): class token and registers never are.

    Attributes:
        where: true at the hidden patches.
        token: what stands in their place, before the position embedding.
    """

    where: Bool[Tensor, "B N"]
    token: Float[Tensor, " D"]
