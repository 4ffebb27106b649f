"""One function for every name of weights, one for every model in memory."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitreg.checkpoints import registry
from vitreg.checkpoints.files import WEIGHT_FILES, is_vitreg_file, read_weights
from vitreg.checkpoints.from_open_clip import from_open_clip, open_clip_model
from vitreg.checkpoints.from_state_dict import from_state_dict
from vitreg.checkpoints.from_timm import empty_model, from_timm, unknown_name
from vitreg.checkpoints.from_transformers import find_tower, from_transformers, name_of_tower
from vitreg.checkpoints.hub import (
    downloading,
    import_optional,
    in_checkpoint_folder,
    quiet_transformers,
    timm_name,
    vitreg_weights,
)
from vitreg.checkpoints.processors import preprocess_from_processor
from vitreg.checkpoints.saving import config_from_metadata
from vitreg.checkpoints.state import CheckpointError, build
from vitreg.checkpoints.weight_names import TRANSFORMERS
from vitreg.common.devices import resolve_device
from vitreg.common.renamed import with_new_names
from vitreg.model import Preprocess, VisionTransformer

_CONVERTERS = {"timm": from_timm, "transformers": from_transformers, "open_clip": from_open_clip}


def load(
    source: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> VisionTransformer:
    """A checkpoint as a vitreg model, in evaluation mode.

    Args:
        source: a short name (`dinov2_vitl14_reg`; `vitreg models` lists them; `vitreg_tiny` and
            `vitreg_tiny_reg4` come with the package), a timm name (`vit_large_patch14_dinov2.lvd142m`), a hub
            repository (`facebook/dinov2-large`, `timm/...`, one that `push_to_hub` made),
            `open_clip:ARCH/PRETRAINED`, a file (`.safetensors`, `.pth`, a saved vitreg model), the folder of a
            training run, or one with transformers' `config.json`. The folder named by the environment variable
            `VITREG_CHECKPOINTS` is searched first, for `<source>.safetensors`, so that a machine without a
            network needs nothing else.
        architecture: timm's name, for a file that does not say what it is.
        device: where the model goes, also `auto`; the CPU by default.
        dtype: of the parameters; as stored by default.

    Raises:
        CheckpointError: nothing has this name, it cannot be downloaded, or it does not fit.
        ValueError: the device does not exist.
    """
    vit = _load(str(source), architecture)
    return vit.to(device=None if device is None else resolve_device(device), dtype=dtype).eval()


def from_module(model: object) -> VisionTransformer:
    """The model itself where it is ours, compiled or not; a conversion of one of timm, transformers or open_clip.

    Raises:
        CheckpointError: the model is of another kind, or has a part that vitreg does not implement.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, VisionTransformer):
        return model
    convert = _CONVERTERS.get(type(model).__module__.partition(".")[0])
    if convert is None or not isinstance(model, nn.Module):
        what = f"vitreg.load({model!r})" if isinstance(model, str) else "vitreg.load(NAME), or vitreg.from_state_dict"
        raise CheckpointError(
            f"a {type(model).__name__} is no model that vitreg reads; give one of timm, transformers or open_clip, or "
            f"{what}"
        )
    return convert(model)


def _load(source: str, architecture: str | None) -> VisionTransformer:
    path = Path(source).expanduser()
    if path.suffix in WEIGHT_FILES or path.is_file():
        return _from_file(path, architecture, name=_file_name(path))
    if is_vitreg_file(path / "model.safetensors"):  # the folder of a training run
        return _from_file(path / "model.safetensors", architecture, name=path.resolve().name)
    if (path / "config.json").is_file():
        text = (path / "config.json").read_text(encoding="utf-8")
        if (path / "checkpoints").is_dir() and '"vitreg-run/' in text:
            raise CheckpointError(f"{path} is a training run without a model yet; the first checkpoint brings one")
        return _from_hub(str(path), name=path.resolve().name)
    stored = in_checkpoint_folder(source)
    if source.startswith("open_clip:") and not (stored and (architecture or is_vitreg_file(stored))):
        return _named(from_open_clip(open_clip_model(source)), source)
    if stored is not None:
        name = timm_name(source)
        return _from_hub(str(stored), name) if stored.is_dir() else _from_file(stored, architecture, name)
    if (row := registry.find(source)) is not None:
        if row.bundled is not None:
            return _from_file(row.bundled, None, name=row.name).float()  # stored in half precision
        vit = _from_timm_name(row.timm)
        if row.interpolation is not None:
            vit.config = dataclasses.replace(vit.config, position_interpolation=row.interpolation)
        return _named(vit, row.name)
    name = timm_name(source)
    return _from_hub(name, name) if "/" in name else _from_timm_name(name)


