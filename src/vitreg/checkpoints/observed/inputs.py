"""How modules of other libraries take images, and how these are made."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitreg.checkpoints.observed.blocks import Call
from vitreg.checkpoints.processors import FILTERS, preprocess_from_processor
from vitreg.checkpoints.state import CheckpointError
from vitreg.model import Preprocess
from vitreg.model.preprocess import IMAGENET_MEAN, IMAGENET_STD

TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "image_encoder")
"""What models of images and other things call the part for images."""

OFF: dict[str, Any] = {"skip_predictor": True, "use_cache": False}
"""Arguments that switch off what no image needs."""


def image_tower(module: nn.Module) -> tuple[str, nn.Module]:
    """The part of a model that takes images, and its path ("" for the module itself)."""
    for outer in ("", "model."):
        for name in TOWERS:
            try:
                tower = module.get_submodule(outer + name)
            except AttributeError:
                continue
            return outer + name, tower
    prefix = getattr(module, "base_model_prefix", "")  # of transformers: what its heads stand on
    inner = getattr(module, prefix, None) if prefix else None
    return (prefix, inner) if isinstance(inner, nn.Module) else ("", module)


def input_dtype(module: nn.Module) -> torch.dtype:
    """Of the first floating weight, or scale: quantized weights are integers."""
    weights = itertools.chain(module.parameters(), module.buffers())
    return next((weight.dtype for weight in weights if weight.is_floating_point()), torch.get_default_dtype())


def how_to_call(module: nn.Module) -> tuple[Call, bool]:
    """Runs a module on normalized images: as they are, as lists of patches or as still videos; whether as these."""
    config: Any = getattr(module, "config", None)
    parameters = inspect.signature(module.forward).parameters
    off = {name: value for name, value in OFF.items() if name in parameters}
    if "grid_thw" in parameters:
        return lambda images: module(*patch_lists(images, config), **off), False
    if "pixel_values_videos" in parameters and hasattr(config, "tubelet_size"):
        frames = config.tubelet_size
        return lambda images: module(pixel_values_videos=_still(images, frames), **off), True
    if "pixel_values" in parameters and hasattr(config, "num_frames"):
        return lambda images: module(pixel_values=_still(images, config.num_frames), **off), True
    if "pixel_values" in parameters:
        return lambda images: module(pixel_values=images, **off), False
    return lambda images: module(images, **off), False


def _still(images: Tensor, frames: int) -> Float[Tensor, "B T 3 H W"]:
    """A video in which nothing moves."""
    return images.unsqueeze(1).expand(-1, frames, -1, -1, -1)


def patch_lists(images: Float[Tensor, "B 3 H W"], config: Any) -> tuple[Float[Tensor, "N P"], Int[Tensor, "B 3"]]:
    """Patches and grids as the processors of Qwen2-VL and its descendants make them of normalized images.

    Patches that will be merged follow each other, and a still image is repeated for the two frames of a patch. Source:
    transformers 5 `models/qwen2_vl/image_processing_qwen2_vl.py: patchify`.
    """
    patch = config.patch_size
    merge, frames = getattr(config, "spatial_merge_size", 1), getattr(config, "temporal_patch_size", 1)
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    if rows % merge or columns % merge:
        raise ValueError(f"images of {height} x {width} pixels are no whole groups of {merge} x {merge} patches")
    split = images.reshape(batch, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    grouped = split.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, frames, -1, -1)
    grids = torch.tensor([[1, rows, columns]] * batch, device=images.device)
    return grouped.reshape(batch * rows * columns, -1), grids


def guess_preprocess(
    module: nn.Module, outer: nn.Module, processor: Mapping[str, Any] | None = None
) -> tuple[Preprocess, str]:
    """How images become the module's input, and where that is from, in words.

    Args:
        module: that takes images.
        outer: the model that it is a part of.
        processor: its `preprocessor_config.json`, where there is one.
    """
    if type(module).__module__.startswith("timm."):
        from timm.data.config import resolve_model_data_config

        preprocess = Preprocess.from_timm(resolve_model_data_config(module))
        built_for = getattr(getattr(module, "patch_embed", None), "img_size", None)
        return preprocess.with_size(*(built_for or preprocess.size)), "preprocessing as timm says"
    if type(module).__module__.startswith("open_clip."):
        from vitreg.checkpoints.from_open_clip import preprocess_of_tower

        return preprocess_of_tower(module, 1), "preprocessing as open_clip says"
    config: Any = getattr(module, "config", None)
    step = config.patch_size if isinstance(getattr(config, "patch_size", None), int) else 1
    merge = getattr(config, "spatial_merge_size", 1)
    built_for = _side(config)
    size = built_for or ((448, 448) if merge > 1 else (224, 224))
    step *= merge
    height, width = (max(side - side % step, step) for side in size)
    said = processor or _default_processor(outer)
    if not said:
        assumed = f"images squashed to {height} x {width} pixels and ImageNet's mean and deviation are assumed"
        return Preprocess((height, width), crop="squash", crop_pct=1.0, multiple_of=step), assumed
    source = "preprocessing as its processor says" if processor else "preprocessing as its processor's defaults say"
    try:
        preprocess = preprocess_from_processor(said, step)
    except CheckpointError:
        mean, std = said.get("image_mean") or IMAGENET_MEAN, said.get("image_std") or IMAGENET_STD
        filter_ = FILTERS.get(int(said.get("resample", 3)), "bicubic")
        preprocess = Preprocess((height, width), tuple(mean), tuple(std), filter_, 1.0, "squash", step)
        return preprocess, f"{source}, but images squashed to {height} x {width} pixels"
    # A module may be built for another size than its class's processor makes.
    return preprocess if processor or not built_for else preprocess.with_size(height, width), source


def _side(config: Any) -> tuple[int, int] | None:
    """(height, width) in pixels that a config of transformers tells."""
    for name in ("image_size", "crop_size"):
        size = getattr(config, name, None) or getattr(getattr(config, "backbone_config", None), name, None)
        if size:
            return (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return None


def _default_processor(module: nn.Module) -> dict[str, Any] | None:
    """What the image processor of a transformers class does where nothing else is said."""
    if not type(module).__module__.startswith("transformers."):
        return None
    import transformers
    from transformers.models.auto import image_processing_auto

    processors: Any = image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]
    kind = getattr(getattr(module, "config", None), "model_type", "")
    while kind and kind not in processors:
        kind = kind.rpartition("_")[0]  # qwen2_5_vl_vision is a part of qwen2_5_vl
    names = processors.get(kind)
    name = names.get("torchvision") if isinstance(names, Mapping) else names and names[-1]
    if not name or "Video" in name:
        return None
    processor = getattr(transformers, name, None)
    fields = ("size", "crop_size", "do_center_crop", "do_resize", "do_normalize", "resample", "image_mean", "image_std")
    found = {field: value for field in fields if (value := getattr(processor, field, None)) is not None}
    return found or None
