"""What the parity tests share: tiny models whose every parameter counts, and one measure of error."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn

from vitreg import Tokens

TINY = dict(depth=2, embed_dim=96, num_heads=3, num_classes=7)
FIXED_SIZE = ("beit", "vision_transformer_relpos")
"""Modules of timm whose models take images of one size, which is changed by `set_input_size`."""
TOLERANCE = 1e-5
"""Relative error in float32 between two orders of the same sums."""


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter away from its initial value, so that none can be lost or swapped unnoticed.

    Zero biases, unit norms, LayerScale of 1e-5 and equal registers would hide each other. Matrices keep a
    gain of about one, so that the softmax stays smooth and float32 errors small.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.ndim > 1 and "token" not in name and "pos" not in name and "latent" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.3 * noise)
    return model.eval()


def timm_model(architecture: str, *, seed: int = 0, **options: Any) -> Any:
    """A tiny, perturbed timm model that takes any image size."""
    module = timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2]
    any_size = {} if module in (*FIXED_SIZE, "naflexvit") else {"dynamic_img_size": True}
    return perturb(timm.create_model(architecture, **{**TINY, **any_size, **options}), seed)


def at_size(model: Any, images: Tensor) -> Any:
    """The model, or a copy for the images' size where it has but one."""
    if type(model).__module__.rpartition(".")[2] not in FIXED_SIZE:
        return model
    model = copy.deepcopy(model)
    model.set_input_size(tuple(images.shape[-2:]))
    return model


def random_images(height: int, width: int | None = None, batch: int = 2, seed: int = 1) -> Tensor:
    """A normalized batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width or height, generator=generator)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def split(sequence: Tensor, model: Any) -> tuple[Tensor | None, Tensor, Tensor]:
    """Class token, registers and patches of a timm sequence, by timm's own counts."""
    prefix = model.num_prefix_tokens
    first = 0 if getattr(model, "embeds", model).cls_token is None else 1
    return sequence[:, 0] if first else None, sequence[:, first:prefix], sequence[:, prefix:]


def token_errors(tokens: Tokens, sequence: Tensor, model: Any) -> dict[str, float]:
    """Error of every named part against a timm sequence."""
    cls, registers, patches = split(sequence, model)
    assert (tokens.cls is None) == (cls is None)
    errors = {"patches": error(tokens.patches, patches)}
    if cls is not None:
        errors["cls"] = error(tokens.cls, cls)
    assert tokens.registers.shape == registers.shape
    if registers.shape[1]:
        errors["registers"] = error(tokens.registers, registers)
    return errors


@torch.no_grad()
def errors(vit: Any, model: Any, images: Tensor) -> dict[str, float]:
    """Error of everything that a timm model returns: every kind of token, pooled feature, logits."""
    model = at_size(model, images)
    tokens, sequence = vit(images), model.forward_features(images)
    found = token_errors(tokens, sequence, model)
    pooled = vit.pool(tokens)
    if vit.config.num_summary_tokens:  # timm's is the mean, although each has a head of its own
        pooled = pooled.unflatten(-1, (-1, vit.config.embed_dim)).mean(1)
    found["pooled"] = error(pooled, model.forward_head(sequence, pre_logits=True))
    if vit.head is not None:
        found["logits"] = error(vit.classify(images), model.forward_head(sequence))
    return found


@contextmanager
def attention_inputs() -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Queries, keys and values of every fused attention that runs inside, whoever calls it."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((q, k, v))
        return fused(q, k, v, *args, **kwargs)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", spy):
        yield seen


@torch.no_grad()
def unfused_attention(model: Any, images: Tensor) -> Tensor:
    """`[L, B, H, T, T]`: the softmax that timm's own unfused attention computes, or the difference of two."""
    maps: list[Tensor] = []
    hooks = []
    for block in model.blocks:
        attention = getattr(block, "attn", block)  # the parallel block is its own attention
        attention.fused_attn = False
        hooks.append(attention.attn_drop.register_forward_hook(lambda _m, _i, output: maps.append(output)))
    model(images)
    for i, (block, hook) in enumerate(zip(model.blocks, hooks, strict=True)):
        attention = getattr(block, "attn", block)
        attention.fused_attn = True
        hook.remove()
        if hasattr(attention, "lambda_q1"):
            signal, noise = maps[i].unflatten(1, (-1, 2)).unbind(2)
            maps[i] = signal - attention._compute_lambda() * noise
    return torch.stack(maps)
