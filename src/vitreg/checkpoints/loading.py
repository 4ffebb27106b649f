"""One function for every source of weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import torch

from vitreg.checkpoints import registry
from vitreg.checkpoints.export import config_from_metadata
from vitreg.checkpoints.files import is_vitreg_file, read_weights
from vitreg.checkpoints.names import unknown_name
from vitreg.checkpoints.open_clip import from_open_clip
from vitreg.checkpoints.state import CheckpointError, build
from vitreg.checkpoints.state_dict import from_state_dict
from vitreg.checkpoints.timm import from_timm
from vitreg.checkpoints.transformers import from_transformers, preprocess_from_processor
from vitreg.model import Preprocess, VisionTransformer

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
FOLDER_VARIABLE = "VITREG_CHECKPOINTS"


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
            `vitreg_tiny_reg4` come with the package), a timm name
            (`vit_large_patch14_dinov2.lvd142m`), a hub repository (`facebook/dinov2-large`, `timm/...`),
            `open_clip:ARCH/PRETRAINED`, a file (`.safetensors`, `.pth`, a saved vitreg model), the folder of a
            training run, or one with transformers' `config.json`. The folder named by the environment variable
            `VITREG_CHECKPOINTS` is searched first, for `<source>.safetensors`, so that a machine without a
            network needs nothing else.
        architecture: timm's name, for a file that does not say what it is.
        device: where the model goes; the CPU by default.
        dtype: of the parameters; as stored by default.

    Raises:
        CheckpointError: nothing has this name, it cannot be downloaded, or it does not fit.
    """
    vit = _load(str(source), architecture)
    return vit.to(device=device, dtype=dtype).eval()


def _load(source: str, architecture: str | None) -> VisionTransformer:
    path = Path(source).expanduser()
    if path.suffix in WEIGHT_FILES or path.is_file():
        return _from_file(path, architecture, name=path.stem)
    if is_vitreg_file(path / "model.safetensors"):  # the folder of a training run
        return _from_file(path / "model.safetensors", architecture, name=path.name)
    if (path / "config.json").is_file():
        if (path / "checkpoints").is_dir() and '"vitreg-run/' in (path / "config.json").read_text():
            raise CheckpointError(f"{path} is a training run without a model yet; the first checkpoint brings one")
        return _from_hub(str(path))
    if (stored := in_checkpoint_folder(source)) is not None:
        if stored.is_dir():
            return _from_hub(str(stored))
        return _from_file(stored, architecture, name=_timm_name(source))
    if (row := registry.find(source)) is not None:
        if row.bundled is not None:
            return _from_file(row.bundled, None, name=row.name).float()  # stored in half precision
        vit = _from_timm_name(row.timm)
        if row.interpolation is not None:
            vit.config = dataclasses.replace(vit.config, position_interpolation=row.interpolation)
        vit.config = dataclasses.replace(vit.config, name=row.name)
        return vit
    if source.startswith("open_clip:"):
        return _from_open_clip_name(source)
    timm_name = _timm_name(source)
    if "/" in timm_name:
        return _from_hub(timm_name)
    return _from_timm_name(timm_name)


def _timm_name(source: str) -> str:
    return source.removeprefix("hf-hub:").removeprefix("timm/")


def in_checkpoint_folder(source: str) -> Path | None:
    """The file or transformers folder that `VITREG_CHECKPOINTS` holds for this source under any name."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    row = registry.find(source)
    for name in dict.fromkeys((source, _timm_name(source), (row and row.timm) or source)):
        name = name.replace(":", "/")
        for spelling in (name, name.replace("/", "--")):
            path = Path(folder).expanduser() / spelling
            for suffix in WEIGHT_FILES:
                if (file := path.with_name(path.name + suffix)).is_file():
                    return file
            if (path / "config.json").is_file():
                return path
    return None


def _from_file(path: Path, architecture: str | None, name: str) -> VisionTransformer:
    state, metadata = read_weights(path)
    if (config := config_from_metadata(metadata)) is not None:
        return build(config, state, str(path))
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
    """An architecture told by the name of the file: a short name, or a timm name with or without a tag."""
    import timm

    name = _timm_name(name)
    if registry.find(name) is not None or timm.is_model(name.split(".")[0]):
        return name
    return _OFFICIAL_FILES.get(name)


# File names of the official download pages.
_OFFICIAL_FILES = {
    "dino_deitsmall16_pretrain": "dino_vits16",
    "dino_deitsmall8_pretrain": "dino_vits8",
    "dino_vitbase16_pretrain": "dino_vitb16",
    "dino_vitbase8_pretrain": "dino_vitb8",
    **{
        f"dinov2_vit{size}14{reg4}_pretrain": f"dinov2_vit{size}14{reg}"
        for size in "sblg"
        for reg4, reg in (("", ""), ("_reg4", "_reg"))
    },
}


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
    if not timm.models.is_model_pretrained(name):
        raise CheckpointError(f"timm has no weights for {name}; build it with timm and use from_timm")
    try:
        with reachable_hub():
            model = timm.create_model(name, pretrained=True, **registry.official_options(base))
        return from_timm(model)
    except CheckpointError:
        raise
    except Exception as error:
        raise download_error(name, error) from error


def _from_hub(repository: str) -> VisionTransformer:
    try:
        import transformers
        from transformers.utils.hub import cached_file
    except ImportError as error:
        raise CheckpointError(
            f'loading {repository} needs transformers: pip install "vitreg[transformers]", or use a timm name'
        ) from error
    try:
        with reachable_hub():
            config = transformers.AutoConfig.from_pretrained(repository)
            # The class that was saved keeps its head: AutoModel would drop a classifier or CLIP's projection.
            saved = next(iter(config.architectures or ()), "")
            model = getattr(transformers, saved, transformers.AutoModel).from_pretrained(repository)
            processor = cached_file(repository, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    except Exception as error:
        raise download_error(repository, error) from error
    vit = from_transformers(model)
    if processor is not None:
        preprocess = preprocess_from_processor(json.loads(Path(processor).read_text()), vit.config.patch_size)
        vit.config = dataclasses.replace(vit.config, preprocess=preprocess)
    return vit


def _from_open_clip_name(source: str) -> VisionTransformer:
    architecture, _, pretrained = source.removeprefix("open_clip:").partition("/")
    try:
        import open_clip
    except ImportError as error:
        raise CheckpointError(f'loading {source} needs open_clip: pip install "vitreg[clip]"') from error
    if architecture not in open_clip.list_models():
        raise CheckpointError(f"open_clip has no architecture {architecture!r}; give open_clip:ARCH/PRETRAINED")
    try:
        with reachable_hub():
            model = open_clip.create_model(architecture, pretrained=pretrained or None)
        return from_open_clip(model)
    except CheckpointError:
        raise
    except Exception as error:
        raise download_error(source, error) from error


@contextlib.contextmanager
def reachable_hub() -> Iterator[None]:
    """Use only what is cached where the hub's name does not resolve, instead of a minute of retries."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if not proxied:
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, None)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def download_error(name: str, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return CheckpointError(
        f"could not get {name}: {reason}. Without a network, put {name.split('/')[-1]}.safetensors into the "
        f"folder that {FOLDER_VARIABLE} names"
    )
