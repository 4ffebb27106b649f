"""transformers' Vision Transformers, read off a module instance."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitreg.checkpoints.state import CheckpointError, build, reading, require
from vitreg.model import PositionInterpolation, Preprocess, RopeConfig, VisionTransformer, ViTConfig
from vitreg.model.preprocess import IMAGENET_MEAN, IMAGENET_STD, Crop, Interpolation

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


_PLAIN = PositionInterpolation("bicubic", antialias=False)


@dataclass(frozen=True)
class _Family:
    """What the classes of a family share and their configs do not say."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation
    crop: Crop = "squash"
    crop_pct: float = 1.0
    positions: PositionInterpolation = _PLAIN


@dataclass(frozen=True)
class _Class:
    """A class of transformers: its family, and what its head reads."""

    family: _Family
    pool: Literal["token", "mean", "token+mean", "attention"] = "token"
    fc_norm: bool = False


_VIT = _Family(HALF, HALF, "bilinear")
_MAE = _Family(IMAGENET_MEAN, IMAGENET_STD, "bilinear")
_DINOV2 = _Family(IMAGENET_MEAN, IMAGENET_STD, "bicubic", "center", 224 / 256)
_DINOV2_REG = _Family(
    IMAGENET_MEAN,
    IMAGENET_STD,
    "bicubic",
    "center",
    224 / 256,
    PositionInterpolation("bicubic", antialias=True),
)
_DINOV3 = _Family(IMAGENET_MEAN, IMAGENET_STD, "bilinear")
_CLIP = _Family(CLIP_MEAN, CLIP_STD, "bicubic", "center")
_SIGLIP = _Family(HALF, HALF, "bicubic")
_SIGLIP2 = _Family(HALF, HALF, "bilinear", positions=PositionInterpolation("bilinear", antialias=True))

_CLASSES = {
    "ViTModel": _Class(_VIT),
    "ViTForImageClassification": _Class(_VIT),
    "ViTMAEModel": _Class(_MAE),
    "ViTMAEForPreTraining": _Class(_MAE),
    "Dinov2Model": _Class(_DINOV2),
    "Dinov2Backbone": _Class(_DINOV2),
    "Dinov2ForImageClassification": _Class(_DINOV2, "token+mean"),
    "Dinov2WithRegistersModel": _Class(_DINOV2_REG),
    "Dinov2WithRegistersBackbone": _Class(_DINOV2_REG),
    "Dinov2WithRegistersForImageClassification": _Class(_DINOV2_REG, "token+mean"),
    "DINOv3ViTModel": _Class(_DINOV3),
    "DINOv3ViTBackbone": _Class(_DINOV3),
    "CLIPModel": _Class(_CLIP, fc_norm=True),
    "CLIPVisionModel": _Class(_CLIP, fc_norm=True),
    "CLIPVisionModelWithProjection": _Class(_CLIP, fc_norm=True),
    "SiglipModel": _Class(_SIGLIP, "attention"),
    "SiglipVisionModel": _Class(_SIGLIP, "attention"),
    "SiglipForImageClassification": _Class(_SIGLIP, "mean"),
    "Siglip2Model": _Class(_SIGLIP2, "attention"),
    "Siglip2VisionModel": _Class(_SIGLIP2, "attention"),
    "Siglip2ForImageClassification": _Class(_SIGLIP2, "mean"),
}

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}

