"""The modules of a model of timm, transformers or open_clip under our names, for what acts on them in place."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitreg.checkpoints.from_timm import is_readable
from vitreg.checkpoints.from_transformers import check_class, find_tower
from vitreg.checkpoints.weight_names import OPEN_CLIP, TIMM, WeightNames


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the Vision Transformer in a model that `from_module` reads, by its name in ours.

    Where a library fuses what we keep apart, names of parts stand in, as in `weights.py`: `blocks.0.out_proj`.
    """
    tower, names = _tower(model)
    found = {}
    for path, module in tower.named_modules():
        if path and (name := names.ours(f"{path}.weight")) is not None:
            found[name.removesuffix(".weight")] = module
    return found


def _tower(model: Any) -> tuple[nn.Module, WeightNames]:
    """The Vision Transformer, and what its library calls the parts."""
    library = type(model).__module__.partition(".")[0]
    if library == "open_clip":
        tower = getattr(model, "visual", model)
        return (tower.trunk, TIMM) if hasattr(tower, "trunk") else (tower, OPEN_CLIP)
    if library == "transformers":
        _, tower = find_tower(model)
        return tower, TIMM if is_readable(tower) else check_class(type(tower)).family.names
    return model, TIMM
