"""State dicts of timm and of the official repositories, by the name of their architecture."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitreg.checkpoints import registry
from vitreg.checkpoints.files import unwrap
from vitreg.checkpoints.from_timm import empty_model, from_timm, unknown_name
from vitreg.checkpoints.state import CheckpointError, check_keys, conversion_errors
from vitreg.model import VisionTransformer, ViTConfig


def from_state_dict(
    state: Mapping[str, Any],
    architecture: str,
    *,
    source: str = "the state dict",
    model_kwargs: Mapping[str, Any] | None = None,
) -> VisionTransformer:
    """A model from weights in memory.

    The names of the weights may be those of timm or of the official repositories of DINO, DINOv2, DINOv3,
    DeiT, DeiT-III, MAE, CLIP and open_clip, also wrapped (`{"model": ...}`, `module.`). Weights of an
    official repository get its own position interpolation.

    Args:
        state: names to tensors.
        architecture: timm's name (`vit_large_patch14_reg4_dinov2`, a tag may follow) or a short name of
            `vitreg models`.
        source: what to call the weights in a message.
        model_kwargs: for `timm.create_model`, where the model departs from its architecture.

    Raises:
        CheckpointError: the architecture is unknown or does not fit; names at most five missing and five
            unexpected keys.
    """
    import timm

    row = registry.find(architecture)
    name = row.timm if row else architecture.removeprefix("timm/").removeprefix("hf-hub:timm/")
    base = name.split(".")[0]
    if not timm.is_model(base):
        raise unknown_name(architecture)
    weights = unwrap(dict(state), source)
    dialect = _dialect(weights)
    if dialect == "transformers":
        raise CheckpointError(
            f"{source} has transformers' names; load its folder with config.json, or use from_transformers(model)"
        )
    if dialect == "MAE":
        weights = {k: v for k, v in weights.items() if not k.startswith("decoder_") and k != "mask_token"}
    if dialect == "DINOv3" and not base.endswith("_qkvb") and timm.is_model(f"{base}_qkvb"):
        name = base = f"{base}_qkvb"  # the architectures without suffix drop biases that the official weights have
    with conversion_errors(source, "check `architecture`", "does not fit the architecture"):
        model = _model_of_size(name, base, weights, dict(model_kwargs or {}))
        translated = _translate(weights, model)
    check_keys(translated, model.state_dict(), source)
    try:
        model.load_state_dict(translated, assign=True)
    except RuntimeError as error:
        shapes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise CheckpointError(f"{source} is not a {base}: {'; '.join(shapes[:5]) or error}") from error
    vit = from_timm(model)
    vit.config = _official(vit, dialect, weights, row)
    return vit


def _dialect(weights: Mapping[str, Tensor]) -> str:
    """Whose names these are; timm's serve DINO and DeiT too."""
    if "storage_tokens" in weights:
        return "DINOv3"
    if any(key.startswith("decoder_blocks.") for key in weights):
        return "MAE"
    if "mask_token" in weights or "register_tokens" in weights:
        return "DINOv2"
    if any("embeddings.patch_embedding" in key or "embeddings.cls_token" in key for key in weights):
        return "transformers"
    return "timm"


def _model_of_size(name: str, base: str, weights: Mapping[str, Tensor], model_kwargs: dict[str, Any]) -> Any:
    """A timm model without memory for weights, of the size and with the head of this state dict."""
    import timm

    head, projection = weights.get("head.weight"), weights.get("visual.proj", weights.get("proj"))
    num_classes = head.shape[0] if head is not None else projection.shape[1] if projection is not None else 0
    options = {} if num_classes else registry.official_options(base)
    options |= {"num_classes": num_classes, **model_kwargs}
    known = name if timm.models.is_model_pretrained(name) else base
    model = empty_model(known, **options)
    positions = next((weights[key] for key in _POSITIONS if key in weights), None)
    if positions is not None and model.pos_embed is not None:
        side = _grid_side(positions.shape[-2])
        if side and side != model.patch_embed.grid_size[0]:
            model = empty_model(known, **options | {"img_size": side * model.patch_embed.patch_size[0]})
    return model


# timm's, and those of CLIP's image tower; a whole CLIP has the text tower's under the last name.
_POSITIONS = ("pos_embed", "visual.trunk.pos_embed", "visual.positional_embedding", "positional_embedding")


def _grid_side(num_positions: int) -> int | None:
    """Side of the square grid behind a position table, which may hold one entry for the class token."""
    for prefix in (0, 1):
        side = math.isqrt(num_positions - prefix)
        if side * side == num_positions - prefix:
            return side
    return None


def _translate(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """To timm's names, by timm's own converters."""
    from timm.models import vision_transformer

    weights = dict(weights)
    if "class_embedding" in weights and "conv1.weight" in weights:
        weights = {f"visual.{key}": tensor for key, tensor in weights.items()}
    translate = sys.modules[type(model).__module__].checkpoint_filter_fn
    if translate is vision_transformer.checkpoint_filter_fn:
        return translate(weights, model, adapt_layer_scale=True)  # it only renames DeiT-III's gamma_1 and gamma_2
    return translate(weights, model)


def _official(
    vit: VisionTransformer, dialect: str, weights: Mapping[str, Tensor], row: registry.Model | None
) -> ViTConfig:
    """The config with what the official repository does differently from timm."""
    config = vit.config
    first_dinov2 = dialect == "DINOv2" and not config.num_registers
    if rule := registry.OFFICIAL_POSITIONS if first_dinov2 else row and row.interpolation:
        config = dataclasses.replace(config, position_interpolation=rule)
    periods = weights.get("rope_embed.periods")
    if config.rope is not None and periods is not None:
        # The official buffer is rounded to bfloat16, and the weights were trained with it.
        frequencies = tuple((2 * math.pi / periods.float()).tolist())
        config = dataclasses.replace(config, rope=dataclasses.replace(config.rope, frequencies=frequencies))
    return config
