"""timm's Vision Transformers (`VisionTransformer`, `Eva`), read off a module instance; its names."""

from __future__ import annotations

import difflib
import math
import warnings
from typing import Any

import torch
from torch import nn

from vitreg.checkpoints import registry
from vitreg.checkpoints.state import CheckpointError, build, check_norms, check_supported, conversion_errors, one_line
from vitreg.checkpoints.weight_names import TIMM
from vitreg.checkpoints.weights import KINDS, config_fields, join
from vitreg.model import PositionInterpolation, Preprocess, RopeConfig, VisionTransformer, ViTConfig
from vitreg.model.differential import lambda_init

POOLS: dict[str, Any] = {"token": "token", "avg": "mean", "map": "attention"}
ACTIVATIONS: dict[str, Any] = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
    "Swish": "silu",
}


POST_NORM = ("ResPostBlock", "EvaBlockPostNorm", "ResPostRelPosBlock")


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
            f"for other libraries use from_transformers, from_open_clip or from_state_dict",
            part=f"a class of its own, {type(model).__name__}",
        )
    cfg = getattr(model, "pretrained_cfg", None) or {}
    architecture = cfg.get("architecture") or ""
    name = ".".join(part for part in (architecture, cfg.get("tag")) if part)
    with conversion_errors(f"timm's {name or type(model).__name__}", "give it plain timm layers"):
        timm_model: Any = model
        _check_supported(timm_model)
        weights = TIMM.translate(model.state_dict())
        _make_alike(model, weights)
        image_size = _image_size(timm_model)
        state = join(weights, image_size)
        fields = config_fields(state) | _attributes(timm_model)
        fields["num_summary_tokens"] = int(hasattr(timm_model, "dist_token"))
        if (pooling := _attention_pool(timm_model)) is not None:
            _check_attention_pool(pooling, gated=fields["gated_mlp"])
        # The checkpoint's own evaluation transform, at the size that the model was built for.
        sized = {} if hasattr(timm_model, "embeds") else {"input_size": (3, *image_size)}
        preprocess = Preprocess.from_timm({**cfg, **sized}, multiple_of=fields["patch_size"])
        config = ViTConfig(**fields, image_size=image_size, preprocess=preprocess, name=name, architecture=architecture)
        return build(config, state, f"timm {architecture or type(model).__name__}")


