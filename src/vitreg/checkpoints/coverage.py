"""What vitreg reads of the libraries that are installed: every model of theirs with a Vision Transformer.

What is converted is decided by modules and shapes alone, on the device "meta". The others are observed for a try, small
where that can be asked for: with random weights, whose tokens tell the grid as trained ones do.
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
from collections.abc import Callable, Hashable, Iterable, Iterator
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
from vitreg.checkpoints.observed import observe
from vitreg.checkpoints.observed.inputs import guess_preprocess, image_tower
from vitreg.checkpoints.observed.observe import find_tower_blocks
from vitreg.checkpoints.state import CheckpointError

TIMM_MODULES = (
    *("vision_transformer", "eva", "beit", "deit", "naflexvit", "vision_transformer_relpos"),
    *("vision_transformer_hybrid", "cait", "qwen3_vit", "gemma4_vit", "deepseek_vit"),
    *("vision_transformer_sam", "hiera", "vitamin", "convit", "tnt", "xcit"),
)
"""timm's modules with Vision Transformers; those of the last line have windows, stages or another attention."""

AUDIO = ("audio_spectrogram_transformer", "clap")
"""transformers' modules whose patches are of spectrograms."""

_SHALLOW = {"num_hidden_layers": 2, "depth": 2, "num_layers": 2}
_SMALL = _SHALLOW | {
    **{"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64},
}
_SMALL_TEXT = {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1}

LARGEST_IMAGE = 512
"""Side in pixels that a small model of transformers is built for."""

MOST_PARAMETERS = 1e9
"""Of an image tower that is built to observe it."""

Status = Literal["converted", "observed", "refused"]
STATUSES = get_args(Status)
_INTRODUCTION = """
Every model with a Vision Transformer, built without its weights by `vitreg models --coverage`, which asks the libraries
that *you* have installed. *Converted* is all of vitreg: diagnosis, fix, discovery, probes, `save`; of a whole model,
the table says where in it the Vision Transformer is. *Observed* is `vitreg.observe`, and so `vitreg diagnose` and
`compare`: with random weights, its blocks and the place of every patch were found, in the stage with the most blocks
where there are stages. The table says what is in the way of converting them; of models that are refused, what is in
the way of looking at them. Classes of transformers are tried small, where their parts fit together when they are.
"""

Tried = dict[Hashable, tuple[str, str] | None]
"""Why image towers cannot be observed, in a sentence and in words, by what they are built of: those of whole models are
often the same."""

Build = Callable[[], nn.Module | None]


@dataclass(frozen=True)
class Covered:
    """What becomes of one model of a library.

    Attributes:
        library: timm, transformers or open_clip.
        module: of the library that the model is in; for open_clip, that of its image tower.
        name: of the model; for transformers, of its class.
        status: whether vitreg converts it, or can observe it.
        detail: what part is in the way; of a whole model that is converted, where its Vision Transformer is.
        sentence: why it is not converted, or not even observed, as users see it.
    """

    library: str
    module: str
    name: str
    status: Status
    detail: str = ""
    sentence: str = ""


def coverage(filter: str = "", libraries: Iterable[str] = (), *, observing: bool = True) -> Iterator[Covered]:
    """Every model with a Vision Transformer of the libraries that are installed.

    Args:
        filter: part of a model's or module's name.
        libraries: of these only.
        observing: whether what is not converted is observed for a try, which takes minutes; else it counts as refused.
    """
    tried: Tried | None = {} if observing else None
    for library in libraries or versions():
        models, convert = _LIBRARIES[library]
        for module, name, build in models(filter := filter.lower()):
            if filter not in f"{module} {name}".lower():
                continue
            # Of deprecated names; and some print while they are built.
            with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                found = _outcome(build, convert, tried)
            if found is not None:
                yield Covered(library, module, name, *found)


def versions() -> dict[str, str]:
    """Of the libraries that `coverage` goes over."""
    packages = {"timm": "timm", "transformers": "transformers", "open_clip": "open_clip_torch"}
    return {library: version(package) for library, package in packages.items() if find_spec(library)}


def _outcome(build: Build, convert: Callable[[Any], Any], tried: Tried | None) -> tuple[Status, str, str] | None:
    """Status, detail and sentence; None for what the library cannot build so, or has no Vision Transformer."""
    with torch.device("meta"):
        model = build()
    if model is None:
        return None
    try:
        name = convert(model).config.name
    except CheckpointError as refusal:
        if tried is None:
            return "refused", refusal.part or str(refusal), str(refusal)
        try:
            _try_observing(model, build, tried)
        except CheckpointError as error:
            return "refused", error.part or refusal.part or str(error), str(error)
        return "observed", refusal.part or str(refusal), str(refusal)
    path = re.search(r"\((.+)\)$", name)  # after what timm calls it, where it is of timm
    return "converted", path[1] if path else "", ""


def _try_observing(model: nn.Module, build: Build, tried: Tried) -> None:
    """Observe a model with random weights.

    Args:
        model: on the device "meta".
        build: makes another one; of transformers, the image tower alone is made.
        tried: is added to. Models that differ in nothing but widths and the size of images are tried once, though the
            blocks of each are found at its own size.

    Raises:
        CheckpointError: it cannot be observed.
    """
    tower = image_tower(model)[1]
    config: Any = getattr(tower, "config", None)
    of_transformers = hasattr(config, "to_json_string")
    if not of_transformers:
        find_tower_blocks(model)
    parts = tuple((path, type(part)) for path, part in tower.named_modules())
    key = parts, config.to_json_string(use_diff=False) if of_transformers else None
    if key not in tried:
        tried[key] = None
        try:
            if (count := sum(parameter.numel() for parameter in tower.parameters())) > MOST_PARAMETERS:
                text = f"a {type(tower).__name__} of {count / 1e9:.0f} B parameters is not built to try observing it"
                raise CheckpointError(text, part="too many parameters to build it for a try")
            real: Any = type(tower)(config) if of_transformers else build()
            observe(real, preprocess=guess_preprocess(tower, model)[0])
        except CheckpointError as error:
            tried[key] = str(error), error.part  # not the error, whose traceback holds the weights
    if (trouble := tried[key]) is not None:
        raise CheckpointError(trouble[0], part=trouble[1])


def _timm_models(filter: str) -> Iterator[tuple[str, str, Build]]:
    import timm

    for module in TIMM_MODULES:
        for name in timm.list_models(module=module):
            yield module, name, partial(_timm_model, name)


def _timm_model(name: str) -> nn.Module | None:
    import timm

    sizes: tuple[dict[str, Any], ...] = ({"depth": 2}, {"stages": (1, 1, 3, 1)})
    try:
        for small in sizes:
            with contextlib.suppress(TypeError, AssertionError):  # it has stages, or others
                return timm.create_model(name, **small)
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
    for sizes in (_SMALL, _SHALLOW, {}):  # what is made of other parts may not fit to small ones
        try:
            model = kind(_resized(kind.config_class(), sizes))
        except Exception:  # of any kind: a class may have no defaults
            continue
        return model if _has_vision_transformer(model) else None
    return None


def _resized(config: Any, sizes: dict[str, int]) -> Any:
    """A config with those of the sizes that it has, in its parts too."""
    for key, value in sizes.items():
        if hasattr(config, key) and not isinstance(getattr(config, key), list | tuple):
            setattr(config, key, value)
    while sizes and isinstance(side := getattr(config, "image_size", None), int) and side > LARGEST_IMAGE:
        config.image_size = side // 2
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            _resized(part, sizes)
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
            tower["layers"] = 2
            # The image tower alone: any text tower will do.
            args = config["embed_dim"], tower, _SMALL_TEXT, config.get("quick_gelu", False)
            yield module, name, partial(_open_clip_model, *args)


def _open_clip_model(*args: Any) -> nn.Module:
    import open_clip
    import timm

    create = timm.create_model
    timm.create_model = partial(create, depth=2)  # for which open_clip has no argument
    try:
        return open_clip.CLIP(*args)
    finally:
        timm.create_model = create


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
