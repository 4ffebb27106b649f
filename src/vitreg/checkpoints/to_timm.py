"""A model under timm's names, for timm's own classes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from vitreg.checkpoints.from_timm import POOLS, from_timm
from vitreg.checkpoints.state import CheckpointError, UnsupportedByFormat
from vitreg.checkpoints.weight_names import TIMM
from vitreg.checkpoints.weights import split, tensor_for
from vitreg.model import RopeConfig, VisionTransformer, ViTConfig

# What an architecture of another library need not match: free, or said elsewhere.
FREE = ("name", "architecture", "changes", "preprocess", "position_interpolation")


def to_timm_state(vit: VisionTransformer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under timm's names, and how timm builds the model for them.

    Returns:
        The state dict, and `{"architecture": name, "kwargs": {...}}`:
        `timm.create_model(name, **kwargs).load_state_dict(state, strict=True)` gives the same model.

    Raises:
        CheckpointError: timm has no class for a part of the model.
    """
    architecture, kwargs, empty = timm_architecture(vit.config)
    weights = split(vit)
    state = {key: tensor_for(weights, TIMM.ours(key) or key, like) for key, like in empty.state_dict().items()}
    return state, {"architecture": architecture, "kwargs": kwargs}


def timm_architecture(config: ViTConfig) -> tuple[str, dict[str, Any], nn.Module]:
    """The first architecture that reads back as this config, its keyword arguments, itself without memory."""
    import timm

    pools = {ours: theirs for theirs, ours in POOLS.items()} | {"token+attention": "map"}
    if config.pool not in pools:
        raise _unsupported(f"pool={config.pool!r}")
    generic = (
        "vit_base_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_base_patch16_clip_224",  # epsilon 1e-5
        "vit_giant_patch14_dinov2",  # SwiGLU
        "vit_pwee_patch16_reg1_gap_256",  # parallel blocks
        "vit_dwee_patch16_reg1_gap_256",  # differential attention
        "vit_dpwee_patch16_reg1_gap_256",  # both
        "aimv2_large_patch14_224",  # RMSNorm, also in the patch embedding
        "vit_base_patch16_xp_224",  # RMSNorm, parallel blocks
        "vit_base_patch16_rpn_224",  # norms after the branches
        "eva02_base_patch14_224",  # RoPE, norms inside attention and MLP
        "vit_small_patch16_dinov3",  # RoPE, epsilon 1e-5
    )
    nearest: list[list[str]] = []
    for name in dict.fromkeys((config.architecture, *generic)):
        if not timm.is_model(name):
            continue
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        if module not in ("vision_transformer", "deit", "eva"):
            continue  # the arguments below are those of these classes
        eva = module == "eva"
        if eva is not (config.rope is not None or config.mixed_rope) and name != config.architecture:
            continue
        kwargs = _shared_kwargs(config, pools[config.pool])
        kwargs |= _eva_kwargs(config) if eva else _vit_kwargs(config)
        try:
            with torch.device("meta"):
                empty = timm.create_model(name, **kwargs)
            different = differences(config, from_timm(empty).config)
        except (AssertionError, CheckpointError):  # timm refuses norms inside parallel blocks, we other attention pools
            continue
        if not different:
            return name, kwargs, empty
        nearest.append(different)
    raise _unsupported(", ".join(min(nearest, key=len, default=[f"pool={config.pool!r}"])))


def differences(ours: ViTConfig, theirs: ViTConfig, free: tuple[str, ...] = FREE) -> list[str]:
    """Fields in which an architecture cannot be what the config asks for, as `name=value`."""
    found = []
    for field in dataclasses.fields(ViTConfig):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name == "pool_heads":
            a, b = (c.pool_heads or c.num_heads if "attention" in c.pool else 0 for c in (ours, theirs))
        elif field.name == "pool_mlp_dim":
            a, b = (c.pool_mlp_dim or c.mlp_dim if "attention" in c.pool else 0 for c in (ours, theirs))
        elif field.name == "rope" and ours.rope and theirs.rope:
            a, b = ours.rope, snap(theirs.rope, ours.rope)
        elif field.name.endswith(("_bias", "layer_scale")) and not a:
            continue  # written as zeros, or ones, where the architecture has it
        elif (field.name == "key_bias" and not ours.qkv_bias) or (field.name == "head_bias" and not ours.num_classes):
            continue
        if a != b and field.name not in free:
            found.append(f"{field.name}={a!r}")
    return found


def snap(rope: RopeConfig, to: RopeConfig) -> RopeConfig:
    """The same, with the other's frequencies where they differ by rounding only."""
    pairs = zip(rope.frequencies, to.frequencies, strict=False)
    same = len(rope.frequencies) == len(to.frequencies) and all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)
    return dataclasses.replace(rope, frequencies=to.frequencies) if same else rope


def _ratio(config: ViTConfig, hidden: int = 0) -> float:
    """An MLP ratio that truncates to exactly so many hidden units, `mlp_dim` unless given."""
    hidden = hidden or config.mlp_dim
    ratio = hidden / config.embed_dim
    return ratio if int(config.embed_dim * ratio) == hidden else (hidden + 0.5) / config.embed_dim


def _shared_kwargs(config: ViTConfig, global_pool: str) -> dict[str, Any]:
    same = ("patch_size", "embed_dim", "depth", "num_heads", "num_classes", "class_token", "qkv_bias")
    kwargs = {name: getattr(config, name) for name in same} | {
        "img_size": list(config.image_size),
        "global_pool": global_pool,
        "init_values": 1e-5 if config.layer_scale else None,
        "no_embed_class": False,
        "dynamic_img_size": True,
    }
    return kwargs | ({"qk_norm": True} if config.qk_norm else {})


def _vit_kwargs(config: ViTConfig) -> dict[str, Any]:
    kwargs = {
        "reg_tokens": config.num_registers - config.num_summary_tokens,
        "mlp_ratio": _ratio(config) * (1 + (config.gated_mlp and not config.patch_norm)),  # AIMv2's counts one branch
        "proj_bias": config.proj_bias or config.mlp_bias,
        "pos_embed": "learn" if config.learned_positions else "none",
        "pre_norm": config.norm_pre,
        "final_norm": config.final_norm or config.fc_norm,
        "fc_norm": config.fc_norm,
        "act_layer": config.activation,
    }
    if config.pool == "token+attention":
        kwargs["pool_include_prefix"] = True
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
        "use_rot_pos_emb": config.rope is not None or config.mixed_rope,
        "use_pre_transformer_norm": config.norm_pre,
        "use_post_transformer_norm": config.final_norm,
        "use_fc_norm": config.fc_norm,
    }
    if "attention" in config.pool:
        kwargs["attn_pool_num_heads"] = config.pool_heads or config.num_heads
        kwargs["attn_pool_mlp_ratio"] = _ratio(config, config.pool_mlp_dim)
    if config.post_norm:
        kwargs["use_post_norm"] = True
    if config.qk_norm:  # of the same version of timm; Sapiens2 scales attention only, and groups queries
        kwargs |= {"attn_only_layer_scale": False, "num_kv_heads": config.num_heads}
    if config.mixed_rope:
        kwargs |= {"rope_type": "mixed", "rope_grid_indexing": "ij", "rope_rotate_half": False}
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


def _unsupported(what: str) -> UnsupportedByFormat:
    return UnsupportedByFormat(f"format 'timm' cannot express {what}; save with format='vitreg'")