def _make_alike(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Write weights of modules that compute as ours do with other weights as those."""
    if "rope_frequencies" in weights and model.rope.grid_indexing == "xy":  # columns first
        weights["rope_frequencies"] = weights["rope_frequencies"].flip(0)
    if "pos_embed_y" in weights:  # a sum of two, which is resized as each of them
        weights["pos_embed"] = weights.pop("pos_embed_y").unsqueeze(2) + weights.pop("pos_embed_x").unsqueeze(1)
    for path, module in model.named_modules():
        if getattr(module, "gate_last", False):
            for kind in KINDS:
                weights[f"{path}.fc1.{kind}"] = torch.cat(weights[f"{path}.fc1.{kind}"].chunk(2)[::-1])
        if (groups := getattr(module, "num_kv_groups", 1)) > 1:  # queries share keys and values: each gets its own
            for name in [f"{path}.{part}.{kind}" for part in "kv" for kind in KINDS]:
                if name in weights:
                    heads = weights[name].unflatten(0, (-1, module.head_dim))
                    weights[name] = heads.repeat_interleave(groups, 0).flatten(0, 1)
        if getattr(module, "gamma_1", None) is not None and module.gamma_2 is None:  # Sapiens2 scales attention only
            weights[f"{path}.ls2"] = torch.ones_like(weights[f"{path}.ls1"])


def is_readable(model: nn.Module) -> bool:
    """Whether the class is one that `from_timm` knows."""
    from timm.models.beit import Beit
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.naflexvit import NaFlexVit
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    return type(model) in (
        TimmVisionTransformer,
        VisionTransformerDistilled,
        VisionTransformerRelPos,
        Beit,
        Eva,
        NaFlexVit,
    )


def _is(module: nn.Module, *names: str) -> bool:
    return type(module).__name__ in names


def _is_rms(module: nn.Module) -> bool:
    return "rmsnorm" in type(module).__name__.lower()


def _embeddings(model: Any) -> Any:
    """What holds its tokens: a part of NaFlex models, else the model."""
    return getattr(model, "embeds", model)


def _attention_pool(model: Any) -> Any:
    return getattr(model, "attn_pool", None)


def _pools_prefix(model: Any) -> bool:
    """Whether its head reads the tokens before the patches besides these."""
    if _is(model, "Eva") and _attention_pool(model) is not None:
        return True
    return model.global_pool != "token" and getattr(model, "pool_include_prefix", False)


def _attributes(model: Any) -> dict[str, Any]:
    """The fields of `ViTConfig` that the weights do not tell."""
    block = model.blocks[0]
    attention = getattr(block, "attn", block)  # a parallel block is its own attention and MLP
    class_token = _embeddings(model).cls_token is not None
    pool = POOLS.get(model.global_pool, "token" if class_token else "mean")
    if pool == "attention" and class_token and _pools_prefix(model):
        pool = "token+attention"
    return {
        "num_heads": attention.num_heads,
        "pool": pool,
        "pool_heads": getattr(_attention_pool(model), "num_heads", 0),
        "key_bias": not hasattr(attention, "k_bias"),
        "activation": activation_name(block.mlp.act if hasattr(block, "mlp") else block.mlp_act),
        "norm_eps": (block.norm1 if hasattr(block, "norm1") else block.in_norm).eps,
        "post_norm": _is(block, *POST_NORM),
        "rope": _rope(model),
        "position_interpolation": _positions(model),
    }


def activation_name(act: nn.Module) -> Any:
    """Our name for a non-linearity."""
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    check_supported(type(act).__name__ in ACTIVATIONS, f"the activation {type(act).__name__}")
    return ACTIVATIONS[type(act).__name__]


def _check_supported(model: Any) -> None:
    """Refuse what neither weights nor attributes would tell."""
    check_supported(not hasattr(model, "dist_token") or model.reg_token is None, "registers and a distillation token")
    block, patch = model.blocks[0], getattr(model, "embeds", None) or model.patch_embed
    parallel = _is(block, "ParallelScalingBlock", "DiffParallelScalingBlock")
    check_supported(
        parallel or _is(block, "Block", "EvaBlock", "RelPosBlock", *POST_NORM), f"blocks of type {type(block).__name__}"
    )
    proj: Any = getattr(patch, "proj", None)
    # A linear one takes patches as a list of pixels, of three channels each.
    plain = isinstance(proj, nn.Conv2d) or (getattr(patch, "channels_last", False) and patch.norm_input is None)
    check_supported(plain and hasattr(patch, "norm"), f"a patch embedding {type(patch).__name__}")
    channels = getattr(patch, "in_chans", None) or proj.in_channels
    check_supported(channels == 3, f"{channels} input channels")
    check_supported(patch.patch_size[0] == patch.patch_size[1], f"patches of {patch.patch_size} pixels")
    attention = getattr(block, "attn", block)  # a parallel block is its own attention
    differential = _is(attention, "DiffAttention", "DiffParallelScalingBlock")
    if differential:
        _check_lambdas(model)
    if not parallel:
        kinds = ("Attention", "AttentionRope", "EvaAttention", "DiffAttention", "RelPosAttention")
        check_supported(_is(attention, *kinds), f"attention {type(attention).__name__}")
        check_supported(getattr(attention, "gate", None) is None, "gated attention")
        width = attention.proj.in_features
        check_supported(width == model.embed_dim, f"heads of {width // attention.num_heads} channels")
    rms_norm = _is_rms(block.in_norm if parallel else block.norm1)
    for name, module in model.named_modules():
        kind, place = type(module).__name__, name.rpartition(".")[2]
        alike = "norm" not in kind.lower() or _is_rms(module) is rms_norm or (differential and place == "sub_norm")
        check_supported(alike, f"LayerNorms and RMSNorms ({name})")
        # An adapter such as LoRA shows the weight that it adapts, without what it adds.
        plain = place not in ("qkv", "q_proj", "k_proj", "v_proj") or type(module) is nn.Linear
        check_supported(plain, f"a {kind} in its attention (merge adapters first)")
        check_supported(getattr(module, "mode", "cr") == "cr", "relative positions of Swin V2")
        shared = getattr(model, "rel_pos_bias", None)
        twice = shared is not None and place == "attn" and module.relative_position_bias_table is not None
        check_supported(not twice, "relative positions per block and shared ones")
    check_norms(model)
    check_supported(model.global_pool in (*POOLS, ""), f"global_pool={model.global_pool!r}")
    read_cls = _embeddings(model).cls_token is not None and _attention_pool(model) is not None
    more_than_cls = model.num_prefix_tokens > read_cls
    check_supported(not (_pools_prefix(model) and more_than_cls), "registers in its pooling")


def _check_lambdas(model: Any) -> None:
    for i, block in enumerate(model.blocks):
        attention = getattr(block, "attn", block)
        check_supported(not attention.dual_lambda, "differential attention with scalar lambdas (dual_lambda)")
        scheduled = math.isclose(attention.lambda_init, lambda_init(i))
        check_supported(scheduled, f"a lambda_init in block {i} that is not the paper's")


def _check_attention_pool(pool: Any, *, gated: bool) -> None:
    plain = pool.latent_len == 1 and pool.pos_embed is None and pool.mlp is not None and not gated
    check_supported(plain, "an attention pool unlike SigLIP's")
    check_supported(isinstance(pool.q_norm, nn.Identity), "q/k norm in its attention pool")


def _image_size(model: Any) -> tuple[int, int]:
    """(height, width) of the position table; NaFlex models have one whatever the images' size is."""
    embeds = getattr(model, "embeds", None)
    if embeds is None:
        return tuple(model.patch_embed.img_size)
    rows, columns = embeds.pos_embed_grid_size
    return rows * embeds.patch_size[0], columns * embeds.patch_size[1]


def _positions(model: Any) -> PositionInterpolation:
    embeds = getattr(model, "embeds", None)
    if embeds is None:
        return PositionInterpolation()
    if embeds.pos_embed_type == "factorized":
        rows, columns = embeds.pos_embed_grid_size
        kept = embeds.pos_embed_ar_preserving and rows != columns
        check_supported(not kept, f"positions of two axes of {rows} and {columns} patches that keep the aspect ratio")
        return PositionInterpolation("bilinear", antialias=False, square=embeds.pos_embed_ar_preserving)
    return PositionInterpolation(
        embeds.pos_embed_interp_mode,
        antialias=embeds.pos_embed_antialias,
        align_corners=embeds.pos_embed_align_corners,
        square=embeds.pos_embed_ar_preserving,
    )


def _rope(model: Any) -> RopeConfig | None:
    rope = getattr(model, "rope", None)
    if rope is None or _is(rope, "RotaryEmbeddingMixed"):
        return None
    interleaved = not model.blocks[0].attn.rotate_half  # what is applied; older ropes do not say it
    swap_axes = getattr(rope, "grid_indexing", "ij") == "xy"
    num = rope.dim // 4
    # From the attributes, not the buffer: the model may have no memory yet (device "meta").
    exponents = torch.arange(num, dtype=torch.float32, device="cpu") / num
    if _is(rope, "RotaryEmbeddingDinoV3"):
        normalized = rope.normalize_coords
        check_supported(normalized == "separate", f"RoPE coordinates normalized by {normalized!r}")
        if rope.min_period is not None and rope.max_period is not None:
            ratio = rope.max_period / rope.min_period
            periods = rope.min_period * ratio ** torch.linspace(0, 1, num, device="cpu")
        else:
            periods = rope.temperature**exponents
        frequencies = tuple((2 * math.pi / periods).tolist())
        return RopeConfig(frequencies, "centered", rope.grid_offset, None, interleaved, swap_axes)
    check_supported(_is(rope, "RotaryEmbeddingCat"), f"RoPE of type {type(rope).__name__}")
    grid_type = getattr(rope, "grid_type", "pixel" if rope.in_pixels else "index")  # the attribute is of timm 1.0.31
    check_supported(grid_type == "index", f"RoPE over a {grid_type!r} grid")
    frequencies = tuple((1.0 / rope.temperature**exponents).tolist())
    reference = tuple(rope.ref_feat_shape) if rope.ref_feat_shape is not None else None
    return RopeConfig(frequencies, "index", rope.grid_offset, reference, interleaved, swap_axes)


def empty_model(name: str, **options: Any) -> Any:
    """A model of timm on the device "meta": whatever vitreg does not read is refused here, before any download.

    Raises:
        CheckpointError: timm has no such architecture, cannot build it so, or it has a part that vitreg lacks.
    """
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise unknown_name(name)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated names; timm says it again when it loads them
            model = timm.create_model(name, **options)
    except Exception as error:
        raise CheckpointError(f"timm cannot build {name} ({one_line(error)}); check name and options") from error
    if not is_readable(model):
        raise CheckpointError(
            f"{name} is timm's {type(model).__name__}, not a Vision Transformer that vitreg reads; {_near(name)}"
        )
    from_timm(model)
    return model


def unknown_name(name: str) -> CheckpointError:
    """The error for a name that nothing has, with the nearest ones that load."""
    return CheckpointError(f"no checkpoint or architecture is called {name!r}; {_near(name)}")


def _near(name: str) -> str:
    import timm

    names = [model.name for model in registry.MODELS]
    for module in registry.MODULES:
        tagged = timm.list_models(module=module, pretrained=True, include_tags=True)
        names += [*tagged, *(tag.split(".")[0] for tag in tagged)]
    near = difflib.get_close_matches(name, dict.fromkeys(names), n=8)
    near = [other for other in near if not other.startswith("test_") and _loads(other)][:4]
    return f"did you mean {', '.join(near)}?" if near else "`vitreg models` lists names"


def _loads(name: str) -> bool:
    row = registry.find(name)
    try:
        return bool(row and row.bundled) or empty_model(row.timm if row else name, depth=1) is not None
    except CheckpointError:
        return False
