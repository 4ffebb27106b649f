"""timm's Vision Transformers (`VisionTransformer`, `Eva`), read off a module instance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vitreg.checkpoints.state import CheckpointError, build, reading, require
from vitreg.model import Preprocess, RopeConfig, VisionTransformer, ViTConfig
from vitreg.model.differential import lambda_init


def from_timm(model: nn.Module) -> VisionTransformer:
    """A vitreg model with the weights of a timm model, also a fine-tuned one; the original is left untouched.

    The result equals `model.forward_features` (tokens) and `model.forward` (`classify`) in evaluation mode,
    for any image size, with timm's position interpolation. Source: timm 1.0 `models/vision_transformer.py`
    and `models/eva.py`.

    Raises:
        CheckpointError: the model has a part that vitreg does not implement; the message names it.
    """
    if not is_readable(model):
        raise CheckpointError(
            f"{type(model).__name__} is not a timm VisionTransformer or Eva model; "
            f"for other libraries use from_transformers, from_open_clip or from_state_dict"
        )
    name = _name(getattr(model, "pretrained_cfg", None) or {}) or type(model).__name__
    with reading(f"timm's {name}", "has a part that vitreg does not know", "give it plain timm layers"):
        require(not hasattr(model, "dist_token"), "a distillation token")
        config = _config(model)
        return build(config, _state(model, config), f"timm {config.architecture or type(model).__name__}")


def is_readable(model: nn.Module) -> bool:
    """Whether the class is one that `from_timm` knows, or the same with a distillation token, which it refuses."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    return type(model) in (TimmVisionTransformer, VisionTransformerDistilled, Eva)


def _config(model: Any) -> ViTConfig:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    block, patch = model.blocks[0], model.patch_embed
    parallel = _is(block, "ParallelScalingBlock", "DiffParallelScalingBlock")
    require(parallel or _is(block, "Block", "EvaBlock"), f"blocks of type {type(block).__name__}")
    plain = isinstance(getattr(patch, "proj", None), nn.Conv2d) and hasattr(patch, "norm")
    require(plain, f"a patch embedding {type(patch).__name__}")
    require(isinstance(patch.norm, nn.Identity), "a norm in its patch embedding")
    require(patch.proj.in_channels == 3, f"{patch.proj.in_channels} input channels")
    require(patch.patch_size[0] == patch.patch_size[1], f"patches of {patch.patch_size} pixels")
    attention = block if parallel else block.attn
    differential = _is(attention, "DiffAttention", "DiffParallelScalingBlock")
    if differential:
        _check_lambdas(model)
    if not parallel:
        require(
            _is(attention, "Attention", "AttentionRope", "EvaAttention", "DiffAttention"),
            f"attention {type(attention).__name__}",
        )
        require(getattr(attention, "gate", None) is None, "gated attention")
        require(getattr(attention, "num_kv_groups", 1) == 1, "grouped-query attention")
        width = attention.proj.in_features
        require(width == model.embed_dim, f"heads of {width // attention.num_heads} channels")
    for name, module in model.named_modules():
        other = differential and name.endswith("sub_norm")
        require(other or "rmsnorm" not in type(module).__name__.lower(), f"an RMSNorm ({name})")
    pool: dict[str, Any] = {
        "token": "token",
        "avg": "mean",
        "map": "attention",
        "": "token" if model.cls_token is not None else "mean",
    }
    require(model.global_pool in pool, f"global_pool={model.global_pool!r}")
    require(
        model.global_pool == "token" or not getattr(model, "pool_include_prefix", False),
        "registers in its pooling",
    )
    require(
        not (_is(model, "Eva") and model.attn_pool is not None and model.cls_token is not None),
        "a class token in its attention pool",
    )
    has_head = isinstance(model.head, nn.Linear)
    qkv = _qkv(attention) if not parallel else None
    fused = _fused_output(block)
    gated = not parallel and not _is(block.mlp, "Mlp")
    return ViTConfig(
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=attention.num_heads,
        mlp_dim=block.in_split[0] if parallel else block.mlp.fc2.in_features,
        patch_size=patch.patch_size[0],
        image_size=tuple(patch.img_size),
        num_registers=0 if model.reg_token is None else model.reg_token.shape[1],
        class_token=model.cls_token is not None,
        num_classes=model.head.out_features if has_head else 0,
        head_bias=has_head and model.head.bias is not None,
        pool=pool[model.global_pool],
        pool_heads=model.attn_pool.num_heads if model.attn_pool is not None else 0,
        final_norm=not isinstance(model.norm, nn.Identity),
        fc_norm=not isinstance(model.fc_norm, nn.Identity),
        norm_pre=not isinstance(model.norm_pre, nn.Identity),
        patch_bias=patch.proj.bias is not None,
        qkv_bias=(block.in_proj.bias is not None) if parallel else qkv is not None and qkv[1] is not None,
        key_bias=not _is(attention, "EvaAttention"),
        proj_bias=(fused or (block.attn_out_proj if parallel else attention.proj)).bias is not None,
        mlp_bias=parallel or block.mlp.fc2.bias is not None,  # a parallel block's first layer always has one
        differential=differential,
        qk_norm=not isinstance(attention.q_norm, nn.Identity),
        attention_norm=not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity),
        mlp_norm=not parallel and not isinstance(block.mlp.norm, nn.Identity),
        activation=_activation(block.mlp_act if parallel else block.mlp.act),
        gated_mlp=gated,
        parallel=parallel,
        layer_scale=_layer_scale(block, 1) is not None,
        norm_eps=(block.in_norm if parallel else block.norm1).eps,
        learned_positions=model.pos_embed is not None,
        rope=_rope(model),
        preprocess=_preprocess(cfg, patch.img_size, patch.patch_size[0]),
        name=_name(cfg),
        architecture=cfg.get("architecture") or "",
    )


