"""What vitreg reads of the libraries that are installed: every model of theirs with a Vision Transformer.

They are built on the device "meta", small where that can be asked for: what is refused is decided by modules and
shapes alone.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from vitreg.checkpoints.from_open_clip import from_open_clip
from vitreg.checkpoints.from_timm import from_timm
from vitreg.checkpoints.from_transformers import from_transformers
from vitreg.checkpoints.hub import quiet_transformers
from vitreg.checkpoints.state import CheckpointError

TIMM_MODULES = (
    *("vision_transformer", "eva", "beit", "deit", "naflexvit", "vision_transformer_relpos"),
    *("vision_transformer_hybrid", "cait", "qwen3_vit", "gemma4_vit", "deepseek_vit"),
    *("vision_transformer_sam", "hiera", "vitamin", "convit", "tnt", "xcit"),
)
"""timm's modules with Vision Transformers; those of the last line have windows, stages or another attention."""

AUDIO = ("audio_spectrogram_transformer", "clap")
"""transformers' modules whose patches are of spectrograms."""

_SMALL = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    **{"image_size": 56, "patch_size": 14, "patch_dim": 3 * 14**2},
}
_SMALL_TEXT = {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1}

Status = Literal["converted", "refused"]
STATUSES = get_args(Status)
_INTRODUCTION = """
Every model with a Vision Transformer, built without weights by `vitreg models --coverage`, which asks the libraries
that *you* have installed. *Converted* is all of vitreg: diagnosis, fix, discovery, probes, `save`. Of a whole model
that is converted, the table says where in it the Vision Transformer is.
"""
Build = Callable[[], nn.Module | None]


@dataclass(frozen=True)
class Covered:
    """What becomes of one model of a library.

    Attributes:
        library: timm, transformers or open_clip.
        module: of the library that the model is in; for open_clip, that of its image tower.
        name: of the model; for transformers, of its class.
        status: whether vitreg converts it.
        detail: what part is in the way; of a whole model that is converted, where its Vision Transformer is.
        sentence: of the refusal, as users see it.
    """

    library: str
    module: str
    name: str
    status: Status
    detail: str = ""
    sentence: str = ""


def coverage(filter: str = "", libraries: Iterable[str] = ()) -> Iterator[Covered]:
    """Every model with a Vision Transformer of the libraries that are installed.

    Args:
        filter: part of a model's or module's name.
        libraries: of these only.
    """
    for library in libraries or versions():
        models, convert = _LIBRARIES[library]
        for module, name, build in models(filter := filter.lower()):
            if filter not in f"{module} {name}".lower():
                continue
            # Of deprecated names; and some print while they are built.
            with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                found = _outcome(build, convert)
            if found is not None:
                yield Covered(library, module, name, *found)


def versions() -> dict[str, str]:
    """Of the libraries that `coverage` goes over."""
    packages = {"timm": "timm", "transformers": "transformers", "open_clip": "open_clip_torch"}
    return {library: version(package) for library, package in packages.items() if find_spec(library)}


def _outcome(build: Build, convert: Callable[[Any], Any]) -> tuple[Status, str, str] | None:
    """Status, detail and sentence; None for what the library cannot build so, or has no Vision Transformer."""
    with torch.device("meta"):
        model = build()
    if model is None:
        return None
    try:
        name = convert(model).config.name
    except CheckpointError as error:
        return "refused", error.part or str(error), str(error)
    path = re.search(r"\((.+)\)$", name)  # after what timm calls it, where it is of timm
    return "converted", path[1] if path else "", ""


def _timm_models(filter: str) -> Iterator[tuple[str, str, Build]]:
    import timm

    for module in TIMM_MODULES:
        for name in timm.list_models(module=module):
            yield module, name, partial(_timm_model, name)


def _timm_model(name: str) -> nn.Module | None:
    import timm

    try:
        return timm.create_model(name, depth=1)
    except (TypeError, AssertionError):  # it has stages
        return timm.create_model(name)
    except RuntimeError as error:
        if "Invalid pretrained tag" in str(error):  # an old name, which timm has lost
            return None
        raise