# In order; transformers 4 nests more than transformers 5, both arrive at the same name.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(vit|dinov2|dinov2_with_registers|vision_model)\.", ""),
        (r"^head\.attention\.out_proj\.", "attention_pool.proj."),
        (r"^head\.attention\.", "attention_pool."),
        (r"^head\.layernorm\.", "attention_pool.norm."),
        (r"^head\.probe$", "attention_pool.latent"),
        (r"^head\.", "attention_pool."),
        (r"^(classifier|visual_projection)\.", "head."),
        (r"^embeddings\.", ""),
        (r"^(cls_token|class_embedding)$", "cls_token"),
        (r"^register_tokens$", "registers"),
        (r"^position_embeddings?(\.weight)?$", "pos_embed"),
        (r"^patch_embeddings?\.(projection\.)?", "patch_embed."),
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^(layernorm|post_layernorm)\.", "norm."),
        (r"^((encoder|model)\.)?layers?\.", "blocks."),
        (r"\.(attention\.attention|attention|self_attn)\.(q_proj|query)\.", ".attn.q."),
        (r"\.(attention\.attention|attention|self_attn)\.(k_proj|key)\.", ".attn.k."),
        (r"\.(attention\.attention|attention|self_attn)\.(v_proj|value)\.", ".attn.v."),
        (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
        (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
        (r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
        (r"\.mlp\.gate_proj\.", ".mlp.gate."),
        (r"\.mlp\.up_proj\.", ".mlp.up."),
        (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
        (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1"),
    )
]

# Other towers, training-time parts and ViTModel's pooler (a layer for next-sentence prediction, from BERT).
_UNUSED = re.compile(r"^(text_|logit_|decoder\.)|(^|\.)(pooler\.|mask_token$|position_ids$|inv_freq$)")


def from_transformers(model: nn.Module) -> VisionTransformer:
    """A vitreg model with the weights of a transformers model, also a fine-tuned one; the original stays.

    The tokens equal `last_hidden_state`, `pool` equals `pooler_output` (CLIP, SigLIP, DINO), and `classify`
    equals `logits` or `image_embeds`, in evaluation mode, for any image size (transformers'
    `interpolate_pos_encoding=True`). CLIP's `last_hidden_state` is from before the last norm, and so are the
    tokens here. MAE runs without masking. Source: transformers 5 `models/*/modeling_*.py`; the names of
    transformers 4 are understood too.

    Raises:
        CheckpointError: the class is unknown, or has a part that vitreg does not implement.
    """
    kind = check_class(type(model))
    named = ((canonical_name(key), tensor) for key, tensor in model.state_dict().items())
    weights = {key: tensor for key, tensor in named if key is not None}
    with reading(f"this {type(model).__name__}", "has a part that vitreg does not know", "give it transformers' own"):
        config = _config(model, kind, weights)
        return build(config, _state(weights, config), f"transformers {type(model).__name__}")


def check_class(kind: type[nn.Module]) -> _Class:
    """What is known of a class of transformers.

    Raises:
        CheckpointError: it is none that vitreg reads.
    """
    name, library = kind.__name__, kind.__module__.partition(".")[0]
    if library == "transformers" and name.startswith("DeiT"):
        raise CheckpointError(
            f"{name} has a distillation token, which vitreg does not implement; for other DeiTs "
            f"load timm's deit_base_patch16_224, or deit3_base_patch16_224"
        )
    if library != "transformers" or name not in _CLASSES:
        raise CheckpointError(
            f"{name} is not one of transformers' classes that vitreg reads: {', '.join(_CLASSES)}; "
            f"for other libraries use from_timm, from_open_clip or from_state_dict"
        )
    return _CLASSES[name]


def canonical_name(name: str) -> str | None:
    """Our name for a parameter of transformers 4 or 5; None for what is no part of the tower.

    Queries, keys and values (`attn.q`, `attn.k`, `attn.v`) and gate and value of a gated MLP (`mlp.gate`,
    `mlp.up`) are still apart, as transformers stores them.
    """
    if _UNUSED.search(name):
        return None
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name


def preprocess_from_processor(config: Mapping[str, Any], patch_size: int) -> Preprocess:
    """The preprocessing that a `preprocessor_config.json` describes.

    Args:
        config: of an image processor: `size`, `crop_size`, `do_center_crop`, `resample`, `image_mean`,
            `image_std`.
        patch_size: of the model.

    Raises:
        CheckpointError: it asks for something that `Preprocess` cannot do; the message names it.
    """
    if not config.get("do_resize", True):
        raise _unknown_processor("do_resize", False)
    factor = config.get("rescale_factor", 1 / 255)
    if not (config.get("do_rescale", True) and math.isclose(factor, 1 / 255, rel_tol=1e-4)):
        raise _unknown_processor("rescale_factor", factor)
    mean, std = config.get("image_mean"), config.get("image_std")
    if not config.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if mean is None or std is None:
        raise _unknown_processor("image_mean and image_std", None)
    kinds: dict[Any, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    if config.get("resample", 3) not in kinds:
        raise _unknown_processor("resample", config["resample"])
    size, crop, crop_pct = _geometry(config)
    return Preprocess(
        size=size,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=kinds[config.get("resample", 3)],
        crop_pct=crop_pct,
        crop=crop,
        multiple_of=patch_size,
    )


def _geometry(config: Mapping[str, Any]) -> tuple[tuple[int, int], Crop, float]:
    """(height, width) at the end, how it is reached, and the part of the resized image that is kept."""
    center = config.get("do_center_crop", "crop_size" in config)
    size = config.get("size")
    if size is None and "max_num_patches" in config:  # SigLIP 2 NaFlex; a batch needs one size, so the square
        side = math.isqrt(config["max_num_patches"]) * config["patch_size"]
        return (side, side), "squash", 1.0
    if isinstance(size, int):  # transformers before 4.26
        size = {"shortest_edge": size} if center else {"height": size, "width": size}
    if not isinstance(size, Mapping) or set(size) not in ({"height", "width"}, {"shortest_edge"}):
        raise _unknown_processor("size", size)
    square = "shortest_edge" in size
    resized = _pair(size["shortest_edge"]) if square else (size["height"], size["width"])
    if not center:
        return resized, "none" if square else "squash", 1.0
    kept = config.get("crop_size", 224)
    kept = (kept["height"], kept["width"]) if isinstance(kept, Mapping) else _pair(kept)
    fractions = {keep / full for keep, full in zip(kept, resized, strict=True)}
    if len(fractions) > 1 or max(fractions) > 1:
        raise _unknown_processor("crop_size", config.get("crop_size"))
    fraction = fractions.pop()
    if math.floor(kept[0] / fraction) < resized[0]:  # the quotient of a quotient may round to just below
        fraction = math.nextafter(fraction, 0)
    return kept, "center" if square else "squash", fraction


def _unknown_processor(name: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"the image processor has {name} = {value!r}, which vitreg does not implement; "
        f"load the model with transformers, use from_transformers(model) and give it what the processor makes"
    )


def _config(model: Any, kind: _Class, weights: Mapping[str, Tensor]) -> ViTConfig:
    hf = getattr(model.config, "vision_config", None) or model.config
    patch_size = _pair(hf.patch_size)
    require(patch_size[0] == patch_size[1], f"patches of {patch_size[0]} x {patch_size[1]} pixels")
    channels = getattr(hf, "num_channels", 3)
    require(channels == 3, f"{channels} input channels")
    gated = "blocks.0.mlp.gate.weight" in weights or getattr(hf, "use_swiglu_ffn", False)
    # DINOv2's gated MLP is always SwiGLU, whatever its config says.
    act = "silu" if getattr(hf, "use_swiglu_ffn", False) else hf.hidden_act
    require(act in ACTIVATIONS, f"the activation {act!r}")
    if hasattr(hf, "image_size"):
        image_size = _pair(hf.image_size)
    else:  # SigLIP 2 NaFlex knows its position table only
        side = math.isqrt(hf.num_patches)
        require(side**2 == hf.num_patches, f"a table of {hf.num_patches} positions, no square")
        image_size = _pair(side * patch_size[0])
    biases = {part: f"blocks.0.attn.{part}.bias" in weights for part in "qkv"}
    head = weights.get("head.weight")
    registers = weights.get("registers")
    pool = kind.pool
    if pool == "attention" and "attention_pool.latent" not in weights:
        pool = "mean"
    family = kind.family
    return ViTConfig(
        embed_dim=hf.hidden_size,
        depth=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        mlp_dim=weights["blocks.0.mlp.fc2.weight"].shape[1],
        patch_size=patch_size[0],
        image_size=image_size,
        num_registers=0 if registers is None else registers.shape[1],
        class_token="cls_token" in weights,
        num_classes=0 if head is None else head.shape[0],
        head_bias=head is not None and "head.bias" in weights,
        pool=pool,
        pool_heads=hf.num_attention_heads if pool == "attention" else 0,
        final_norm=not kind.fc_norm,
        fc_norm=kind.fc_norm,
        norm_pre="norm_pre.weight" in weights,
        patch_bias="patch_embed.bias" in weights,
        qkv_bias=any(biases.values()),
        key_bias=biases["k"] or not any(biases.values()),
        proj_bias="blocks.0.attn.proj.bias" in weights,
        mlp_bias="blocks.0.mlp.fc2.bias" in weights,
        activation=ACTIVATIONS[act],  # pyright: ignore[reportArgumentType]
        gated_mlp=gated,
        layer_scale="blocks.0.ls1" in weights,
        norm_eps=hf.layer_norm_eps,
        learned_positions="pos_embed" in weights,
        position_interpolation=family.positions,
        rope=None if "pos_embed" in weights else _rope(hf),
        preprocess=Preprocess(
            size=image_size,
            mean=family.mean,
            std=family.std,
            interpolation=family.interpolation,
            crop_pct=family.crop_pct,
            crop=family.crop,
            multiple_of=patch_size[0],
        ),
        name=_name(getattr(model.config, "_name_or_path", "") or ""),
    )


def _name(source: str) -> str:
    """A repository's name, or that of a local folder without its path."""
    return Path(source).name if os.path.isdir(source) else source


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _rope(hf: Any) -> RopeConfig:
    """DINOv3's frequencies, from its config: the module's own table loses digits when cast to half."""
    num = hf.hidden_size // hf.num_attention_heads // 4
    frequencies = 2 * math.pi / hf.rope_theta ** (torch.arange(num, dtype=torch.float64, device="cpu") / num)
    return RopeConfig(tuple(frequencies.tolist()))


def _state(weights: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Vitreg's tensors from canonical ones."""
    state = dict(weights)
    if not config.num_registers:
        state.pop("registers", None)
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in state:
        positions = state["pos_embed"].reshape(1, -1, config.embed_dim)
        num_patches = config.grid[0] * config.grid[1]
        if config.class_token and positions.shape[1] == num_patches + 1:
            # A constant added to a learned token: it moves into the token.
            of_cls, positions = positions.split((1, num_patches), dim=1)
            state["cls_token"] = state["cls_token"] + of_cls
        state["pos_embed"] = positions
    if state["patch_embed.weight"].ndim == 2:
        # SigLIP 2 NaFlex flattens a patch as (row, column, channel) (`convert_image_to_patches`).
        weight = state["patch_embed.weight"].unflatten(1, (config.patch_size, config.patch_size, 3))
        state["patch_embed.weight"] = weight.permute(0, 3, 1, 2)
    if config.pool == "attention":
        for key in ("weight", "bias"):
            q, kv = state.pop(f"attention_pool.in_proj_{key}").split((config.embed_dim, 2 * config.embed_dim))
            state[f"attention_pool.q.{key}"], state[f"attention_pool.kv.{key}"] = q, kv
    else:  # SigLIP's classifier carries the attention pool of pretraining along
        state = {key: tensor for key, tensor in state.items() if not key.startswith("attention_pool.")}
    if config.fc_norm:
        for key in ("weight", "bias"):
            state[f"fc_norm.{key}"] = state.pop(f"norm.{key}")
    for i in range(config.depth):
        _join(state, f"blocks.{i}.")
    return state


def _join(state: dict[str, Tensor], block: str) -> None:
    """Fuse queries, keys and values, and gate and value of a gated MLP."""
    for key in ("weight", "bias"):
        parts = [state.pop(f"{block}attn.{part}.{key}", None) for part in "qkv"]
        given = [part for part in parts if part is not None]
        if given:
            parts = [torch.zeros_like(given[0]) if part is None else part for part in parts]
            state[f"{block}attn.qkv.{key}"] = torch.cat(parts)
        up = state.pop(f"{block}mlp.up.{key}", None)
        if up is not None:
            gate = state.pop(f"{block}mlp.gate.{key}", None)
            state[f"{block}mlp.fc1.{key}"] = up if gate is None else torch.cat((gate, up))
