"""A model under timm's names, for timm's own classes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitreg.checkpoints.from_timm import from_timm
from vitreg.checkpoints.split_weights import Inexpressible, piece, pieces_of, with_prefix
from vitreg.model import RopeConfig, VisionTransformer, ViTConfig

# What a timm architecture need not match: free, or said elsewhere.
_FREE = ("depth", "name", "architecture", "changes", "preprocess", "position_interpolation")


def to_timm_state(vit: VisionTransformer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under timm's names, and how timm builds the model for them.

    Returns:
        The state dict, and `{"architecture": name, "kwargs": {...}}`:
        `timm.create_model(name, **kwargs).load_state_dict(state, strict=True)` gives the same model.

    Raises:
        CheckpointError: timm has no class for a part of the model.
    """
    architecture, kwargs, probe = timm_architecture(vit.config)
    pieces = pieces_of(vit)
    state = {}
    for key, like in probe.state_dict().items():
        if not key.startswith("blocks."):
            state[key] = _timm_tensor(pieces, "", key, like)
            continue
        for i in range(vit.config.depth):
            rest = key.removeprefix("blocks.0.")
            state[f"blocks.{i}.{rest}"] = _timm_tensor(pieces, f"blocks.{i}.", rest, like)
    return state, {"architecture": architecture, "kwargs": kwargs}


_TIMM_NAMES = {
    "reg_token": "registers",
    "patch_embed.proj": "patch_embed",
    "ls1.gamma": "ls1",
    "ls2.gamma": "ls2",
    "ls.gamma": "ls1",
    "gamma_1": "ls1",
    "gamma_2": "ls2",
    "attn.q_proj": "attn.q",
    "attn.k_proj": "attn.k",
    "attn.v_proj": "attn.v",
    "attn.q_bias": "attn.q.bias",
    "attn.v_bias": "attn.v.bias",
    "mlp.fc1_g": "mlp.gate",
    "mlp.fc1_x": "mlp.up",
    "in_norm": "norm1",
    "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm",
    "attn_out_proj": "attn.proj",
    "mlp_out_proj": "mlp.fc2",
    "mlp_bias": "mlp.fc1.bias",
    "sub_norm": "attn.sub_norm",
    **{vector: f"attn.{vector}" for vector in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")},
}


def _timm_tensor(pieces: Mapping[str, Tensor], block: str, key: str, like: Tensor) -> Tensor:
    if key == "pos_embed":
        return with_prefix(pieces["pos_embed"], like.shape[1])
    name, _, kind = key.rpartition(".")
    if name == "in_proj":  # the parallel block's first layer: MLP and attention together
        return torch.cat((pieces[f"{block}mlp.fc1.{kind}"], pieces[f"{block}attn.qkv.{kind}"]))
    if name == "out_proj":  # and its last, in timm's parallel block with differential attention
        if kind == "bias":
            return piece(pieces, f"{block}attn.proj.bias", like) + piece(pieces, f"{block}mlp.fc2.bias", like)
        return torch.cat((pieces[f"{block}attn.proj.weight"], pieces[f"{block}mlp.fc2.weight"]), dim=1)
    if not block and key.startswith("attn_pool."):
        return pieces["attention_pool." + key.removeprefix("attn_pool.")]
    return piece(pieces, block + _TIMM_NAMES.get(key, f"{_TIMM_NAMES.get(name, name)}.{kind}" if name else key), like)


def timm_architecture(config: ViTConfig) -> tuple[str, dict[str, Any], nn.Module]:
    """The first architecture that reads back as this config, its keyword arguments, one block of it."""
    import timm

    pools = {"token": "token", "mean": "avg", "attention": "map"}
    if config.pool not in pools:
        raise _inexpressible(f"pool={config.pool!r}")
    generic = (
        "vit_base_patch16_224",
        "vit_base_patch16_clip_224",  # epsilon 1e-5
        "vit_giant_patch14_dinov2",  # SwiGLU
        "vit_pwee_patch16_reg1_gap_256",  # parallel blocks
        "vit_dwee_patch16_reg1_gap_256",  # differential attention
        "vit_dpwee_patch16_reg1_gap_256",  # both
        "eva02_base_patch14_224",  # RoPE, norms inside attention and MLP
        "vit_small_patch16_dinov3",  # RoPE, epsilon 1e-5
    )
    differences: list[list[str]] = []
    for name in dict.fromkeys((config.architecture, *generic)):
        if not timm.is_model(name):
            continue
        eva = timm.models.model_entrypoint(name).__module__.endswith(".eva")
        if eva is not (config.rope is not None) and name != config.architecture:
            continue
        kwargs = _shared_kwargs(config, pools[config.pool])
        kwargs |= _eva_kwargs(config) if eva else _vit_kwargs(config)
        try:
            probe = timm.create_model(name, **{**kwargs, "depth": 1})
        except AssertionError:  # timm's parallel blocks refuse norms inside attention and MLP
            continue
        different = _differences(config, from_timm(probe).config)
        if not different:
            return name, kwargs, probe
        differences.append(different)
    raise _inexpressible(", ".join(min(differences, key=len)))


def _differences(ours: ViTConfig, theirs: ViTConfig) -> list[str]:
    """Fields in which an architecture cannot be what the config asks for, as `name=value`."""
    found = []
    for field in dataclasses.fields(ViTConfig):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name == "pool_heads":
            a, b = (c.pool_heads or c.num_heads if c.pool == "attention" else 0 for c in (ours, theirs))
        elif field.name == "rope" and ours.rope and theirs.rope:
            a, b = ours.rope, snap(theirs.rope, ours.rope)
        elif field.name.endswith(("_bias", "layer_scale")) and not a:
            continue  # written as zeros, or ones, where the architecture has it
        elif (field.name == "key_bias" and not ours.qkv_bias) or (field.name == "head_bias" and not ours.num_classes):
            continue
        if a != b and field.name not in _FREE:
            found.append(f"{field.name}={a!r}")
    return found


def snap(rope: RopeConfig, to: RopeConfig) -> RopeConfig:
    """The same, with the other's frequencies where they differ by rounding only."""
    pairs = zip(rope.frequencies, to.frequencies, strict=False)
    same = len(rope.frequencies) == len(to.frequencies) and all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)
    return dataclasses.replace(rope, frequencies=to.frequencies) if same else rope


