"""Models to files: vitreg's own format, timm's and transformers'."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vitreg.checkpoints.state import CheckpointError
from vitreg.checkpoints.timm import from_timm
from vitreg.checkpoints.transformers import ACTIVATIONS, canonical_name
from vitreg.model import Preprocess, RopeConfig, VisionTransformer, ViTConfig

Format = Literal["vitreg", "timm", "transformers"]
_HERE = ("depth", "name", "architecture", "preprocess", "position_interpolation")
"""Fields of a config that a timm architecture need not match: free, or said elsewhere."""


class _Inexpressible(CheckpointError):
    """A format that has no place for a part of the model."""


def save(vit: VisionTransformer, path: str | os.PathLike[str], format: Format = "vitreg") -> None:
    """Write a model, registers included.

    At the checkpoint's own image size the written model gives the same tokens; at other sizes the other library
    resizes positions by its own rule. CLIP in transformers returns its tokens from before the last norm.

    Args:
        vit: the model.
        path: a `.safetensors` file; for `"transformers"` a folder.
        format: `"vitreg"` keeps everything; `"timm"` loads into timm's own class with the architecture and keyword
            arguments in the file's metadata; `"transformers"` is what `from_pretrained` reads.

    Raises:
        CheckpointError: the format cannot express the model, or the file cannot be written. No partial file is left.
    """
    path = Path(path)
    if format == "transformers":
        _save_transformers(vit, path)
        return
    if format not in ("vitreg", "timm"):
        raise CheckpointError(f"format {format!r} is unknown; choose vitreg, timm or transformers")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} must end in .safetensors for format {format!r}")
    if format == "vitreg":
        state, metadata = vit.state_dict(), {"config": json.dumps(vit.config.to_dict())}
    else:
        state, kwargs = to_timm_state(vit)
        metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in kwargs.items()}
        metadata |= {"mean": json.dumps(vit.preprocess.mean), "std": json.dumps(vit.preprocess.std)}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    _write(path, lambda temporary: save_file(tensors, temporary, {"format": format, **metadata}))


def config_from_metadata(metadata: Mapping[str, str] | None) -> ViTConfig | None:
    """The config in the metadata of a file that `save` wrote in vitreg's format; None for other files.

    Raises:
        CheckpointError: the config is damaged or from a newer vitreg.
    """
    if not metadata or metadata.get("format") != "vitreg":
        return None
    try:
        return ViTConfig.from_dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the file's vitreg config cannot be read: {error}") from error


def to_timm_state(vit: VisionTransformer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under timm's names, and how timm builds the model for them.

    Returns:
        The state dict, and `{"architecture": name, "kwargs": {...}}`:
        `timm.create_model(name, **kwargs).load_state_dict(state, strict=True)` gives the same model.

    Raises:
        CheckpointError: timm has no class for a part of the model.
    """
    architecture, kwargs, probe = _timm_architecture(vit.config)
    pieces = _pieces(vit)
    state = {}
    for key, like in probe.state_dict().items():
        if not key.startswith("blocks."):
            state[key] = _timm_tensor(pieces, "", key, like)
            continue
        for i in range(vit.config.depth):
            rest = key.removeprefix("blocks.0.")
            state[f"blocks.{i}.{rest}"] = _timm_tensor(pieces, f"blocks.{i}.", rest, like)
    return state, {"architecture": architecture, "kwargs": kwargs}