def _check_lambdas(model: Any) -> None:
    for i, block in enumerate(model.blocks):
        attention = getattr(block, "attn", block)  # the parallel block is its own attention
        require(not attention.dual_lambda, "differential attention with scalar lambdas (dual_lambda)")
        scheduled = math.isclose(attention.lambda_init, lambda_init(i))
        require(scheduled, f"a lambda_init in block {i} that is not the paper's")


def _name(cfg: dict[str, Any]) -> str:
    return ".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part)


def _preprocess(cfg: dict[str, Any], image_size: tuple[int, int], patch_size: int) -> Preprocess:
    """The checkpoint's own evaluation transform, at the size that the model was built for."""
    return Preprocess.from_timm({**cfg, "input_size": (3, *image_size)}, multiple_of=patch_size)


def _is(module: nn.Module, *names: str) -> bool:
    return type(module).__name__ in names


def _activation(act: nn.Module) -> Any:
    kinds = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "Swish": "silu"}
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    require(type(act).__name__ in (*kinds, "GELU"), f"the activation {type(act).__name__}")
    return kinds.get(type(act).__name__, "gelu")


def _rope(model: Any) -> RopeConfig | None:
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    interleaved = not model.blocks[0].attn.rotate_half  # what is applied; older ropes do not say it
    swap_axes = getattr(rope, "grid_indexing", "ij") == "xy"
    if _is(rope, "RotaryEmbeddingDinoV3"):
        require(rope.normalize_coords == "separate", f"RoPE coordinates normalized by {rope.normalize_coords!r}")
        # From the attributes, not the buffer: the model may have no memory yet (device "meta").
        if rope.min_period is not None and rope.max_period is not None:
            ratio = rope.max_period / rope.min_period
            periods = rope.min_period * ratio ** torch.linspace(0, 1, rope.dim // 4, device="cpu")
        else:
            exponents = 2.0 * torch.arange(rope.dim // 4, dtype=torch.float32, device="cpu") / (rope.dim // 2)
            periods = rope.temperature**exponents
        frequencies = tuple((2 * math.pi / periods).tolist())
        return RopeConfig(frequencies, "centered", rope.grid_offset, None, interleaved, swap_axes)
    require(_is(rope, "RotaryEmbeddingCat"), f"RoPE of type {type(rope).__name__}")
    grid_type = getattr(rope, "grid_type", "pixel" if rope.in_pixels else "index")  # the attribute is of timm 1.0.31
    require(grid_type == "index", f"RoPE over a {grid_type!r} grid")
    frequencies = 1.0 / rope.temperature ** (
        torch.arange(rope.dim // 4, dtype=torch.float32, device="cpu") / (rope.dim // 4)
    )
    reference = tuple(rope.ref_feat_shape) if rope.ref_feat_shape is not None else None
    return RopeConfig(tuple(frequencies.tolist()), "index", rope.grid_offset, reference, interleaved, swap_axes)


def _state(model: Any, config: ViTConfig) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {"patch_embed.weight": model.patch_embed.proj.weight}
    if config.patch_bias:
        state["patch_embed.bias"] = model.patch_embed.proj.bias
    cls, registers, positions = model.cls_token, model.reg_token, model.pos_embed
    num_prefix = config.num_prefix_tokens
    if positions is not None and positions.shape[1] == config.grid[0] * config.grid[1] + num_prefix and num_prefix:
        # The original layout gives prefix tokens a position too: a constant, so it moves into the tokens.
        prefix, positions = positions.split((num_prefix, positions.shape[1] - num_prefix), dim=1)
        of_cls, of_registers = prefix.split((int(config.class_token), config.num_registers), dim=1)
        cls = None if cls is None else cls + of_cls
        registers = None if registers is None else registers + of_registers
    for name, tensor in (("cls_token", cls), ("registers", registers), ("pos_embed", positions)):
        if tensor is not None:
            state[name] = tensor
    for name in ("norm_pre", "norm", "fc_norm", "head"):
        state |= _named(name, getattr(model, name))
    if model.attn_pool is not None:
        state |= _attention_pool(model.attn_pool, config)
    for i, block in enumerate(model.blocks):
        parts = _parallel_block(block) if config.parallel else _block(block)
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in parts.items()}
    return state


def _named(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}


def _block(block: Any) -> dict[str, Tensor]:
    state = _named("norm1", block.norm1) | _named("norm2", block.norm2) | _named("attn.proj", block.attn.proj)
    for norm in ("q_norm", "k_norm", "norm"):
        if hasattr(block.attn, norm):
            state |= _named(f"attn.{norm}", getattr(block.attn, norm))
    state |= _differential(block.attn)
    weight, bias = _qkv(block.attn)
    state["attn.qkv.weight"] = weight
    if bias is not None:
        state["attn.qkv.bias"] = bias
    mlp = block.mlp
    if hasattr(mlp, "fc1_g"):
        for key, gate in mlp.fc1_g.state_dict().items():
            state[f"mlp.fc1.{key}"] = torch.cat((gate, mlp.fc1_x.state_dict()[key]))
    else:
        for key, tensor in mlp.fc1.state_dict().items():
            gate_last = getattr(mlp, "gate_last", False)
            state[f"mlp.fc1.{key}"] = torch.cat(tensor.chunk(2)[::-1]) if gate_last else tensor
    state |= _named("mlp.norm", mlp.norm) | _named("mlp.fc2", mlp.fc2)
    for i in (1, 2):
        scale = _layer_scale(block, i)
        if scale is not None:
            state[f"ls{i}"] = scale
    return state


def _parallel_block(block: Any) -> dict[str, Tensor]:
    mlp_dim, dim = block.in_split[:2]
    state = _named("norm1", block.in_norm) | _named("attn.q_norm", block.q_norm) | _named("attn.k_norm", block.k_norm)
    if (fused := _fused_output(block)) is None:
        state |= _named("attn.proj", block.attn_out_proj) | _named("mlp.fc2", block.mlp_out_proj)
    else:
        state["attn.proj.weight"], state["mlp.fc2.weight"] = fused.weight.split((dim, mlp_dim), dim=1)
        if fused.bias is not None:
            state["attn.proj.bias"] = fused.bias
    state.setdefault("mlp.fc2.bias", block.in_norm.weight.new_zeros(dim))
    state |= _differential(block)
    for key, tensor in block.in_proj.state_dict().items():
        state[f"mlp.fc1.{key}"], state[f"attn.qkv.{key}"] = tensor.split((mlp_dim, 3 * dim))
    if block.mlp_bias is not None:
        state["mlp.fc1.bias"] = block.mlp_bias
    scale = _layer_scale(block, 1)
    if scale is not None:
        state["ls1"] = scale
    return state


def _fused_output(block: Any) -> nn.Linear | None:
    """The last layer of attention and MLP in one, as timm's parallel block may have it; its bias goes to attention."""
    return getattr(block, "out_proj", None)


def _differential(attention: Any) -> dict[str, Tensor]:
    """What differential attention has besides attention; nothing for other kinds."""
    if not hasattr(attention, "sub_norm"):
        return {}
    lambdas = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    return _named("attn.sub_norm", attention.sub_norm) | {f"attn.{name}": getattr(attention, name) for name in lambdas}


def _layer_scale(block: Any, branch: int) -> Tensor | None:
    if hasattr(block, f"gamma_{branch}"):
        return getattr(block, f"gamma_{branch}")
    scale = getattr(block, f"ls{branch}", None) or getattr(block, "ls", None)
    return getattr(scale, "gamma", None)


def _qkv(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the fused projection, whichever way timm stores them."""
    if attention.qkv is None:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        weight = torch.cat([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers]
    else:
        layers = (attention.qkv,)
        weight, biases = attention.qkv.weight, [attention.qkv.bias]
        if getattr(attention, "q_bias", None) is not None:
            biases = [attention.q_bias, None, attention.v_bias]
    for layer in layers:  # an adapter such as LoRA shows the weight that it adapts, without what it adds
        require(type(layer) is nn.Linear, f"a {type(layer).__name__} in its attention (merge adapters first)")
    if biases[0] is None:
        return weight, None
    return weight, torch.cat([torch.zeros_like(biases[0]) if bias is None else bias for bias in biases])


def _attention_pool(pool: Any, config: ViTConfig) -> dict[str, Tensor]:
    plain = pool.latent_len == 1 and pool.pos_embed is None and not config.gated_mlp
    mlp_dim = pool.mlp.fc1.out_features if pool.mlp is not None else 0
    require(plain and mlp_dim == config.mlp_dim, "an attention pool unlike SigLIP's")
    require(isinstance(pool.q_norm, nn.Identity), "q/k norm in its attention pool")
    return {f"attention_pool.{key}": tensor for key, tensor in pool.state_dict().items()}
