"""A copy of a model with registers put in."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.checkpoints.state import build
from vitreg.model import VisionTransformer


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
