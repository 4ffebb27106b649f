"""What modules of transformers compute with their weights, written as the weights with which ours compute the same.

Each takes the module and its weights under our names, which it changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitreg.checkpoints.state import check_supported
from vitreg.checkpoints.weights import KINDS
from vitreg.model.pos_embed import sincos_positions

Weights = dict[str, Tensor]


def class_tokens(tower: Any, weights: Weights) -> None:
    """Of several class tokens, those after the first stand first among the registers."""
    tokens = weights["cls_token"].reshape(1, -1, tower.config.hidden_size)
    weights["cls_token"], weights["registers"] = tokens[:, :1], tokens[:, 1:]


def radio(tower: Any, weights: Weights) -> None:
    """Patches are (channel, row, column) in a linear layer; the normalization of images goes into it."""
    chosen = list(tower.config.summary_idxs)
    check_supported(chosen == list(range(len(chosen))), f"a summary of tokens {chosen}")
    class_tokens(tower, weights)
    _convolution(tower, weights)
    patch = weights["patch_embed.weight"]
    if (std := getattr(tower.input_conditioner, "norm_std", None)) is not None:  # else users normalize
        mean, std = tower.input_conditioner.norm_mean.double(), std.double()
        folded = patch.double() / std
        weights["patch_embed.bias"] = -(folded * mean).sum((1, 2, 3)).to(patch)
        weights["patch_embed.weight"] = folded.to(patch)


def llama4(tower: Any, weights: Weights) -> None:
    """The class token is the last of the sequence."""
    _convolution(tower, weights)
    weights["pos_embed"] = weights["pos_embed"].roll(1, 0)


def yolos(tower: Any, weights: Weights) -> None:
    """Detection tokens are the last of the sequence."""
    check_supported(not tower.config.use_mid_position_embeddings, "positions between its blocks")
    cls, patches, detection = weights["pos_embed"].tensor_split([1, -tower.config.num_detection_tokens], dim=1)
    weights["pos_embed"] = torch.cat([cls, detection, patches], dim=1)


def vitpose(tower: Any, weights: Weights) -> None:
    """The position of a class token that is not there is added to every patch."""
    check_supported(tower.config.num_experts == 1, "a mixture of experts")
    weights["pos_embed"] = weights["pos_embed"][:, 1:] + weights["pos_embed"][:, :1]


def beit(tower: Any, _: Weights) -> None:
    """Refuses tables of positions, which nobody released, and two biases at once."""
    config = tower.config
    check_supported(not config.use_absolute_position_embeddings, "positions besides a bias on attention")
    both = config.use_relative_position_bias and config.use_shared_relative_position_bias
    check_supported(not both, "two biases on attention")


def internvl(tower: Any, _: Weights) -> None:
    """Norms of queries and keys are over all heads together."""
    check_supported(not tower.config.use_qk_norm, "a norm of queries and keys over all heads")


def aimv2(tower: Any, weights: Weights) -> None:
    """Its attention pool asks with a token as it is."""
    hf = getattr(tower.config, "vision_config", None) or tower.config
    patch = weights["patch_embed.weight"]
    if hf.is_native:
        side = hf.image_size // hf.patch_size
        weights["pos_embed"] = sincos_positions((side, side), hf.hidden_size).to(patch)
    if (query := weights.pop("attention_pool.cls_token", None)) is None:
        return
    dim, bias = hf.hidden_size, patch.new_zeros(hf.hidden_size)
    pool = {"latent": query, "q.weight": torch.eye(dim).to(patch), "q.bias": bias}
    for kind in KINDS:
        parts = [weights.pop(f"attention_pool.{part}_proj.{kind}", bias) for part in "kv"]
        pool |= {f"kv.{kind}": torch.cat(parts), f"proj.{kind}": weights.pop(f"attention_pool.output_proj.{kind}")}
    weights |= {f"attention_pool.{key}": weight for key, weight in pool.items()}


def _convolution(tower: Any, weights: Weights) -> None:
    side = tower.config.patch_size
    weights["patch_embed.weight"] = weights["patch_embed.weight"].unflatten(1, (-1, side, side))
