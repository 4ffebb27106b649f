"""A model as a folder that transformers' `from_pretrained` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitreg.checkpoints.from_transformers import ACTIVATIONS, canonical_name
from vitreg.checkpoints.hub import quiet_transformers
from vitreg.checkpoints.split_weights import Inexpressible, piece, pieces_of, with_prefix
from vitreg.checkpoints.state import CheckpointError
from vitreg.checkpoints.to_timm import snap, theta_of, timm_architecture
from vitreg.common.disk import replace_text, replacing
from vitreg.model import Preprocess, RopeConfig, VisionTransformer, ViTConfig


def to_transformers_folder(vit: VisionTransformer, folder: Path) -> None:
    """Write `config.json`, `model.safetensors` and, where there is one, `preprocessor_config.json`.

    Raises:
        CheckpointError: transformers is missing, or has no class for a part of the model.
    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError('this format needs transformers: pip install "vitreg[transformers]"') from error
    name, kwargs = _transformers_class(vit)
    kind = getattr(transformers, name)
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    with torch.device("meta"):  # weights follow; the random ones would take a minute for a giant model
        model = kind(kind.config_class(**kwargs), **options)
    pieces = _transformers_pieces(vit)
    state = {key: _transformers_tensor(pieces, key, like, vit.config) for key, like in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size="1TB")
    if name in ("CLIPVisionModel", "SiglipVisionModel"):
        _nest(folder / "model.safetensors")
    if (processor := _processor(vit.preprocess)) is not None:
        replace_text(folder / "preprocessor_config.json", json.dumps(processor, indent=2))


def _nest(file: Path) -> None:
    """Put the tower under `vision_model.`: transformers 4 looks only there, transformers 5 there as well."""
    state = {f"vision_model.{key.removeprefix('vision_model.')}": tensor for key, tensor in load_file(file).items()}
    with replacing(file) as temporary:
        save_file(state, temporary, {"format": "pt"})


def _transformers_pieces(vit: VisionTransformer) -> dict[str, Tensor]:
    config, pieces = vit.config, pieces_of(vit)
    for key in ("weight", "bias"):
        if config.fc_norm:
            pieces[f"norm.{key}"] = pieces[f"fc_norm.{key}"]
        if config.pool == "attention":
            parts = [pieces[f"attention_pool.{part}.{key}"] for part in ("q", "kv")]
            pieces[f"attention_pool.in_proj_{key}"] = torch.cat(parts)
    return pieces


def _transformers_tensor(pieces: Mapping[str, Tensor], key: str, like: Tensor, config: ViTConfig) -> Tensor:
    name = canonical_name(key)
    unused_pool = name is not None and name.startswith("attention_pool.") and name not in pieces
    if name is None or unused_pool or not like.numel():
        # The mask token of pretraining, the pool that SigLIP's classifier carries along, no registers.
        return pieces["patch_embed.weight"].new_zeros(like.shape)
    if name == "pos_embed":
        return with_prefix(pieces["pos_embed"], like.shape[-2]).reshape(like.shape)
    if name == "head.weight" and pieces[name].shape != like.shape:
        return _widened(pieces[name], like, config)
    return piece(pieces, name, like)


def _widened(head: Tensor, like: Tensor, config: ViTConfig) -> Tensor:
    """A head that reads the class token or the mean of the patches, for DINOv2's, which reads both."""
    nothing = head.new_zeros(like.shape[0], like.shape[1] - head.shape[1])
    return torch.cat((nothing, head) if config.pool == "mean" else (head, nothing), dim=1)