def _transformers_models(filter: str) -> Iterator[tuple[str, str, Build]]:
    import transformers

    with quiet_transformers():
        for file in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
            module = file.parent.name
            text = file.read_text(encoding="utf-8")
            if module in AUDIO or not any(sign in text for sign in ("pixel_values", "Conv2d")):
                continue
            if filter not in f"{module} {text}".lower():
                continue
            path = f"transformers.models.{module}.{file.stem}"
            with contextlib.redirect_stdout(sys.stderr):  # some print while they are imported
                imported = importlib.import_module(path)
            kind: Any
            for name, kind in inspect.getmembers(imported, inspect.isclass):
                is_model = issubclass(kind, transformers.PreTrainedModel) and kind.__module__ == path
                if is_model and kind.config_class is not None and not name.endswith("PreTrainedModel"):
                    yield module, name, partial(_transformers_model, kind)


def _transformers_model(kind: Any) -> nn.Module | None:
    for change in (_small, lambda config: config):  # what is made of other parts may not fit to small ones
        try:
            model = kind(change(kind.config_class()))
        except Exception:  # of any kind: a class may have no defaults
            continue
        return model if _has_vision_transformer(model) else None
    return None


def _small(config: Any) -> Any:
    for part in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
        for key, value in _SMALL.items() if part is not None else ():
            if hasattr(part, key) and not isinstance(getattr(part, key), list | tuple):
                setattr(part, key, value)
    return config


def _has_vision_transformer(model: nn.Module) -> bool:
    """Whether it projects patches, of 8 pixels or more where they are not called so, and has attention."""
    attends = any("attention" in type(module).__name__.lower() for module in model.modules())
    return attends and any(_projects_patches(path, module) for path, module in model.named_modules())


def _projects_patches(path: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d | nn.Conv3d) and module.kernel_size == module.stride:
        return "patch" in path or math.prod(module.stride) >= 64
    return "patch" in path and isinstance(module, nn.Linear)


def _open_clip_models(filter: str) -> Iterator[tuple[str, str, Build]]:
    import open_clip
    from timm.models import model_entrypoint

    for name in open_clip.list_models():
        config = open_clip.get_model_config(name) or {}
        tower, module = dict(config["vision_cfg"]), "transformer"
        if "timm_model_name" in tower:
            module = model_entrypoint(tower["timm_model_name"]).__module__.rpartition(".")[2]
        elif not isinstance(tower.setdefault("layers", 12), int):
            continue  # a ResNet
        if module in ("transformer", *TIMM_MODULES):
            tower["layers"] = 1
            # The image tower alone: any text tower will do.
            args = config["embed_dim"], tower, _SMALL_TEXT, config.get("quick_gelu", False)
            yield module, name, partial(open_clip.CLIP, *args)


_LIBRARIES: dict[str, tuple[Callable[[str], Iterator[tuple[str, str, Build]]], Callable[[Any], Any]]] = {
    "timm": (_timm_models, from_timm),
    "transformers": (_transformers_models, from_transformers),
    "open_clip": (_open_clip_models, from_open_clip),
}


def markdown(models: Iterable[Covered]) -> str:
    """Counts, and a table a library: its modules, and in each the models that share a status and a reason."""
    models = list(models)
    used = ", ".join(f"{library} {number}" for library, number in versions().items())
    lines = [f"# What is read of {used}", _INTRODUCTION]
    lines += [f"| library | models | {' | '.join(STATUSES)} |", "|---|---|" + "---|" * len(STATUSES)]
    libraries = dict.fromkeys(model.library for model in models)
    for library in libraries:
        counts = Counter(model.status for model in models if model.library == library)
        lines.append(f"| {library} | {counts.total()} | {' | '.join(str(counts[status]) for status in STATUSES)} |")
    for library in libraries:
        lines += ["", f"## {library}", "", "| module | models | |", "|---|---|---|"]
        alike: dict[tuple[str, str], list[str]] = {}
        for model in models:
            if model.library == library:
                said = f"{model.status}: {model.detail}" if model.detail else model.status
                alike.setdefault((model.module, said), []).append(model.name)
        lines += [f"| `{module}` | {', '.join(names)} | {said} |" for (module, said), names in alike.items()]
    return "\n".join(lines)
