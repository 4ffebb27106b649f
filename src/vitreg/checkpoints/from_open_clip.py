"""open_clip's image towers, read off a module instance."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitreg.checkpoints.from_timm import from_timm
from vitreg.checkpoints.hub import downloading, in_checkpoint_folder
from vitreg.checkpoints.names import empty_model
from vitreg.checkpoints.state import CheckpointError, build, reading, require
from vitreg.model import PositionInterpolation, Preprocess, VisionTransformer, ViTConfig
from vitreg.model.preprocess import Crop


def from_open_clip(model: nn.Module) -> VisionTransformer:
    """A vitreg model with the weights of an open_clip model or image tower; the original is left untouched.

    `classify` equals `model.encode_image` (not normalized), and the tokens are those that open_clip pools, in
    evaluation mode. Where an image has another size than the checkpoint, positions are resized as open_clip
    does when it loads a model at another size. Source: open_clip 3 `transformer.py`, `timm_model.py`.

    Raises:
        CheckpointError: the tower has a part that vitreg does not implement; the message names it.
    """
    tower: Any = getattr(model, "visual", model)
    kind = type(tower).__name__
    if type(tower).__module__.partition(".")[0] != "open_clip" or kind not in (
        "VisionTransformer",
        "TimmModel",
    ):
        raise CheckpointError(
            f"{type(model).__name__} has no image tower that vitreg reads; give an open_clip CLIP or "
            f"CustomTextCLIP model whose `visual` is a VisionTransformer or a timm model, or that tower, "
            f"not a {kind}"
        )
    with reading("this open_clip model", "has a part that vitreg does not know", "give it plain open_clip layers"):
        return _from_timm_tower(tower) if kind == "TimmModel" else _from_native_tower(tower)


def open_clip_model(source: str) -> Any:
    """open_clip's own model, both towers, of `open_clip:ARCH/PRETRAINED`.

    Its whole state dict may be in the folder that `VITREG_CHECKPOINTS` names, as `open_clip--ARCH--PRETRAINED` with one
    of the suffixes of weights.

    Raises:
        CheckpointError: open_clip is not installed or does not know the name, or the weights cannot be downloaded.
    """
    try:
        import open_clip
    except ImportError as error:
        raise CheckpointError(f'loading {source} needs open_clip: pip install "vitreg[clip]"') from error
    architecture, _, pretrained = source.removeprefix("open_clip:").partition("/")
    if architecture not in (known := open_clip.list_models()):
        near = difflib.get_close_matches(architecture, known, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "give open_clip:ARCH/PRETRAINED"
        raise CheckpointError(f"open_clip has no architecture {architecture!r}; {hint}")
    tower = (open_clip.get_model_config(architecture) or {})["vision_cfg"]
    if "timm_model_name" in tower:
        empty_model(tower["timm_model_name"])
    elif not isinstance(tower.get("layers", 0), int):
        raise CheckpointError(f"{source} has a ResNet as its image tower, not a Vision Transformer")
    stored = in_checkpoint_folder(source)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if stored is None and pretrained.lower().replace("-", "_") not in tags and not os.path.isfile(pretrained):
        given = f"no weights {pretrained!r}" if pretrained else "several weights" if tags else "no weights"
        hint = f"give open_clip:{architecture}/ and one of {', '.join(tags)}"
        hint = hint if tags else "build it with open_clip and use from_open_clip"
        raise CheckpointError(f"open_clip has {given} for {architecture}; {hint}")
    with downloading(source, f"its whole state dict as {source.replace(':', '--').replace('/', '--')}.safetensors"):
        return open_clip.create_model(architecture, pretrained=str(stored or pretrained))


def _from_timm_tower(tower: Any) -> VisionTransformer:
    vit = from_timm(tower.trunk)
    layers = [layer for layer in tower.head if not isinstance(layer, nn.Dropout)]
    config = dataclasses.replace(vit.config, preprocess=_preprocess(tower, vit.config.patch_size))
    state = vit.state_dict()
    if layers:
        require(len(layers) == 1 and isinstance(layers[0], nn.Linear), f"a projection {tower.head}")
        require(not vit.config.num_classes, "a projection after a classification head")
        linear = layers[0]
        config = dataclasses.replace(config, num_classes=linear.out_features, head_bias=linear.bias is not None)
        state |= {f"head.{key}": tensor for key, tensor in linear.state_dict().items()}
    return build(config, state, f"open_clip {config.architecture or 'TimmModel'}")


def _from_native_tower(tower: Any) -> VisionTransformer:
    config = _config(tower)
    return build(config, _state(tower, config), "open_clip VisionTransformer")


def _config(tower: Any) -> ViTConfig:
    block = tower.transformer.resblocks[0]
    patch_size = tower.patch_size
    require(getattr(tower, "attn_pool", None) is None, "attentional pooling")
    require(not getattr(tower, "input_patchnorm", False), "a norm in its patch embedding")
    pool_type = getattr(tower, "pool_type", "tok")
    require(pool_type in ("tok", "avg"), f"pool_type={pool_type!r}")
    require(patch_size[0] == patch_size[1], f"patches of {patch_size} pixels")
    require(getattr(block.attn, "logit_scale", None) is None, "scaled cosine attention")
    require(getattr(block.attn, "head_scale", None) is None, "scaled attention heads")
    require(_is_identity(getattr(block, "ln_attn", None)), "a norm after its attention")
    final_norm = not getattr(tower, "final_ln_after_pool", False)
    return ViTConfig(
        embed_dim=tower.conv1.out_channels,
        depth=len(tower.transformer.resblocks),
        num_heads=block.attn.num_heads,
        mlp_dim=block.mlp.c_proj.in_features,
        patch_size=patch_size[0],
        image_size=tuple(tower.image_size),
        num_classes=0 if tower.proj is None else tower.proj.shape[1],
        head_bias=False,
        pool="token" if pool_type == "tok" else "mean",
        final_norm=final_norm,
        fc_norm=not final_norm,
        norm_pre=not _is_identity(tower.ln_pre),
        patch_bias=tower.conv1.bias is not None,
        qkv_bias=block.attn.in_proj_bias is not None,
        qk_norm=not _is_identity(getattr(block.attn, "ln_q", None)),
        attention_norm=not _is_identity(getattr(block.attn, "ln_inner", None)),
        mlp_norm=not _is_identity(getattr(block.mlp, "ln", None)),
        activation=_activation(block.mlp.gelu),
        layer_scale=hasattr(block.ls_1, "gamma"),
        norm_eps=block.ln_1.eps,
        position_interpolation=PositionInterpolation("bicubic", antialias=True),
        preprocess=_preprocess(tower, patch_size[0]),
    )


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _activation(act: nn.Module) -> Any:
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    require(type(act).__name__ == "QuickGELU", f"the activation {type(act).__name__}")
    return "quick_gelu"


def _preprocess(tower: Any, patch_size: int) -> Preprocess:
    """What `open_clip.create_model` noted on the tower; OpenAI's numbers for a tower built by hand."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    cfg: Mapping[str, Any] = getattr(tower, "preprocess_cfg", None) or {}
    modes: dict[str, Crop] = {"shortest": "center", "squash": "squash", "longest": "border"}
    mode = cfg.get("resize_mode") or "shortest"
    require(mode in modes, f"resize_mode={mode!r} in its preprocessing")
    size = cfg.get("size") or tower.image_size
    interpolation = cfg.get("interpolation") or "bicubic"
    return Preprocess(
        size=(size, size) if isinstance(size, int) else tuple(size),
        mean=tuple(cfg.get("mean") or getattr(tower, "image_mean", None) or OPENAI_DATASET_MEAN),
        std=tuple(cfg.get("std") or getattr(tower, "image_std", None) or OPENAI_DATASET_STD),
        interpolation="bicubic" if interpolation == "random" else interpolation,
        crop_pct=1.0,
        crop=modes[mode],
        multiple_of=patch_size,
    )


