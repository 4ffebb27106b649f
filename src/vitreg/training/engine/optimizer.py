"""Parameter groups, optimizers and their schedules."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from vitreg.model import VisionTransformer
from vitreg.training.engine.config import OptimizerConfig

# Tokens, positions and pooling queries are two- or three-dimensional, yet no matrices that a decay would regularize.
NEVER_DECAYED = ("cls_token", "registers", "pos_embed", "rope_frequencies", "latent", "positional_embedding")


def parameter_groups(method: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Groups with their own weight decay and learning-rate factor (`lr_scale`, as in timm).

    No decay for registers, class token, position embedding, norms, biases, LayerScale: whatever is one-dimensional or a
    token. (timm decayed registers and gave them the learning rate of the last layer until 1.0.28: timm #2712.) With
    layer-wise decay, everything before the first block, registers too, has the rate of layer 0; block i that of layer
    i + 1, and what follows the blocks the full rate (BEiT, arXiv 2106.08254).

    Args:
        method: with any number of `VisionTransformer`s inside it, in each of which layers are counted.
        config: weight decay and layer decay.
    """
    vits = {name: module for name, module in method.named_modules() if isinstance(module, VisionTransformer)}
    groups: dict[tuple[bool, float], dict] = {}
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = 1.0
        for prefix, vit in vits.items():
            if name.startswith(f"{prefix}." if prefix else ""):
                factor = config.layer_decay ** _layers_after(name.removeprefix(f"{prefix}."), vit.config.depth)
        decays = parameter.ndim > 1 and not name.endswith(NEVER_DECAYED)
        group = groups.setdefault((decays, factor), {"params": [], "names": [], "lr_scale": factor, "decays": decays})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _layers_after(name: str, depth: int) -> int:
    """Of a Vision Transformer's parameter: `depth - i` for block i, one more for the embedding, 0 for the rest."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return depth - int(block[1])
    embedding = ("patch_embed", "cls_token", "registers", "pos_embed", "patch_norm", "norm_pre")
    return depth + 1 if name.startswith(embedding) else 0


def build_optimizer(method: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, or timm's LAMB; gradients are clipped by the engine, for both in the same way.

    LAMB adapts the rate of decayed tensors only, so registers and LayerScale follow plain Adam.
    """
    groups = parameter_groups(method, config)
    betas = (0.9, config.beta2)
    if config.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
    from timm.optim.lamb import Lamb

    return Lamb(groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, max_grad_norm=None)


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Of step `step` (from 0): linear from 1e-6 to the peak, then half a cosine to the final one."""
    if step < config.warmup_steps:
        return 1e-6 + (config.lr - 1e-6) * step / config.warmup_steps
    return _cosine(config.lr, config.final_lr, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))


def set_schedules(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Put the step's learning rate and weight decay into the groups; returns the rate before the layers' factors."""
    rate, decay = learning_rate(config, step, num_steps), config.weight_decay
    if config.final_weight_decay is not None:
        decay = _cosine(decay, config.final_weight_decay, step / num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
        group["weight_decay"] = decay if group["decays"] else 0.0
    return rate


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
