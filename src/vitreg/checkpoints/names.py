"""timm's architectures by name: built without memory for weights, or refused with the nearest names that load."""

from __future__ import annotations

import difflib
import warnings
from typing import Any

import torch

from vitreg.checkpoints import registry
from vitreg.checkpoints.from_timm import from_timm, is_readable
from vitreg.checkpoints.state import CheckpointError, one_line


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