def _transformers_class(vit: VisionTransformer) -> tuple[str, dict[str, Any]]:
    """The class that expresses the model, and the arguments of its config."""
    c = vit.config

    def refuse(condition: bool, what: str) -> None:
        if condition:
            raise _inexpressible(c, what)

    refuse(c.parallel, "parallel blocks")
    refuse(c.differential, "differential attention")
    refuse(c.qk_norm or c.attention_norm or c.mlp_norm, "norms inside attention or MLP")
    refuse(c.grid[0] != c.grid[1], f"a position grid of {c.grid[0]} x {c.grid[1]}")
    acts = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    common = {
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "hidden_act": acts[c.activation],
        "layer_norm_eps": c.norm_eps,
        "image_size": c.image_size[0],
        "patch_size": c.patch_size,
    }
    wide = common | {"intermediate_size": c.mlp_dim}
    head = {"num_labels": c.num_classes} if c.num_classes else {}
    if c.rope is not None:
        return "DINOv3ViTModel", wide | _dinov3(c, refuse)
    refuse(not c.learned_positions, "no positions")
    if not c.class_token or c.norm_pre:
        refuse(c.num_registers > 0, "registers without DINOv2's class token and first norm")
        refuse(c.layer_scale or c.gated_mlp, "LayerScale or a gated MLP in CLIP or SigLIP")
    if not c.class_token:
        refuse(not c.final_norm or c.fc_norm or c.norm_pre, "SigLIP with other norms")
        refuse(c.pool == "attention" and bool(head), "a head after the attention pool")
        refuse(c.pool_heads not in (0, c.num_heads), "an attention pool with other heads")
        if head:
            return "SiglipForImageClassification", {"vision_config": wide, **head}
        return "SiglipVisionModel", wide | {"vision_use_head": c.pool == "attention"}
    if c.norm_pre:
        refuse(c.pool != "token" or c.final_norm == c.fc_norm, "CLIP with another pool")
        refuse(c.patch_bias, "CLIP with a bias of its patches")
        bias = None if vit.head is None else vit.head.bias
        refuse(bias is not None and bool(bias.any()), "CLIP with a bias of its projection")
        projection = {"projection_dim": c.num_classes} if head else {}
        return ("CLIPVisionModelWithProjection" if head else "CLIPVisionModel"), wide | projection
    refuse(not c.final_norm or c.fc_norm, "a norm after pooling")
    refuse(c.pool == "attention", "an attention pool beside a class token")
    bias = {"qkv_bias": c.qkv_bias}
    if not (c.num_registers or c.layer_scale or c.gated_mlp) and (not head or c.pool == "token"):
        return ("ViTForImageClassification" if head else "ViTModel"), wide | bias | head
    family = "Dinov2WithRegisters" if c.num_registers else "Dinov2"
    registers = {"num_register_tokens": c.num_registers} if c.num_registers else {}
    mlp = {"mlp_ratio": _dinov2_ratio(c, refuse), "use_swiglu_ffn": c.gated_mlp}
    return f"{family}{'ForImageClassification' if head else 'Model'}", common | bias | head | registers | mlp


def _dinov2_ratio(c: ViTConfig, refuse: Any) -> int:
    if not c.gated_mlp:
        refuse(c.mlp_dim % c.embed_dim != 0, f"an MLP of {c.mlp_dim} units on {c.embed_dim} channels")
        return c.mlp_dim // c.embed_dim
    refuse(c.activation != "silu", f"a gated MLP with {c.activation}")
    for ratio in range(1, 17):  # transformers keeps two thirds, rounded up to a multiple of 8
        if (int(c.embed_dim * ratio * 2 / 3) + 7) // 8 * 8 == c.mlp_dim:
            return ratio
    raise _inexpressible(c, f"a gated MLP of {c.mlp_dim} units on {c.embed_dim} channels")


def _dinov3(c: ViTConfig, refuse: Any) -> dict[str, Any]:
    rope = c.rope
    assert rope is not None
    theta, num = theta_of(rope), len(rope.frequencies)
    plain = RopeConfig(tuple(2 * math.pi / theta ** (j / num) for j in range(num)))
    refuse(snap(plain, rope) != rope, "RoPE other than DINOv3's")
    refuse(c.learned_positions, "RoPE and learned positions")
    refuse(
        not c.class_token or c.norm_pre or c.fc_norm or not c.final_norm,
        "DINOv3 with other norms or tokens",
    )
    refuse(c.num_classes > 0, "a head on DINOv3")
    return {
        "rope_theta": theta,
        "query_bias": c.qkv_bias,
        "value_bias": c.qkv_bias,
        "key_bias": c.qkv_bias and c.key_bias,
        "proj_bias": c.proj_bias,
        "mlp_bias": c.mlp_bias,
        "use_gated_mlp": c.gated_mlp,
        "num_register_tokens": c.num_registers,
    }


def _processor(preprocess: Preprocess) -> dict[str, Any] | None:
    """A `preprocessor_config.json`; None where transformers has no processor that does the same."""
    (height, width), fraction = preprocess.size, preprocess.crop_pct
    if preprocess.crop == "border" or (preprocess.crop != "squash" and height != width):
        return None
    full = [math.floor(side / fraction) for side in (height, width)]
    size = {"height": full[0], "width": full[1]} if preprocess.crop == "squash" else {"shortest_edge": full[0]}
    crop = fraction < 1 or preprocess.crop == "center"
    return {
        "image_processor_type": "CLIPImageProcessor",  # the one that can crop or not, squash or not
        "do_resize": True,
        "size": size,
        "resample": {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[preprocess.interpolation],
        "do_center_crop": crop and preprocess.crop != "none",
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def _inexpressible(config: ViTConfig, what: str) -> Inexpressible:
    others = "'vitreg' or 'timm'"
    try:
        timm_architecture(config)
    except Inexpressible:
        others = "'vitreg'"
    return Inexpressible(f"format 'transformers' cannot express {what}; save with format={others}")
