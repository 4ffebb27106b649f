"""What is not converted is observed, by any name and in memory."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vitreg.checkpoints import registry
from vitreg.checkpoints.files import WEIGHT_FILES
from vitreg.checkpoints.hub import DownloadError, downloading, in_checkpoint_folder, quiet_transformers, timm_name
from vitreg.checkpoints.loading import from_module, load
from vitreg.checkpoints.observed.inputs import guess_preprocess, image_tower
from vitreg.checkpoints.observed.observe import find_tower_blocks, observe
from vitreg.checkpoints.observed.observed_vit import ObservedViT
from vitreg.checkpoints.state import CheckpointError, conversion_errors
from vitreg.common.devices import resolve_device
from vitreg.model import VisionTransformer


def convert_or_observe(model: object) -> VisionTransformer | ObservedViT:
    """The model itself where it is ours or observed, a conversion where there is one, else the module observed.

    Raises:
        CheckpointError: it is no module, or has no patch tokens to observe.
    """
    if isinstance(model, ObservedViT):
        return model
    try:
        return from_module(model)
    except CheckpointError as refusal:
        if not isinstance(model, nn.Module):
            raise
        try:
            return observe(model)
        except CheckpointError as error:
            raise error from refusal


def load_or_observe(
    source: str,
    *,
    architecture: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[VisionTransformer | ObservedViT, str]:
    """As `load`; a model of timm or transformers that cannot be converted is observed, and the second value says why.

    Raises:
        CheckpointError: nothing has this name, it cannot be downloaded, or it has no patch tokens.
    """
    try:
        return load(source, architecture=architecture, device=device, dtype=dtype), ""
    except CheckpointError as refusal:
        if not can_be_observed(source, architecture, refusal):
            raise
        module, processor = _read(source, architecture)
        module = module.to(device=None if device is None else resolve_device(device), dtype=dtype).eval()
        preprocess = None if processor is None else guess_preprocess(image_tower(module)[1], module, processor)[0]
        observed = observe(module, preprocess=preprocess)
        observed.config = dataclasses.replace(observed.config, name=_named(source, observed.config.name))
        return observed, str(refusal)


def can_be_observed(source: str, architecture: str | None, refusal: CheckpointError) -> bool:
    """Whether a checkpoint that `load` refused is of timm or transformers, and there."""
    return not isinstance(refusal, DownloadError) and _library(source, architecture) is not None


def _named(source: str, name: str) -> str:
    """A source without its folder, and where in the model the image tower is."""
    path = name[name.index(" (") :] if " (" in name else ""
    return (Path(source).name if Path(source).exists() else timm_name(source)) + path


def _library(source: str, architecture: str | None) -> tuple[Literal["timm", "transformers"], str, Path | None] | None:
    """Which library builds a checkpoint, by which name, and its file or folder; None where it is of neither."""
    import timm

    path = Path(source).expanduser()
    stored = path if path.exists() else in_checkpoint_folder(source)
    if stored is not None and (stored / "config.json").is_file():
        return "transformers", str(stored), stored
    row = registry.find(source)
    name = architecture or (row.timm if row else timm_name(path.stem if path.suffix in WEIGHT_FILES else source))
    if timm.is_model(name.split(".")[0]):
        return "timm", name, stored
    is_repository = "/" in source and stored is None and not path.suffix and importlib.util.find_spec("transformers")
    return ("transformers", source, None) if is_repository else None


def _read(source: str, architecture: str | None) -> tuple[nn.Module, dict[str, Any] | None]:
    """A module of timm or transformers with its weights, and its processor's settings."""
    import timm

    found = _library(source, architecture)
    assert found is not None
    library, name, stored = found
    if library == "transformers":
        return _transformers_model(name, source)
    if stored is not None:
        with conversion_errors(str(stored), f"give the weights of timm's {name}", "does not fit"):
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(stored)}), None
    with torch.device("meta"):  # what has no patch tokens is refused before the weights are there
        find_tower_blocks(timm.create_model(name))
    with downloading(source, f"{name}.safetensors"):
        return timm.create_model(name, pretrained=True), None


def _transformers_model(repository: str, name: str) -> tuple[nn.Module, dict[str, Any] | None]:
    import transformers

    folder = f"the repository's folder (config.json, model.safetensors) as {name.replace('/', '--')}"
    with downloading(name, folder), quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(repository)
        kind: Any = getattr(transformers, next(iter(config.architectures or ()), ""), transformers.AutoModel)
        model = kind.from_pretrained(repository)
        cached = transformers.utils.hub.cached_file
        processor = cached(repository, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return model, None if processor is None else json.loads(Path(processor).read_text(encoding="utf-8"))
