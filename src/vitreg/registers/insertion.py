"""Copies of a model: with registers put in, or as it was."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.checkpoints.state import build
from vitreg.model import VisionTransformer

MIN_SIMILARITY = 0.9
"""Mean cosine of the pooled features with the original's below which a change of the weights is refused: a repair of
the ViT-Ti with 0.74 takes its k-NN from 63 to 44 %, a prefix with 0.998 one point (docs/registers.md)."""


def with_registers(vit: VisionTransformer, values: Float[Tensor, "R D"], at: int, **changes: Any) -> VisionTransformer:
    """A copy of a model on the same device, with registers inserted; the original is left untouched.

    Args:
        vit: the model.
        values: what the new registers start from.
        at: before which of the registers it has.
        changes: other fields of `ViTConfig` that differ.

    Raises:
        ValueError: a config that cannot be built.
    """
    config = dataclasses.replace(vit.config, num_registers=vit.num_registers + len(values), **changes)
    state = vit.state_dict()
    old = torch.zeros(1, 0, vit.config.embed_dim) if vit.registers is None else vit.registers
    weight = vit.patch_embed.weight
    parts = (old[:, :at], values.unsqueeze(0), old[:, at:])
    state["registers"] = torch.cat([part.detach().to(weight) for part in parts], dim=1)
    changed = build(config, state, "the model with registers").to(weight.device)
    for name, parameter in vit.named_parameters():
        changed.get_parameter(name).requires_grad_(parameter.requires_grad)
    changed.gradient_checkpointing = vit.gradient_checkpointing
    return changed.train(vit.training)


def unchanged(vit: VisionTransformer, reason: str) -> VisionTransformer:
    """A copy whose last of `config.changes` says why nothing was done to it."""
    same = copy.deepcopy(vit)
    same.config = dataclasses.replace(vit.config, changes=(*vit.config.changes, reason))
    return same


def is_changed(vit: VisionTransformer, fixed: VisionTransformer) -> bool:
    """Whether a fix did anything to the model."""
    if dataclasses.replace(fixed.config, changes=vit.config.changes) != vit.config:
        return True
    state = vit.state_dict()
    return any(not torch.equal(tensor, state[name]) for name, tensor in fixed.state_dict().items())


def destroyed(similarity: float, least: float = MIN_SIMILARITY) -> str:
    """Why a change was refused that loses the model's features."""
    return (
        f"It would destroy what the model is used for: the mean cosine of its pooled features with the original's is "
        f"{similarity:.2f}, less than {least}. Use --method test-time."
    )
