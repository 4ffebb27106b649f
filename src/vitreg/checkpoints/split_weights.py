"""A model's tensors in the parts in which other libraries store them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vitreg.checkpoints.state import CheckpointError
from vitreg.model import VisionTransformer


class Inexpressible(CheckpointError):
    """A format that has no place for a part of the model."""


def pieces_of(vit: VisionTransformer) -> dict[str, Tensor]:
    """Our tensors, and besides them queries, keys and values, and both parts of a gated MLP, each apart."""
    pieces = {key: tensor.detach() for key, tensor in vit.state_dict().items()}
    config = vit.config
    for block in (f"blocks.{i}." for i in range(config.depth)):
        for key in ("weight", "bias"):
            qkv, fc1 = pieces.get(f"{block}attn.qkv.{key}"), pieces.get(f"{block}mlp.fc1.{key}")
            if qkv is not None:
                q, k, v = qkv.chunk(3)
                if key == "bias" and not config.key_bias:
                    k = torch.zeros_like(k)
                    pieces[f"{block}attn.qkv.{key}"] = torch.cat((q, k, v))
                pieces |= {f"{block}attn.{name}.{key}": part for name, part in (("q", q), ("k", k), ("v", v))}
            if fc1 is not None:
                gate, up = fc1.chunk(2) if config.gated_mlp else (None, fc1)
                pieces[f"{block}mlp.up.{key}"] = up
                if gate is not None:
                    pieces[f"{block}mlp.gate.{key}"] = gate
    return pieces


def piece(pieces: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    """A piece; what the model does not have is filled with what changes nothing: no shift, a scale of one."""
    if key in pieces:
        return pieces[key].reshape(like.shape)
    is_scale = key.endswith((".ls1", ".ls2"))
    assert key.endswith(".bias") or is_scale, key
    dtype, device = pieces["patch_embed.weight"].dtype, pieces["patch_embed.weight"].device
    return torch.full(like.shape, float(is_scale), dtype=dtype, device=device)


def with_prefix(positions: Tensor, length: int) -> Tensor:
    """Zero positions for the tokens before the patches: theirs are inside the tokens already."""
    num_prefix = length - positions.shape[1]
    return torch.cat((positions.new_zeros(1, num_prefix, positions.shape[2]), positions), dim=1)