def _write(path: Path, write: Any) -> None:
    """Write beside the target and rename, so that a reader sees the whole of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if temporary.is_dir():
            path.mkdir(exist_ok=True)
            for file in temporary.iterdir():
                os.replace(file, path / file.name)
        else:
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _pieces(vit: VisionTransformer) -> dict[str, Tensor]:
    """Our tensors, and besides queries, keys, values, gates and values apart, as other libraries store them."""
    pieces = {key: tensor.detach() for key, tensor in vit.state_dict().items()}
    config = vit.config
    for block in (f"blocks.{i}." for i in range(config.depth)):
        for key in ("weight", "bias"):
            qkv, fc1 = pieces.get(f"{block}attn.qkv.{key}"), pieces.get(f"{block}mlp.fc1.{key}")
            if qkv is not None:
                q, k, v = qkv.chunk(3)
                if key == "bias" and not config.key_bias:
                    k = torch.zeros_like(k)
                    pieces[f"{block}attn.qkv.{key}"] = torch.cat((q, k, v))
                pieces |= {f"{block}attn.{name}.{key}": part for name, part in (("q", q), ("k", k), ("v", v))}
            if fc1 is not None:
                gate, up = fc1.chunk(2) if config.gated_mlp else (None, fc1)
                pieces[f"{block}mlp.up.{key}"] = up
                if gate is not None:
                    pieces[f"{block}mlp.gate.{key}"] = gate
    return pieces


def _get(pieces: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    """A piece; what the model does not have is filled with what changes nothing: no shift, a scale of one."""
    if key in pieces:
        return pieces[key].reshape(like.shape)
    assert key.endswith(".bias") or "scale" in key, key
    dtype, device = pieces["patch_embed.weight"].dtype, pieces["patch_embed.weight"].device
    return torch.full(like.shape, float("scale" in key), dtype=dtype, device=device)


def _with_prefix(positions: Tensor, length: int) -> Tensor:
    """Zero positions for the tokens before the patches: theirs are inside the tokens already."""
    num_prefix = length - positions.shape[1]
    return torch.cat((positions.new_zeros(1, num_prefix, positions.shape[2]), positions), dim=1)


_TIMM_NAMES = {
    "reg_token": "registers",
    "patch_embed.proj": "patch_embed",
    "norm_pre": "pre_norm",
    "fc_norm": "pool_norm",
    "ls1.gamma": "scale1",
    "ls2.gamma": "scale2",
    "ls.gamma": "scale1",
    "gamma_1": "scale1",
    "gamma_2": "scale2",
    "attn.q_proj": "attn.q",
    "attn.k_proj": "attn.k",
    "attn.v_proj": "attn.v",
    "attn.q_bias": "attn.q.bias",
    "attn.v_bias": "attn.v.bias",
    "mlp.fc1_g": "mlp.gate",
    "mlp.fc1_x": "mlp.up",
    "in_norm": "norm1",
    "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm",
    "attn_out_proj": "attn.proj",
    "mlp_out_proj": "mlp.fc2",
    "mlp_bias": "mlp.fc1.bias",
}


def _timm_tensor(pieces: Mapping[str, Tensor], block: str, key: str, like: Tensor) -> Tensor:
    if key == "pos_embed":
        return _with_prefix(pieces["positions"], like.shape[1])
    name, _, kind = key.rpartition(".")
    if name == "in_proj":  # the parallel block's first layer: MLP and attention together
        return torch.cat((pieces[f"{block}mlp.fc1.{kind}"], pieces[f"{block}attn.qkv.{kind}"]))
    if not block and key.startswith("attn_pool."):
        return pieces["attention_pool." + key.removeprefix("attn_pool.")]
    return _get(pieces, block + _TIMM_NAMES.get(key, f"{_TIMM_NAMES.get(name, name)}.{kind}" if name else key), like)


def _timm_architecture(config: ViTConfig) -> tuple[str, dict[str, Any], nn.Module]:
    """The first architecture that reads back as this config, its keyword arguments, and its model of one block."""
    import timm

    pools = {"token": "token", "mean": "avg", "attention": "map"}
    if config.pool not in pools:
        raise _inexpressible(config, "timm", f"pool={config.pool!r}")
    generic = (
        "vit_base_patch16_224",
        "vit_base_patch16_clip_224",  # epsilon 1e-5
        "vit_giant_patch14_dinov2",  # SwiGLU
        "vit_pwee_patch16_reg1_gap_256",  # parallel blocks
        "eva02_base_patch14_224",  # RoPE, norms inside attention and MLP
        "vit_small_patch16_dinov3",  # RoPE, epsilon 1e-5
    )
    differences: list[list[str]] = []
    for name in dict.fromkeys((config.architecture, *generic)):
        if not timm.is_model(name):
            continue
        eva = timm.models.model_entrypoint(name).__module__.endswith(".eva")
        if eva is not (config.rope is not None) and name != config.architecture:
            continue
        kwargs = _shared_kwargs(config, pools[config.pool])
        kwargs |= _eva_kwargs(config) if eva else _vit_kwargs(config)
        probe = timm.create_model(name, **{**kwargs, "depth": 1})
        different = _differences(config, from_timm(probe).config)
        if not different:
            return name, kwargs, probe
        differences.append(different)
    raise _inexpressible(config, "timm", ", ".join(min(differences, key=len)))


def _differences(ours: ViTConfig, theirs: ViTConfig) -> list[str]:
    """Fields in which an architecture cannot be what the config asks for, as `name=value`."""
    found = []
    for field in dataclasses.fields(ViTConfig):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name == "pool_heads":
            a, b = (c.pool_heads or c.num_heads if c.pool == "attention" else 0 for c in (ours, theirs))
        elif field.name == "rope" and ours.rope and theirs.rope:
            a, b = ours.rope, _snap(theirs.rope, ours.rope)
        elif field.name.endswith("_bias") and not a:
            continue  # written as zeros where the architecture has one
        elif field.name == "key_bias" and not ours.qkv_bias:
            continue
        if a != b and field.name not in _HERE:
            found.append(f"{field.name}={a!r}")
    return found


def _snap(rope: RopeConfig, to: RopeConfig) -> RopeConfig:
    """The same, with the other's frequencies where they differ by rounding only."""
    pairs = zip(rope.frequencies, to.frequencies, strict=False)
    same = len(rope.frequencies) == len(to.frequencies) and all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)
    return dataclasses.replace(rope, frequencies=to.frequencies) if same else rope


