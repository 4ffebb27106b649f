"""transformers' Vision Transformers, read off a module instance."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitreg.checkpoints.from_timm import from_timm, is_readable
from vitreg.checkpoints.state import CheckpointError, build, check_supported, conversion_errors
from vitreg.checkpoints.transformers_classes import CLASSES, EXACT, Class
from vitreg.checkpoints.weights import config_fields, join
from vitreg.model import VisionTransformer, ViTConfig

# Fields of ViTConfig by the names that all configs of transformers give them.
ATTRIBUTES = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
}
NORM_EPS = ("layer_norm_eps", "rms_norm_eps")
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
    if is_readable(tower):
        vit = from_timm(tower)
        vit.config = replace(vit.config, name=name_of_tower(vit.config.name, path))
        return vit
    kind, name = check_class(type(tower)), type(tower).__name__
    weights = kind.family.names.translate(tower.state_dict())
    if kind.family.norm_twice:
        weights |= {f"fc_{key}": weight for key, weight in weights.items() if key.startswith("norm.")}
    with conversion_errors(f"this {name}", "give it transformers' own"):
        if kind.family.rewrite is not None:
            kind.family.rewrite(tower, weights)
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
        known = _is_known(type(module)) or is_readable(module)
        if known and not any(path.startswith(f"{outer}.") for outer in towers):
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
    return _is_of_transformers(kind) and kind.__name__ in CLASSES


def check_class(kind: type[nn.Module]) -> Class:
    """What is known of a class of transformers.

    Raises:
        CheckpointError: it is none that vitreg reads.
    """
    name = kind.__name__
    if not _is_known(kind):
        raise CheckpointError(
            f"{name} is not one of transformers' classes that vitreg reads, and holds none: {', '.join(CLASSES)}; "
            f"for other libraries use from_timm, from_open_clip or from_state_dict",
            part="an architecture of its own",
        )
    return CLASSES[name]


def _attributes(model: Any, kind: Class, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `ViTConfig` that the weights do not tell."""
    hf, family = getattr(model.config, "vision_config", None) or model.config, kind.family
    patch_size, channels = _pair(hf.patch_size), getattr(hf, "num_channels", 3)
    check_supported(patch_size[0] == patch_size[1], f"patches of {patch_size[0]} x {patch_size[1]} pixels")
    check_supported(channels == 3, f"{channels} input channels")
    # DINOv2's gated MLP is always SwiGLU, whatever its config says.
    act = "silu" if getattr(hf, "use_swiglu_ffn", False) else hf.hidden_act
    check_supported(act in ACTIVATIONS, f"the activation {act!r}")
    pool = "token" if not getattr(hf, "use_mean_pooling", True) else kind.pool
    pool = "mean" if pool == "attention" and "attention_pool.latent" not in weights else pool
    eps = family.norm_eps or next(getattr(hf, name) for name in NORM_EPS if hasattr(hf, name))
    biases = {part for part in "qkv" if f"blocks.0.attn.{part}.bias" in weights}
    table = _table_size(hf)
    preprocess = replace(
        family.preprocess, size=_pair(getattr(hf, "image_size", None) or table), multiple_of=patch_size[0]
    )
    return {
        **{ours: getattr(hf, theirs) for ours, theirs in ATTRIBUTES.items() if theirs not in NORM_EPS},
        "norm_eps": eps,
        "image_size": table,
        "pool": pool,
        "pool_heads": hf.num_attention_heads if pool == "attention" else 0,
        "num_summary_tokens": kind.num_summary_tokens(hf),
        "key_bias": "k" in biases or not biases,
        "activation": ACTIVATIONS[act],
        "patch_padding": family.patch_padding,
        "rope": family.rope(hf) if family.rope is not None else None,
        "position_interpolation": family.positions if getattr(hf, "is_native", True) else EXACT,
        "preprocess": preprocess,
    }


def _table_size(hf: Any) -> tuple[int, int]:
    """(height, width) in pixels of the table of positions."""
    if hasattr(hf, "max_img_size"):  # RADIO
        return _pair(hf.max_img_size)
    if hasattr(hf, "image_size"):
        return _pair(hf.image_size)
    side = math.isqrt(hf.num_patches)  # SigLIP 2 NaFlex knows its position table only
    check_supported(side**2 == hf.num_patches, f"a table of {hf.num_patches} positions, no square")
    return _pair(side * hf.patch_size)


def _name(source: str) -> str:
    """A repository's name, or that of a local folder without its path."""
    return Path(source).name if os.path.isdir(source) else source


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
