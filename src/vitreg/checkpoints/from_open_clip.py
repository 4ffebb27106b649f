"""open_clip's image towers, read off a module instance."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitreg.checkpoints.from_timm import activation_name, empty_model, from_timm
from vitreg.checkpoints.hub import downloading, import_optional, in_checkpoint_folder
from vitreg.checkpoints.state import CheckpointError, build, check_norms, check_supported, conversion_errors
from vitreg.checkpoints.weight_names import OPEN_CLIP
from vitreg.checkpoints.weights import KINDS, config_fields, join
from vitreg.model import PositionInterpolation, Preprocess, VisionTransformer, ViTConfig
from vitreg.model.preprocess import Crop

POOLS: dict[str, Any] = {"tok": "token", "avg": "mean"}
CROPS: dict[str, Crop] = {"shortest": "center", "squash": "squash", "longest": "border"}


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
    with conversion_errors("this open_clip model", "give it plain open_clip layers"):
        return _from_timm_tower(tower) if kind == "TimmModel" else _from_native_tower(tower)


def open_clip_model(source: str) -> Any:
    """open_clip's own model, both towers, of `open_clip:ARCH/PRETRAINED`.

    Its whole state dict may be in the folder that `VITREG_CHECKPOINTS` names, as `open_clip--ARCH--PRETRAINED` with one
    of the suffixes of weights.

    Raises:
        CheckpointError: open_clip is not installed or does not know the name, or the weights cannot be downloaded.
    """
    open_clip = import_optional("open_clip", f"loading {source}", "clip")
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
    config = dataclasses.replace(vit.config, preprocess=preprocess_of_tower(tower, vit.config.patch_size))
    state = vit.state_dict()
    if layers:
        check_supported(len(layers) == 1 and isinstance(layers[0], nn.Linear), f"a projection {tower.head}")
        check_supported(not vit.config.num_classes, "a projection after a classification head")
        linear = layers[0]
        config = dataclasses.replace(config, num_classes=linear.out_features, head_bias=linear.bias is not None)
        state |= {f"head.{key}": tensor for key, tensor in linear.state_dict().items()}
    return build(config, state, f"open_clip {config.architecture or 'TimmModel'}")


def _from_native_tower(tower: Any) -> VisionTransformer:
    _check_supported(tower)
    pooler = getattr(tower, "attn_pool", None)
    after_pool = pooler is not None or getattr(tower, "final_ln_after_pool", False)
    weights = (OPEN_CLIP.norm_after_pool() if after_pool else OPEN_CLIP).translate(tower.state_dict())
    if "head.weight" in weights:
        weights["head.weight"] = weights["head.weight"].T
    if pooler is not None:
        weights |= _of_pooler(pooler)
    image_size, block = tuple(tower.image_size), tower.transformer.resblocks[0]
    state = join(weights, image_size)
    config = ViTConfig(
        **config_fields(state),
        num_heads=block.attn.num_heads,
        image_size=image_size,
        pool="token+attention" if pooler is not None else POOLS[getattr(tower, "pool_type", "tok")],
        pool_heads=pooler.attn.num_heads if pooler is not None else 0,
        activation=activation_name(block.mlp.gelu),
        norm_eps=block.ln_1.eps,
        position_interpolation=PositionInterpolation("bicubic", antialias=True),
        preprocess=preprocess_of_tower(tower, tower.patch_size[0]),
    )
    return build(config, state, "open_clip VisionTransformer")


def _of_pooler(pooler: Any) -> dict[str, Tensor]:
    """CoCa's pooling, under our names: the norm of the keys is that of all tokens; only the first query is pooled."""
    attention = pooler.attn
    separate = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    fused = attention.in_proj_weight
    q, k, v = separate if fused is None else fused.chunk(3)
    q_bias, kv_bias = attention.in_proj_bias.tensor_split([attention.embed_dim])
    return {
        "attention_pool.latent": pooler.ln_q(pooler.query[:1]).unsqueeze(0),
        "attention_pool.q.weight": q,
        "attention_pool.q.bias": q_bias,
        "attention_pool.kv.weight": torch.cat((k, v)),
        "attention_pool.kv.bias": kv_bias,
        **{f"attention_pool.proj.{kind}": getattr(attention.out_proj, kind) for kind in KINDS},
        **{f"norm.{kind}": getattr(pooler.ln_k, kind) for kind in KINDS},
    }


def _check_supported(tower: Any) -> None:
    """Refuse what neither weights nor attributes would tell."""
    block, pool_type = tower.transformer.resblocks[0], getattr(tower, "pool_type", "tok")
    two_poolers = getattr(tower, "attn_pool_contrastive", None) is not None
    check_supported(not two_poolers, "attentional pooling with a pool of its own for captions")
    check_supported(not getattr(tower, "input_patchnorm", False), "a norm in its patch embedding")
    check_supported(pool_type in POOLS, f"pool_type={pool_type!r}")
    check_supported(tower.patch_size[0] == tower.patch_size[1], f"patches of {tower.patch_size} pixels")
    check_supported(getattr(block.attn, "logit_scale", None) is None, "scaled cosine attention")
    check_supported(getattr(block.attn, "head_scale", None) is None, "scaled attention heads")
    norm = getattr(block, "ln_attn", None)
    check_supported(norm is None or isinstance(norm, nn.Identity), "a norm after its attention")
    check_norms(tower)


def preprocess_of_tower(tower: Any, patch_size: int) -> Preprocess:
    """What `open_clip.create_model` noted on the tower; OpenAI's numbers for a tower built by hand."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    cfg: Mapping[str, Any] = getattr(tower, "preprocess_cfg", None) or {}
    mode = cfg.get("resize_mode") or "shortest"
    check_supported(mode in CROPS, f"resize_mode={mode!r} in its preprocessing")
    size = cfg.get("size") or tower.image_size
    interpolation = cfg.get("interpolation") or "bicubic"
    return Preprocess(
        size=(size, size) if isinstance(size, int) else tuple(size),
        mean=tuple(cfg.get("mean") or getattr(tower, "image_mean", None) or OPENAI_DATASET_MEAN),
        std=tuple(cfg.get("std") or getattr(tower, "image_std", None) or OPENAI_DATASET_STD),
        interpolation="bicubic" if interpolation == "random" else interpolation,
        crop_pct=1.0,
        crop=CROPS[mode],
        multiple_of=patch_size,
    )