def _ratio(config: ViTConfig) -> float:
    """An MLP ratio that truncates to exactly `mlp_dim`."""
    ratio = config.mlp_dim / config.embed_dim
    return ratio if int(config.embed_dim * ratio) == config.mlp_dim else (config.mlp_dim + 0.5) / config.embed_dim


def _shared_kwargs(config: ViTConfig, global_pool: str) -> dict[str, Any]:
    kwargs = dict(
        img_size=list(config.image_size),
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=config.num_classes,
        global_pool=global_pool,
        class_token=config.class_token,
        qkv_bias=config.qkv_bias,
        init_values=1e-5 if config.layer_scale else None,
        no_embed_class=False,
        dynamic_img_size=True,
    )
    return kwargs | ({"qk_norm": True} if config.qk_norm else {})


def _vit_kwargs(config: ViTConfig) -> dict[str, Any]:
    kwargs = dict(
        reg_tokens=config.num_registers,
        mlp_ratio=_ratio(config) * (1 + config.gated_mlp),
        proj_bias=config.proj_bias or config.mlp_bias,
        pos_embed="learn" if config.learned_positions else "none",
        pre_norm=config.pre_norm,
        final_norm=config.final_norm or config.pool_norm,
        fc_norm=config.pool_norm,
        act_layer=config.activation,
    )
    norms = {"scale_attn_norm": config.attention_norm, "scale_mlp_norm": config.mlp_norm}
    return kwargs | {key: True for key, wanted in norms.items() if wanted}


def _eva_kwargs(config: ViTConfig) -> dict[str, Any]:
    kwargs = dict(
        num_reg_tokens=config.num_registers,
        mlp_ratio=_ratio(config),
        swiglu_mlp=config.gated_mlp,
        swiglu_align_to=0,
        scale_mlp=config.mlp_norm,
        scale_attn_inner=config.attention_norm,
        # timm's EVA attention has no bias on keys.
        attn_type="rope" if config.qkv_bias and config.key_bias else "eva",
        qkv_fused=True,
        use_abs_pos_emb=config.learned_positions,
        use_rot_pos_emb=config.rope is not None,
        use_pre_transformer_norm=config.pre_norm,
        use_post_transformer_norm=config.final_norm,
        use_fc_norm=config.pool_norm,
    )
    if config.rope is not None:
        rope = config.rope
        kwargs |= dict(
            rope_type="dinov3" if rope.coordinates == "centered" else "cat",
            rope_temperature=_theta(rope),
            rope_grid_offset=rope.offset,
            rope_grid_indexing="xy" if rope.swap_axes else "ij",
            rope_rotate_half=not rope.interleaved,
            ref_feat_shape=rope.reference_grid and list(rope.reference_grid),
        )
    return kwargs


def _theta(rope: RopeConfig) -> float:
    """The base of geometric frequencies `scale * theta^(-j / n)`."""
    num = len(rope.frequencies)
    return round((rope.frequencies[0] / rope.frequencies[1]) ** num, 3) if num > 1 else 100.0


def _save_transformers(vit: VisionTransformer, folder: Path) -> None:
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
    state = {key: _transformers_tensor(pieces, key, like) for key, like in model.state_dict().items()}
    model.load_state_dict(state, assign=True)

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        if (processor := _processor(vit.preprocess)) is not None:
            (temporary / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))

    _write(folder, write)


def _transformers_pieces(vit: VisionTransformer) -> dict[str, Tensor]:
    config, pieces = vit.config, _pieces(vit)
    for key in ("weight", "bias"):
        if config.pool_norm:
            pieces[f"norm.{key}"] = pieces[f"pool_norm.{key}"]
        if config.pool == "attention":
            parts = [pieces[f"attention_pool.{part}.{key}"] for part in ("q", "kv")]
            pieces[f"attention_pool.in_proj_{key}"] = torch.cat(parts)
    return pieces


