"""Weights in and out: one file per dialect of state dicts."""

from vitreg.checkpoints.from_open_clip import from_open_clip
from vitreg.checkpoints.from_state_dict import from_state_dict
from vitreg.checkpoints.from_timm import from_timm
from vitreg.checkpoints.from_transformers import from_transformers
from vitreg.checkpoints.loading import from_module, load
from vitreg.checkpoints.observed import ObservedViT, can_be_observed, convert_or_observe, load_or_observe, observe
from vitreg.checkpoints.registry import list_models
from vitreg.checkpoints.saving import save
from vitreg.checkpoints.state import CheckpointError

__all__ = [
    "CheckpointError",
    "ObservedViT",
    "can_be_observed",
    "convert_or_observe",
    "from_module",
    "from_open_clip",
    "from_state_dict",
    "from_timm",
    "from_transformers",
    "list_models",
    "load",
    "load_or_observe",
    "observe",
    "save",
]