def _ratio(config: ViTConfig) -> float:
    """An MLP ratio that truncates to exactly `mlp_dim`."""
    ratio = config.mlp_dim / config.embed_dim
    return ratio if int(config.embed_dim * ratio) == config.mlp_dim else (config.mlp_dim + 0.5) / config.embed_dim


def _shared_kwargs(config: ViTConfig, global_pool: str) -> dict[str, Any]:
    kwargs = {
        "img_size": list(config.image_size),
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "num_classes": config.num_classes,
        "global_pool": global_pool,
        "class_token": config.class_token,
        "qkv_bias": config.qkv_bias,
        "init_values": 1e-5 if config.layer_scale else None,
        "no_embed_class": False,
        "dynamic_img_size": True,
    }
    return kwargs | ({"qk_norm": True} if config.qk_norm else {})


def _vit_kwargs(config: ViTConfig) -> dict[str, Any]:
    kwargs = {
        "reg_tokens": config.num_registers,
        "mlp_ratio": _ratio(config) * (1 + config.gated_mlp),
        "proj_bias": config.proj_bias or config.mlp_bias,
        "pos_embed": "learn" if config.learned_positions else "none",
        "pre_norm": config.norm_pre,
        "final_norm": config.final_norm or config.fc_norm,
        "fc_norm": config.fc_norm,
        "act_layer": config.activation,
    }
    norms = {"scale_attn_norm": config.attention_norm, "scale_mlp_norm": config.mlp_norm}
    return kwargs | {key: True for key, wanted in norms.items() if wanted}


def _eva_kwargs(config: ViTConfig) -> dict[str, Any]:
    kwargs = {
        "num_reg_tokens": config.num_registers,
        "mlp_ratio": _ratio(config),
        "swiglu_mlp": config.gated_mlp,
        "swiglu_align_to": 0,
        "scale_mlp": config.mlp_norm,
        "scale_attn_inner": config.attention_norm,
        # timm's EVA attention has no bias on keys.
        "attn_type": "rope" if config.qkv_bias and config.key_bias else "eva",
        "qkv_fused": True,
        "use_abs_pos_emb": config.learned_positions,
        "use_rot_pos_emb": config.rope is not None,
        "use_pre_transformer_norm": config.norm_pre,
        "use_post_transformer_norm": config.final_norm,
        "use_fc_norm": config.fc_norm,
    }
    if config.rope is not None:
        rope = config.rope
        kwargs |= {
            "rope_type": "dinov3" if rope.coordinates == "centered" else "cat",
            "rope_temperature": theta_of(rope),
            "rope_grid_offset": rope.offset,
            "rope_grid_indexing": "xy" if rope.swap_axes else "ij",
            "rope_rotate_half": not rope.interleaved,
            "ref_feat_shape": rope.reference_grid and list(rope.reference_grid),
        }
    return kwargs


def theta_of(rope: RopeConfig) -> float:
    """The base of geometric frequencies `scale * theta^(-j / n)`."""
    num = len(rope.frequencies)
    return round((rope.frequencies[0] / rope.frequencies[1]) ** num, 3) if num > 1 else 100.0


def _inexpressible(what: str) -> Inexpressible:
    return Inexpressible(f"format 'timm' cannot express {what}; save with format='vitreg'")
