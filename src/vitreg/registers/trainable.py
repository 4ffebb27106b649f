"""Registers to be trained, for a model that was trained without, or with fewer."""

from __future__ import annotations

import torch
from torch import nn

from vitreg.checkpoints import from_module
from vitreg.common.words import counted
from vitreg.model import REGISTER_STD, VisionTransformer
from vitreg.registers.insertion import with_registers


def add_registers(vit: VisionTransformer | nn.Module, count: int = 4, *, seed: int = 0) -> VisionTransformer:
    """A copy of a model with more registers, to be trained further; the original is left untouched.

    The new registers start from small distinct random values and have no position embedding ("Vision Transformers Need
    Registers", section 3). Until it is trained the copy gives slightly other features, because its tokens attend to
    registers that they have never met.

    Args:
        vit: the model, as for `diagnose`; the new registers come after those it was trained with.
        count: how many; 4 in the paper.
        seed: of the random values.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; add at least 1 register")
    vit = from_module(vit)
    config = vit.config
    trained = config.num_registers - config.num_test_time_registers
    values = torch.randn(count, config.embed_dim, generator=torch.Generator().manual_seed(seed)) * REGISTER_STD
    said = f"{counted(count, 'trainable register')} added to the {trained} it had, random (seed {seed})."
    return with_registers(vit, values, trained, changes=(*config.changes, said))