def _transformers_tensor(pieces: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    name = canonical_name(key)
    if name is None or (name.startswith("attention_pool.") and name not in pieces):
        # The mask token of pretraining, and the pool that SigLIP's classifier carries along unused.
        return pieces["patch_embed.weight"].new_zeros(like.shape)
    if name == "positions":
        return _with_prefix(pieces["positions"], like.shape[-2]).reshape(like.shape)
    if name == "head.weight" and pieces[name].shape != like.shape:
        return _widened(pieces[name], like)
    return _get(pieces, name, like)


def _widened(head: Tensor, like: Tensor) -> Tensor:
    """A head that reads the class token, for DINOv2's, which reads the mean of the patches as well."""
    return torch.cat((head, head.new_zeros(like.shape[0], like.shape[1] - head.shape[1])), dim=1)


def _transformers_class(vit: VisionTransformer) -> tuple[str, dict[str, Any]]:
    """The class that expresses the model, and the arguments of its config."""
    c = vit.config

    def refuse(condition: bool, what: str) -> None:
        if condition:
            raise _inexpressible(c, "transformers", what)

    refuse(c.parallel, "parallel blocks")
    refuse(c.qk_norm or c.attention_norm or c.mlp_norm, "norms inside attention or MLP")
    refuse(c.grid[0] != c.grid[1], f"a position grid of {c.grid[0]} x {c.grid[1]}")
    acts = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    common = dict(
        hidden_size=c.embed_dim,
        num_hidden_layers=c.depth,
        num_attention_heads=c.num_heads,
        hidden_act=acts[c.activation],
        layer_norm_eps=c.norm_eps,
        image_size=c.image_size[0],
        patch_size=c.patch_size,
    )
    wide = common | {"intermediate_size": c.mlp_dim}
    head = {"num_labels": c.num_classes} if c.num_classes else {}
    if c.rope is not None:
        return "DINOv3ViTModel", wide | _dinov3(c, refuse)
    refuse(not c.learned_positions, "no positions")
    if not c.class_token or c.pre_norm:
        refuse(c.num_registers > 0, "registers without DINOv2's class token and first norm")
        refuse(c.layer_scale or c.gated_mlp, "LayerScale or a gated MLP in CLIP or SigLIP")
    if not c.class_token:
        refuse(not c.final_norm or c.pool_norm or c.pre_norm, "SigLIP with other norms")
        refuse(c.pool == "attention" and bool(head), "a head after the attention pool")
        refuse(c.pool_heads not in (0, c.num_heads), "an attention pool with other heads")
        if head:
            return "SiglipForImageClassification", {"vision_config": wide, **head}
        return "SiglipVisionModel", wide | {"vision_use_head": c.pool == "attention"}
    if c.pre_norm:
        refuse(c.pool != "token" or c.final_norm == c.pool_norm, "CLIP with another pool")
        refuse(c.patch_bias, "CLIP with a bias of its patches")
        bias = None if vit.head is None else vit.head.bias
        refuse(bias is not None and bool(bias.any()), "CLIP with a bias of its projection")
        projection = {"projection_dim": c.num_classes} if head else {}
        return ("CLIPVisionModelWithProjection" if head else "CLIPVisionModel"), wide | projection
    refuse(not c.final_norm or c.pool_norm, "a norm after pooling")
    refuse(c.pool == "attention", "an attention pool beside a class token")
    bias = {"qkv_bias": c.qkv_bias}
    if not (c.num_registers or c.layer_scale or c.gated_mlp) and (not head or c.pool == "token"):
        return ("ViTForImageClassification" if head else "ViTModel"), wide | bias | head
    refuse(bool(head) and c.pool == "mean", "a head that reads the mean of the patches")
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
    raise _inexpressible(c, "transformers", f"a gated MLP of {c.mlp_dim} units on {c.embed_dim} channels")


def _dinov3(c: ViTConfig, refuse: Any) -> dict[str, Any]:
    rope = c.rope
    assert rope is not None
    theta, num = _theta(rope), len(rope.frequencies)
    plain = RopeConfig(tuple(2 * math.pi / theta ** (j / num) for j in range(num)))
    refuse(_snap(plain, rope) != rope, "RoPE other than DINOv3's")
    refuse(c.learned_positions, "RoPE and learned positions")
    refuse(not c.class_token or c.pre_norm or c.pool_norm or not c.final_norm, "DINOv3 with other norms or tokens")
    refuse(c.num_classes > 0, "a head on DINOv3")
    return dict(
        rope_theta=theta,
        query_bias=c.qkv_bias,
        value_bias=c.qkv_bias,
        key_bias=c.qkv_bias and c.key_bias,
        proj_bias=c.proj_bias,
        mlp_bias=c.mlp_bias,
        use_gated_mlp=c.gated_mlp,
        num_register_tokens=c.num_registers,
    )


def _processor(preprocess: Preprocess) -> dict[str, Any] | None:
    """A `preprocessor_config.json`; None where transformers has no processor that does the same."""
    (height, width), fraction = preprocess.size, preprocess.crop_fraction
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


def _inexpressible(config: ViTConfig, format: str, what: str) -> CheckpointError:
    others = "'vitreg'"
    if format == "transformers":
        try:
            _timm_architecture(config)
            others = "'vitreg' or 'timm'"
        except _Inexpressible:
            pass
    return _Inexpressible(f"format {format!r} cannot express {what}; save with format={others}")
