"""Weights as our model holds them and as other libraries do, which keep apart what we fuse or fuse what we keep apart.

Besides our own names, weights may have those of parts, `attn.q`, `attn.k` and `attn.v` of `attn.qkv`, `mlp.gate` and
`mlp.up` of a gated `mlp.fc1`, `head_dist` of a head that reads two tokens, and of fusions: `attention_pool.in_proj`
(its `q` and `kv`) and, in the parallel block of timm, `in_proj` (`mlp.fc1` and `attn.qkv`) and `out_proj` (`attn.proj`
and `mlp.fc2`, whose biases are added).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitreg.model import VisionTransformer, ViTConfig

KINDS = ("weight", "bias")
PARTS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "in_proj", "out_proj")

# A field of ViTConfig is true where the model has this weight.
PRESENT = {
    "class_token": "cls_token",
    "head_bias": "head.bias",
    "final_norm": "norm.weight",
    "fc_norm": "fc_norm.weight",
    "patch_norm": "patch_norm.weight",
    "norm_pre": "norm_pre.weight",
    "patch_bias": "patch_embed.bias",
    "qkv_bias": "blocks.0.attn.qkv.bias",
    "proj_bias": "blocks.0.attn.proj.bias",
    "mlp_bias": "blocks.0.mlp.fc2.bias",
    "differential": "blocks.0.attn.lambda_q1",
    "qk_norm": "blocks.0.attn.q_norm.weight",
    "attention_norm": "blocks.0.attn.norm.weight",
    "mlp_norm": "blocks.0.mlp.norm.weight",
    "layer_scale": "blocks.0.ls1",
    "learned_positions": "pos_embed",
    "mixed_rope": "rope_frequencies",
}

REL_POS = {"table": "blocks.0.attn.rel_pos.table", "mlp": "blocks.0.attn.rel_pos.fc1.weight"}


def config_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `ViTConfig` that names and shapes of the weights tell."""
    patch, fc2, fc1 = (state[f"{name}.weight"] for name in ("patch_embed", "blocks.0.mlp.fc2", "blocks.0.mlp.fc1"))
    latent, pool = state.get("attention_pool.latent"), state.get("attention_pool.mlp.fc2.weight")
    return {
        "embed_dim": patch.shape[0],
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "mlp_dim": fc2.shape[1],
        "gated_mlp": fc1.shape[0] != fc2.shape[1],
        "rms_norm": "blocks.0.norm1.bias" not in state,
        "parallel": "blocks.0.norm2.weight" not in state,
        "patch_size": patch.shape[-1],
        "num_registers": state["registers"].shape[1] if "registers" in state else 0,
        "rel_pos": next((kind for kind, name in REL_POS.items() if name in state), None),
        "rel_pos_dim": state[REL_POS["mlp"]].shape[0] if REL_POS["mlp"] in state else 0,
        "pool_dim": latent.shape[-1] if latent is not None and pool is None else 0,
        "pool_mlp_dim": 0 if pool is None or pool.shape[1] == fc2.shape[1] else pool.shape[1],
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        **{field: name in state for field, name in PRESENT.items()},
    }