def _file_name(path: Path) -> str:
    """What to call the weights of a file; the libraries' own names for files say nothing."""
    return path.resolve().parent.name if path.stem in ("model", "pytorch_model") else path.stem


def _named(vit: VisionTransformer, name: str) -> VisionTransformer:
    vit.config = dataclasses.replace(vit.config, name=name)
    return vit


def _from_file(path: Path, architecture: str | None, name: str) -> VisionTransformer:
    state, metadata = read_weights(path)
    if (config := config_from_metadata(metadata)) is not None:
        vit = build(config, with_new_names(state), str(path))
        return vit if config.name else _named(vit, name)
    named = _architecture_of(name)
    if named is None or registry.find(named) is None:  # a short name also says whose position rule it is
        named = metadata.get("architecture") or named
    architecture = architecture or named
    if architecture is None:
        raise CheckpointError(
            f"{path} does not say which architecture it is; give one, for example "
            f"architecture='vit_base_patch16_224' (on the command line --architecture)"
        )
    kwargs = json.loads(metadata.get("kwargs", "{}"))  # what `save(format="timm")` built timm's model with
    vit = from_state_dict(state, architecture, source=str(path), model_kwargs=kwargs)
    preprocess = _stored_preprocess(metadata, vit.preprocess)
    vit.config = dataclasses.replace(vit.config, preprocess=preprocess, name=name)
    return vit


def _architecture_of(name: str) -> str | None:
    """An architecture told by the name of the file: short, timm's with or without a tag, or the authors'."""
    import timm

    name = timm_name(name)
    known = registry.find(name) is not None or timm.is_model(name.split(".")[0])
    return name if known else registry.of_official_file(name)


def _stored_preprocess(metadata: dict[str, str], default: Preprocess) -> Preprocess:
    """Mean and standard deviation from a file's metadata, as comma-separated numbers or JSON."""
    found = {}
    for key in ("mean", "std"):
        numbers = [float(n) for n in metadata.get(key, "").strip("[]() ").replace(",", " ").split()]
        if numbers:
            found[key] = tuple(numbers * 3 if len(numbers) == 1 else numbers)
    return dataclasses.replace(default, **found)


def _from_timm_name(name: str) -> VisionTransformer:
    import timm

    base = name.split(".")[0]
    if not timm.is_model(base) or (name != base and name not in timm.list_pretrained(f"{base}.*")):
        raise unknown_name(name)
    options = registry.official_options(base)
    empty_model(name, **options)
    if not timm.models.is_model_pretrained(name):
        raise CheckpointError(f"timm has no weights for {name}; build it with timm and use from_timm")
    with downloading(name, f"{name}.safetensors"):
        return from_timm(timm.create_model(name, pretrained=True, **options))


def _from_hub(repository: str, name: str) -> VisionTransformer:
    """A model of ours or of transformers, from the hub or a folder."""
    if (weights := vitreg_weights(repository)) is not None:
        return _from_file(weights, None, name)
    transformers = import_optional("transformers", f"loading {name}", "transformers", ", or use a timm name")
    folder = f"the repository's folder (config.json, model.safetensors) as {name.replace('/', '--')}"
    with downloading(name, folder), quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(repository)
        # The class that was saved keeps its head: AutoModel would drop a classifier or CLIP's projection.
        kind: Any = getattr(transformers, next(iter(config.architectures or ()), ""), transformers.AutoModel)
        with torch.device("meta"):  # what vitreg does not read is refused before the weights are there
            empty: Any = kind.from_config(config) if kind is transformers.AutoModel else kind(config)
        from_transformers(empty)
        path, _ = find_tower(empty)
        prefix = f"{path}." if path else ""
        model: Any
        model, report = kind.from_pretrained(repository, output_loading_info=True)
        missing = [key for key in report["missing_keys"] if key.startswith(prefix)]
        if missing := [key for key in missing if TRANSFORMERS.ours(key.removeprefix(prefix)) is not None]:
            raise CheckpointError(
                f"{name} has no weights for {len(missing)} parameters of its {type(model).__name__}, for example "
                f"{min(missing)}; give a checkpoint that was saved whole"
            )
        cached = transformers.utils.hub.cached_file
        processor = cached(repository, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    vit = _named(from_transformers(model), name_of_tower(name, path))
    if processor is not None:
        text = Path(processor).read_text(encoding="utf-8")
        preprocess = preprocess_from_processor(json.loads(text), vit.config.patch_size)
        vit.config = dataclasses.replace(vit.config, preprocess=preprocess)
    return vit
