"""transformers' Vision Transformers, read off a module instance."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitreg.checkpoints.state import CheckpointError, build, check_supported, conversion_errors
from vitreg.checkpoints.weight_names import TRANSFORMERS, WeightNames
from vitreg.checkpoints.weights import config_fields, join
from vitreg.model import PositionInterpolation, Preprocess, RopeConfig, VisionTransformer, ViTConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
_EXACT = PositionInterpolation("bicubic", antialias=False)


@dataclass(frozen=True)
class _Family:
    """What the classes of a family share and their configs do not say."""

    preprocess: Preprocess
    positions: PositionInterpolation = _EXACT
    names: WeightNames = TRANSFORMERS
    norm_twice: bool = False  # the last norm takes all tokens, and once more the pooled feature


@dataclass(frozen=True)
class _Class:
    """A class of transformers: its family, and what its head reads."""

    family: _Family
    pool: Literal["token", "mean", "token+mean", "attention"] = "token"


_SQUASHED = Preprocess(interpolation="bilinear", crop="squash", crop_pct=1.0)
_VIT = _Family(replace(_SQUASHED, mean=HALF, std=HALF))
_MAE = _MSN = _IJEPA = _DINOV3 = _Family(_SQUASHED)
_DINOV2 = _Family(Preprocess(crop_pct=224 / 256))
_DINOV2_REG = replace(_DINOV2, positions=PositionInterpolation("bicubic", antialias=True))
_TIPS = _Family(
    Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear", crop="squash", crop_pct=1.0),
    positions=PositionInterpolation("bilinear", antialias=True),
)
_CLIP = _Family(Preprocess(mean=CLIP_MEAN, std=CLIP_STD, crop_pct=1.0), names=TRANSFORMERS.norm_after_pool())
_CLIP_UNNORMED = replace(_CLIP, names=replace(TRANSFORMERS, unused=rf"{TRANSFORMERS.unused}|(^|\.)post_layernorm\."))
_CLIPSEG = replace(_CLIP, preprocess=_SQUASHED)
_GIT = _Family(_CLIP.preprocess)
_BLIP = _Family(replace(_CLIP.preprocess, crop="squash"), norm_twice=True)
_FLAVA = replace(_BLIP, norm_twice=False)
_OWL = replace(_CLIP, preprocess=_BLIP.preprocess)
_SIGLIP = _Family(replace(_VIT.preprocess, interpolation="bicubic"))
_IDEFICS = replace(_VIT, positions=PositionInterpolation("bucket", antialias=False))
_DPT = _Family(_SIGLIP.preprocess, positions=PositionInterpolation("bilinear", antialias=False))
_SIGLIP2 = replace(_VIT, positions=PositionInterpolation("bilinear", antialias=True))

_CLASSES = {
    "ViTModel": _Class(_VIT),
    "ViTForImageClassification": _Class(_VIT),
    "ViTMAEModel": _Class(_MAE),
    "ViTMAEForPreTraining": _Class(_MAE),
    "ViTMSNModel": _Class(_MSN),
    "ViTMSNForImageClassification": _Class(_MSN),
    "IJepaModel": _Class(_IJEPA, "mean"),
    "IJepaForImageClassification": _Class(_IJEPA, "mean"),
    "Dinov2Model": _Class(_DINOV2),
    "Dinov2Backbone": _Class(_DINOV2),
    "Dinov2ForImageClassification": _Class(_DINOV2, "token+mean"),
    "Dinov2WithRegistersModel": _Class(_DINOV2_REG),
    "Dinov2WithRegistersBackbone": _Class(_DINOV2_REG),
    "Dinov2WithRegistersForImageClassification": _Class(_DINOV2_REG, "token+mean"),
    "Tipsv2VisionModel": _Class(_TIPS),
    "DINOv3ViTModel": _Class(_DINOV3),
    "DINOv3ViTBackbone": _Class(_DINOV3),
    "CLIPModel": _Class(_CLIP),
    "CLIPVisionModel": _Class(_CLIP),
    "CLIPVisionModelWithProjection": _Class(_CLIP),
    "CLIPForImageClassification": _Class(_CLIP_UNNORMED, "mean"),
    "MetaClip2Model": _Class(_CLIP),
    "MetaClip2VisionModel": _Class(_CLIP),
    "MetaClip2VisionModelWithProjection": _Class(_CLIP),
    "MetaClip2ForImageClassification": _Class(_CLIP_UNNORMED, "mean"),
    "ChineseCLIPModel": _Class(_CLIP),
    "ChineseCLIPVisionModel": _Class(_CLIP),
    "AltCLIPModel": _Class(_CLIP),
    "AltCLIPVisionModel": _Class(_CLIP),
    "Kosmos2VisionTransformer": _Class(_CLIP),
    "CLIPSegModel": _Class(_CLIPSEG),
    "CLIPSegVisionModel": _Class(_CLIPSEG),
    "OwlViTModel": _Class(_OWL),
    "OwlViTVisionModel": _Class(_OWL),
    "Owlv2Model": _Class(_OWL),
    "Owlv2VisionModel": _Class(_OWL),
    "GitVisionModel": _Class(_GIT),
    "BlipModel": _Class(_BLIP),
    "BlipVisionModel": _Class(_BLIP),
    "Blip2VisionModel": _Class(_BLIP),
    "InstructBlipVisionModel": _Class(_BLIP),
    "InstructBlipVideoVisionModel": _Class(_BLIP),
    "FlavaImageModel": _Class(_FLAVA),
    "SiglipModel": _Class(_SIGLIP, "attention"),
    "SiglipVisionModel": _Class(_SIGLIP, "attention"),
    "SiglipForImageClassification": _Class(_SIGLIP, "mean"),
    "Siglip2Model": _Class(_SIGLIP2, "attention"),
    "Siglip2VisionModel": _Class(_SIGLIP2, "attention"),
    "Siglip2ForImageClassification": _Class(_SIGLIP2, "mean"),
    "Idefics2VisionTransformer": _Class(_IDEFICS, "mean"),
    "Idefics3VisionTransformer": _Class(_IDEFICS, "mean"),
    "SmolVLMVisionTransformer": _Class(_IDEFICS, "mean"),
    "JanusVisionModel": _Class(_SIGLIP, "mean"),
    "DPTModel": _Class(_DPT),
}

# Fields of ViTConfig by the names that all configs of transformers give them.
ATTRIBUTES = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
}
ACTIVATIONS: dict[str, Any] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}


def from_transformers(model: nn.Module) -> VisionTransformer:
    """A vitreg model with the weights of a transformers model, also a fine-tuned one; the original stays.

    Of a whole model (LLaVA, PaliGemma, Depth Anything, OWL-ViT) its Vision Transformer is read, and `config.name`
    says where in the model that is.

    The tokens equal `last_hidden_state`, `pool` equals `pooler_output` (CLIP, SigLIP, DINO), and `classify`
    equals `logits` or `image_embeds`, in evaluation mode, for any image size (transformers'
    `interpolate_pos_encoding=True`). CLIP's `last_hidden_state` is from before the last norm, and so are the
    tokens here. MAE runs without masking. Source: transformers 5 `models/*/modeling_*.py`; the names of
    transformers 4 are understood too.

    Raises:
        CheckpointError: the class is unknown, or has a part that vitreg does not implement.
    """
    path, tower = find_tower(model)
    kind, name = check_class(type(tower)), type(tower).__name__
    weights = kind.family.names.translate(tower.state_dict())
    if kind.family.norm_twice:
        weights |= {f"fc_{key}": weight for key, weight in weights.items() if key.startswith("norm.")}
    with conversion_errors(f"this {name}", "give it transformers' own"):
        fields = _attributes(tower, kind, weights)
        fields["name"] = name_of_tower(_name(getattr(getattr(model, "config", None), "_name_or_path", "")), path)
        if fields["pool"] != "attention":  # SigLIP's classifier carries the attention pool of pretraining along
            weights = {key: weight for key, weight in weights.items() if not key.startswith("attention_pool.")}
        state = join(weights, fields["image_size"])
        return build(ViTConfig(**config_fields(state) | fields), state, f"transformers {name}")


def find_tower(model: nn.Module) -> tuple[str, nn.Module]:
    """The model itself, or the one Vision Transformer inside it, and its path there ("" for the model itself).

    Raises:
        CheckpointError: there is none that vitreg reads, or there are several.
    """
    if _is_known(type(model)) or not _is_of_transformers(type(model)):
        return "", model
    towers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if _is_known(type(module)) and not any(path.startswith(f"{outer}.") for outer in towers):
            towers[path] = module
    if len(towers) > 1:
        paths = ", ".join(f"{path} ({type(tower).__name__})" for path, tower in towers.items())
        raise CheckpointError(f"this {type(model).__name__} has several Vision Transformers, {paths}; give one of them")
    return next(iter(towers.items()), ("", model))


def name_of_tower(source: str, path: str) -> str:
    """What to call the Vision Transformer at this path of a model."""
    return f"{source} ({path})".strip() if path else source


def _is_of_transformers(kind: type[nn.Module]) -> bool:
    return kind.__module__.partition(".")[0] == "transformers"


def _is_known(kind: type[nn.Module]) -> bool:
    return _is_of_transformers(kind) and kind.__name__ in _CLASSES


def check_class(kind: type[nn.Module]) -> _Class:
    """What is known of a class of transformers.

    Raises:
        CheckpointError: it is none that vitreg reads.
    """
    name = kind.__name__
    if _is_of_transformers(kind) and name.startswith("DeiT"):
        raise CheckpointError(
            f"{name} has a distillation token, which vitreg does not implement; for other DeiTs "
            f"load timm's deit_base_patch16_224, or deit3_base_patch16_224",
            part="a distillation token",
        )
    if not _is_known(kind):
        raise CheckpointError(
            f"{name} is not one of transformers' classes that vitreg reads, and holds none: {', '.join(_CLASSES)}; "
            f"for other libraries use from_timm, from_open_clip or from_state_dict",
            part="an architecture of its own",
        )
    return _CLASSES[name]


def _attributes(model: Any, kind: _Class, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `ViTConfig` that the weights do not tell."""
    hf = getattr(model.config, "vision_config", None) or model.config
    patch_size, channels = _pair(hf.patch_size), getattr(hf, "num_channels", 3)
    check_supported(patch_size[0] == patch_size[1], f"patches of {patch_size[0]} x {patch_size[1]} pixels")
    check_supported(channels == 3, f"{channels} input channels")
    # DINOv2's gated MLP is always SwiGLU, whatever its config says.
    act = "silu" if getattr(hf, "use_swiglu_ffn", False) else hf.hidden_act
    check_supported(act in ACTIVATIONS, f"the activation {act!r}")
    if hasattr(hf, "image_size"):
        image_size = _pair(hf.image_size)
    else:  # SigLIP 2 NaFlex knows its position table only
        side = math.isqrt(hf.num_patches)
        check_supported(side**2 == hf.num_patches, f"a table of {hf.num_patches} positions, no square")
        image_size = _pair(side * patch_size[0])
    pool = "mean" if kind.pool == "attention" and "attention_pool.latent" not in weights else kind.pool
    biases = {part for part in "qkv" if f"blocks.0.attn.{part}.bias" in weights}
    head_dim = hf.hidden_size // hf.num_attention_heads
    preprocess = replace(kind.family.preprocess, size=image_size, multiple_of=patch_size[0])
    return {
        **{ours: getattr(hf, theirs) for ours, theirs in ATTRIBUTES.items()},
        "image_size": image_size,
        "pool": pool,
        "pool_heads": hf.num_attention_heads if pool == "attention" else 0,
        "key_bias": "k" in biases or not biases,
        "activation": ACTIVATIONS[act],
        "rope": None if "pos_embed" in weights else dinov3_rope(hf.rope_theta, head_dim // 4),
        "position_interpolation": kind.family.positions,
        "preprocess": preprocess,
    }


def _name(source: str) -> str:
    """A repository's name, or that of a local folder without its path."""
    return Path(source).name if os.path.isdir(source) else source


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def dinov3_rope(theta: float, num: int) -> RopeConfig:
    """DINOv3's frequencies, from its config: the module's own table loses digits when cast to half."""
    frequencies = 2 * math.pi / theta ** (torch.arange(num, dtype=torch.float64, device="cpu") / num)
    return RopeConfig(tuple(frequencies.tolist()))