def join(weights: Mapping[str, Tensor], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """The state dict of our model.

    Positions of tokens before the patches are constants added to learned tokens: they move into the tokens.
    """
    state = dict(weights)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.") and "*" not in name)
    for name in [name for name in state if name.startswith("blocks.*.")]:  # shared: each block gets its own
        shared = state.pop(name)
        state |= {name.replace("*", str(i)): shared for i in range(depth)}
    patch = state["patch_embed.weight"]
    if patch.ndim == 2:  # SigLIP 2 NaFlex flattens a patch as (row, column, channel) (`convert_image_to_patches`)
        side = math.isqrt(patch.shape[1] // 3)
        state["patch_embed.weight"] = patch = patch.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    if "registers" in state and not state["registers"].shape[1]:
        del state["registers"]
    if "pos_embed" in state:
        positions = state["pos_embed"].reshape(1, -1, len(patch))
        before = positions.shape[1] - math.prod(side // patch.shape[-1] for side in image_size)
        for token in ("cls_token", "registers"):
            if token in state and before >= (length := state[token].shape[1]):
                state[token] = state[token] + positions[:, :length]
                positions, before = positions[:, length:], before - length
        state["pos_embed"] = positions
    if "head_dist.weight" in state:  # the mean of what two heads say of a token each is what one says of both
        state["head.weight"] = torch.cat([state["head.weight"], state.pop("head_dist.weight")], dim=1) / 2
        state["head.bias"] = (state["head.bias"] + state.pop("head_dist.bias")) / 2
    for kind in KINDS:
        if (fused := state.pop(f"attention_pool.in_proj.{kind}", None)) is not None:
            state[f"attention_pool.q.{kind}"], state[f"attention_pool.kv.{kind}"] = fused.tensor_split([len(patch)])
    for block in {".".join(name.split(".")[:2]) for name in state if name.startswith("blocks.")}:
        for kind in KINDS:
            _join_block(state, block, kind, len(patch))
    return state


def _join_block(state: dict[str, Tensor], block: str, kind: str, dim: int) -> None:
    q, k, v, gate, up, in_proj, out_proj = (state.pop(f"{block}.{part}.{kind}", None) for part in PARTS)
    joined: dict[str, Tensor] = {}
    if given := [part for part in (q, k, v) if part is not None]:
        joined["attn.qkv"] = torch.cat([torch.zeros_like(given[0]) if part is None else part for part in (q, k, v)])
    if up is not None:
        joined["mlp.fc1"] = up if gate is None else torch.cat((gate, up))
    if in_proj is not None:
        joined["mlp.fc1"], joined["attn.qkv"] = in_proj.tensor_split([-3 * dim])
    if out_proj is not None and kind == "weight":
        joined["attn.proj"], joined["mlp.fc2"] = out_proj.tensor_split([dim], dim=1)
    elif out_proj is not None:
        joined["attn.proj"] = out_proj
    state |= {f"{block}.{name}.{kind}": tensor for name, tensor in joined.items()}
    if (bias := state.get(f"{block}.mlp.fc1.bias")) is not None:  # a parallel block may have no second one
        state.setdefault(f"{block}.mlp.fc2.bias", bias.new_zeros(dim))


def split(vit: VisionTransformer) -> dict[str, Tensor]:
    """Our weights, and besides them their parts and fusions; the inverse of `join`."""
    config = vit.config
    weights = {name: tensor.detach() for name, tensor in vit.state_dict().items()}
    if config.num_summary_tokens == 1 and config.num_classes:  # a head for each of both tokens, whose mean is taken
        weights["head.weight"], weights["head_dist.weight"] = (2 * weights["head.weight"]).chunk(2, dim=1)
        if config.head_bias:
            weights["head_dist.bias"] = weights["head.bias"].clone()
    for kind in KINDS:
        if "attention" in config.pool and not config.pool_dim:
            pool = [weights[f"attention_pool.{part}.{kind}"] for part in ("q", "kv")]
            weights[f"attention_pool.in_proj.{kind}"] = torch.cat(pool)
        for i in range(config.depth):
            parts = _split_block(weights, f"blocks.{i}", kind, config)
            weights |= {f"blocks.{i}.{name}.{kind}": tensor for name, tensor in parts.items()}
    return weights


def _split_block(weights: Mapping[str, Tensor], block: str, kind: str, config: ViTConfig) -> dict[str, Tensor]:
    layers = ("attn.qkv", "mlp.fc1", "attn.proj", "mlp.fc2")
    qkv, fc1, proj, fc2 = (weights.get(f"{block}.{name}.{kind}") for name in layers)
    parts: dict[str, Tensor] = {}
    if qkv is not None:
        q, k, v = qkv.chunk(3)
        if kind == "bias" and not config.key_bias:  # it is masked
            k = torch.zeros_like(k)
            qkv = torch.cat((q, k, v))
        parts |= {"attn.q": q, "attn.k": k, "attn.v": v, "attn.qkv": qkv}
    if fc1 is not None and config.gated_mlp:
        parts["mlp.gate"], parts["mlp.up"] = fc1.chunk(2)
    elif fc1 is not None:
        parts["mlp.up"] = fc1
    if config.parallel:
        if qkv is not None:
            parts["in_proj"] = torch.cat((qkv.new_zeros(config.mlp_dim) if fc1 is None else fc1, qkv))
        outputs = [output for output in (proj, fc2) if output is not None]
        if outputs:
            parts["out_proj"] = torch.cat(outputs, dim=1) if kind == "weight" else torch.stack(outputs).sum(0)
    return parts


def tensor_for(weights: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """What a parameter of another library holds; what the model does not have changes nothing there.

    Args:
        weights: of `split`.
        name: of the parameter, translated.
        like: the parameter.
    """
    if name == "pos_embed":  # zeros for the tokens before the patches, whose positions are inside them
        positions = weights[name]
        before = like.shape[-2] - positions.shape[1]
        return torch.cat((positions.new_zeros(1, before, positions.shape[2]), positions), dim=1).reshape(like.shape)
    if name in weights:
        return weights[name].reshape(like.shape)
    is_scale = name.endswith((".ls1", ".ls2"))
    assert is_scale or name.endswith(".bias"), name
    return weights["patch_embed.weight"].new_full(like.shape, float(is_scale))
