"""The nearest names to one that does not exist."""

from __future__ import annotations

import difflib

from vitreg.checkpoints import registry
from vitreg.checkpoints.state import CheckpointError


def unknown_name(name: str) -> CheckpointError:
    """The error for a name that nothing has, with the nearest ones that exist."""
    import timm

    names = [model.name for model in registry.MODELS] + timm.list_pretrained("*vit*") + timm.list_models("*vit*")
    names += timm.list_pretrained("deit*")
    near = difflib.get_close_matches(name, dict.fromkeys(names), n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "`vitreg models` lists names"
    return CheckpointError(f"no checkpoint or architecture is called {name!r}; {hint}")