def _state(tower: Any, config: ViTConfig) -> dict[str, Tensor]:
    # Every token that goes in has a position here; the class token's is a constant and moves into the token.
    of_cls, positions = tower.positional_embedding.split((1, config.grid[0] * config.grid[1]))
    state: dict[str, Tensor] = {
        "patch_embed.weight": tower.conv1.weight,
        "cls_token": (tower.class_embedding + of_cls).reshape(1, 1, -1),
        "pos_embed": positions.unsqueeze(0),
    }
    if config.patch_bias:
        state["patch_embed.bias"] = tower.conv1.bias
    if tower.proj is not None:
        state["head.weight"] = tower.proj.T
    state |= _named("norm_pre", tower.ln_pre)
    state |= _named("norm" if config.final_norm else "fc_norm", tower.ln_post)
    for i, block in enumerate(tower.transformer.resblocks):
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in _block(block).items()}
    return state


def _named(name: str, module: nn.Module | None) -> dict[str, Tensor]:
    return {} if module is None else {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}


def _block(block: Any) -> dict[str, Tensor]:
    state = {"attn.qkv.weight": block.attn.in_proj_weight}
    if block.attn.in_proj_bias is not None:
        state["attn.qkv.bias"] = block.attn.in_proj_bias
    for ours, theirs in (("q_norm", "ln_q"), ("k_norm", "ln_k"), ("norm", "ln_inner"), ("proj", "out_proj")):
        state |= _named(f"attn.{ours}", getattr(block.attn, theirs, None))
    for ours, theirs in (("fc1", "c_fc"), ("norm", "ln"), ("fc2", "c_proj")):
        state |= _named(f"mlp.{ours}", getattr(block.mlp, theirs, None))
    state |= _named("norm1", block.ln_1) | _named("norm2", block.ln_2)
    for i, scale in ((1, block.ls_1), (2, block.ls_2)):
        if isinstance(gamma := getattr(scale, "gamma", None), torch.Tensor):
            state[f"ls{i}"] = gamma
    return state
