"""Does a map of the class token's attention show what the class token reads?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitreg.checkpoints import ObservedViT
from vitreg.common.words import percent
from vitreg.model import Block, Trace, VisionTransformer, ViTConfig
from vitreg.model.trace import Summary

FAITHFUL = 0.9
"""A cosine from which on the patches alone give the class token what it reads."""

UNFAITHFUL = 0.5
"""A cosine below which a map over the patches is of something else."""


@dataclass(frozen=True)
class BlockFaithfulness:
    """What the class token attends to in one block, mean over heads and images.

    Attributes:
        block: counted from 0.
        to_patches, to_registers, to_cls: shares of its attention; the last is to itself.
        cosine: between what attention writes to it, and what it would write if it attended to the patches alone.
    """

    block: int
    to_patches: float
    to_registers: float
    to_cls: float
    cosine: float


@dataclass(frozen=True)
class Faithfulness:
    """How far maps of the class token's attention can be trusted (Lappe and Giese, arXiv 2505.05892).

    Attributes:
        blocks: every block's shares.
        sentences: the same in words.
    """

    blocks: tuple[BlockFaithfulness, ...]
    sentences: tuple[str, ...]


def is_plain(config: ViTConfig) -> bool:
    """Whether there is a class token whose rows of attention are one softmax over the tokens and nothing else."""
    return config.class_token and not config.differential and not config.prefix_rows


class FaithfulnessSums:
    """Adds up what the class token reads, and what it would read from patches alone, over batches."""

    def __init__(self, vit: VisionTransformer | ObservedViT) -> None:
        self._vit, self._num_images = vit, 0
        self._sums: Tensor | None = None  # [L, (patches, registers, itself, cosine)]
        self.summaries: dict[str, Summary] = {}
        if isinstance(vit, VisionTransformer) and is_plain(vit.config):
            prefix = vit.config.num_prefix_tokens
            self.summaries = {
                # Clones, because a view holds the queries, keys and values of all tokens.
                "values of the prefix": ("values", lambda values: values[:, :, :prefix].clone()),
                "heads of the class token": ("heads", lambda heads: heads[:, :, 0].clone()),
            }

    def add(self, trace: Trace, names: list[str]) -> None:
        """Add a batch whose attention is from the class token first."""
        if not self.summaries:
            return
        rows, read = trace.attention, trace.summaries["heads of the class token"].float()  # [L, B, H, d]
        assert rows is not None
        assert rows.to_cls is not None
        to_cls, to_registers = rows.to_cls[:, :, :, :1], rows.to_registers[:, :, :, 0]
        to_patches = rows.to_patches[:, :, :, 0].flatten(3).sum(-1, keepdim=True)
        weights = torch.cat([to_cls, to_registers], dim=-1)  # [L, B, H, P]
        elsewhere = (weights.unsqueeze(-1) * trace.summaries["values of the prefix"].float()).sum(-2)
        # Softmax over the patches alone is the same softmax, scaled to sum to one over them.
        alone = (read - elsewhere) / to_patches.clamp_min(1e-6)
        shares = [share.sum(-1).mean(2).sum(1) for share in (to_patches, to_registers, to_cls)]
        sums = torch.stack([*shares, self._cosines(read, alone).sum(1)], dim=-1).double().cpu()
        self._sums = sums if self._sums is None else self._sums + sums
        self._num_images += len(names)

    def _cosines(self, read: Float[Tensor, "L B H d"], alone: Float[Tensor, "L B H d"]) -> Float[Tensor, "L B"]:
        """Of what the blocks' output projections make of both."""
        cosines = []
        assert isinstance(self._vit, VisionTransformer)
        for block, pair in zip(self._vit.blocks, torch.stack([read, alone], dim=1), strict=True):
            assert isinstance(block, Block)
            heads = pair.flatten(2).to(block.attn.proj.weight.dtype)
            cosines.append(F.cosine_similarity(*block.attn.proj(block.attn.norm(heads)).float(), dim=-1))
        return torch.stack(cosines)

    def conclude(self) -> Faithfulness | None:
        """None where there is no class token, or no attention of its own kind is seen."""
        if self._sums is None:
            return None
        means = (self._sums / self._num_images).tolist()
        blocks = tuple(BlockFaithfulness(i, *values) for i, values in enumerate(means))
        return Faithfulness(blocks, _say(blocks))


def _say(blocks: tuple[BlockFaithfulness, ...]) -> tuple[str, ...]:
    """Of the last block, whose maps are looked at most, and of the worst."""
    last, worst = blocks[-1], min(blocks, key=lambda block: block.cosine)
    registers = f"{percent(last.to_registers)} to registers and " if last.to_registers else ""
    meaning = (
        "a map over the patches shows what it reads"
        if last.cosine >= FAITHFUL
        else "a map over the patches does not show what it reads"
        if last.cosine < UNFAITHFUL
        else "a map over the patches shows a part of what it reads"
    )
    text = (
        f"In the last block {percent(last.to_patches)} of the class token's attention goes to patches, {registers}"
        f"{percent(last.to_cls)} to itself; what it would read from the patches alone has a cosine of "
        f"{last.cosine:.2f} with what it reads: {meaning}"
    )
    return (text + (f"; least so in block {worst.block} ({worst.cosine:.2f})." if worst is not last else "."),)
