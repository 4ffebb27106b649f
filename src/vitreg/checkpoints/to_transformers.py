"""A model as a folder that transformers' `from_pretrained` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitreg.checkpoints.from_transformers import ACTIVATIONS, ATTRIBUTES, check_class, from_transformers
from vitreg.checkpoints.hub import import_optional, quiet_transformers
from vitreg.checkpoints.processors import processor_from_preprocess
from vitreg.checkpoints.state import UnsupportedByFormat
from vitreg.checkpoints.to_timm import FREE, differences, snap, theta_of, timm_architecture
from vitreg.checkpoints.transformers_classes import dinov3_rope
from vitreg.checkpoints.weights import split, tensor_for
from vitreg.common.disk import replace_text, replacing
from vitreg.model import VisionTransformer, ViTConfig


def to_transformers_folder(vit: VisionTransformer, folder: Path) -> None:
    """Write `config.json`, `model.safetensors` and, where there is one, `preprocessor_config.json`.

    Raises:
        CheckpointError: transformers is missing, or has no class for a part of the model.
    """
    transformers = import_optional("transformers", "this format", "transformers")
    name, kwargs = _transformers_class(vit)
    kind = getattr(transformers, name)
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    with torch.device("meta"):  # weights follow; the random ones would take a minute for a giant model
        model = kind(kind.config_class(**kwargs), **options)
    # What reads back as another model has a part that the class lacks. Heads that read less than transformers' are
    # widened, and of a class token it is the same whether it is normed before it is taken or after that.
    free = (*FREE, "pool", "pool_heads", *(("final_norm", "fc_norm") if name.startswith("CLIP") else ()))
    if different := differences(vit.config, from_transformers(model).config, free):
        raise _unsupported(vit.config, ", ".join(different))
    names, weights = check_class(kind).family.names, split(vit)
    state = {key: _tensor(weights, names.ours(key), like, vit.config) for key, like in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size="1TB")
    if name in ("CLIPVisionModel", "SiglipVisionModel"):
        _nest(folder / "model.safetensors")
    if (processor := processor_from_preprocess(vit.preprocess)) is not None:
        replace_text(folder / "preprocessor_config.json", json.dumps(processor, indent=2))


def _nest(file: Path) -> None:
    """Put the tower under `vision_model.`: transformers 4 looks only there, transformers 5 there as well."""
    state = {f"vision_model.{key.removeprefix('vision_model.')}": tensor for key, tensor in load_file(file).items()}
    with replacing(file) as temporary:
        save_file(state, temporary, {"format": "pt"})


def _tensor(weights: Mapping[str, Tensor], name: str | None, like: Tensor, config: ViTConfig) -> Tensor:
    """What a parameter of transformers holds, by its name among ours."""
    unused_pool = name is not None and name.startswith("attention_pool.") and name not in weights
    if name is None or unused_pool or not like.numel():
        # The mask token of pretraining, the pool that SigLIP's classifier carries along, no registers.
        return weights["patch_embed.weight"].new_zeros(like.shape)
    if name == "head.weight" and weights[name].shape != like.shape:
        # A head that reads the class token or the mean of the patches, for DINOv2's, which reads both.
        head = weights[name]
        nothing = torch.zeros_like(head)
        return torch.cat((nothing, head) if config.pool == "mean" else (head, nothing), dim=1)
    if config.final_norm:
        name = name.replace("fc_norm.", "norm.")
    return tensor_for(weights, name, like)


def _transformers_class(vit: VisionTransformer) -> tuple[str, dict[str, Any]]:
    """The class that expresses the model, and the arguments of its config."""
    c = vit.config

    def raise_if_any(parts: Mapping[str, bool]) -> None:
        if present := [part for part, is_present in parts.items() if is_present]:
            raise _unsupported(c, present[0])

    raise_if_any(
        {
            "parallel blocks": c.parallel,
            "differential attention": c.differential,
            "norms inside attention or MLP": c.qk_norm or c.attention_norm or c.mlp_norm,
            f"a position grid of {c.grid[0]} x {c.grid[1]}": c.grid[0] != c.grid[1],
        }
    )
    acts = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    common = {theirs: getattr(c, ours) for ours, theirs in ATTRIBUTES.items()}
    common |= {"hidden_act": acts[c.activation], "image_size": c.image_size[0], "patch_size": c.patch_size}
    wide = common | {"intermediate_size": c.mlp_dim}
    head = {"num_labels": c.num_classes} if c.num_classes else {}
    if c.rope is not None:
        theta = theta_of(c.rope)
        raise_if_any(
            {
                "RoPE other than DINOv3's": snap(dinov3_rope(theta, len(c.rope.frequencies)), c.rope) != c.rope,
                "a head on DINOv3": c.num_classes > 0,
            }
        )
        biases = {"query_bias": c.qkv_bias, "value_bias": c.qkv_bias, "key_bias": c.qkv_bias and c.key_bias}
        biases |= {"proj_bias": c.proj_bias, "mlp_bias": c.mlp_bias}
        options = {"rope_theta": theta, "use_gated_mlp": c.gated_mlp, "num_register_tokens": c.num_registers}
        return "DINOv3ViTModel", wide | biases | options
    if not c.class_token or c.norm_pre:
        raise_if_any({"registers without DINOv2's class token and first norm": c.num_registers > 0})
    if not c.class_token:
        raise_if_any(
            {
                "a head after the attention pool": c.pool == "attention" and bool(head),
                "an attention pool with other heads": c.pool_heads not in (0, c.num_heads),
            }
        )
        if head:
            return "SiglipForImageClassification", {"vision_config": wide, **head}
        return "SiglipVisionModel", wide | {"vision_use_head": c.pool == "attention"}
    if c.norm_pre:
        bias = None if vit.head is None else vit.head.bias
        raise_if_any(
            {
                "CLIP with another pool": c.pool != "token" or c.final_norm == c.fc_norm,
                "CLIP with a bias of its projection": bias is not None and bool(bias.any()),
            }
        )
        projection = {"projection_dim": c.num_classes} if head else {}
        return ("CLIPVisionModelWithProjection" if head else "CLIPVisionModel"), wide | projection
    raise_if_any(
        {
            "a norm after pooling": not c.final_norm or c.fc_norm,
            "an attention pool beside a class token": c.pool == "attention",
        }
    )
    options = {"qkv_bias": c.qkv_bias, **head}
    if not (c.num_registers or c.layer_scale or c.gated_mlp) and (not head or c.pool == "token"):
        return ("ViTForImageClassification" if head else "ViTModel"), wide | options
    family = "Dinov2WithRegisters" if c.num_registers else "Dinov2"
    if c.num_registers:
        options["num_register_tokens"] = c.num_registers
    options |= {"mlp_ratio": _dinov2_ratio(c), "use_swiglu_ffn": c.gated_mlp}
    return f"{family}{'ForImageClassification' if head else 'Model'}", common | options


def _dinov2_ratio(c: ViTConfig) -> int:
    for ratio in range(1, 17):  # transformers keeps two thirds of a gated one, rounded up to a multiple of 8
        wide = c.embed_dim * ratio
        if ((int(wide * 2 / 3) + 7) // 8 * 8 if c.gated_mlp else wide) == c.mlp_dim:
            return ratio
    kind = "a gated MLP" if c.gated_mlp else "an MLP"
    raise _unsupported(c, f"{kind} of {c.mlp_dim} units on {c.embed_dim} channels")


def _unsupported(config: ViTConfig, what: str) -> UnsupportedByFormat:
    others = "'vitreg' or 'timm'"
    try:
        timm_architecture(config)
    except UnsupportedByFormat:
        others = "'vitreg'"
    return UnsupportedByFormat(f"format 'transformers' cannot express {what}; save with format={others}")
