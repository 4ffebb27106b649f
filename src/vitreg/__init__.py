"""Vision Transformers with registers: any checkpoint in, a true picture of its artifacts out."""

from vitreg.artifacts import Diagnosis, diagnose
from vitreg.checkpoints import (
    CheckpointError,
    from_open_clip,
    from_state_dict,
    from_timm,
    from_transformers,
    list_models,
    load,
    save,
)
from vitreg.discovery import Detection, discover_objects
from vitreg.images import ImageError
from vitreg.model import AttentionRows, Preprocess, Tokens, Trace, VisionTransformer, ViTConfig

__all__ = [
    "AttentionRows",
    "CheckpointError",
    "Detection",
    "Diagnosis",
    "ImageError",
    "Preprocess",
    "Tokens",
    "Trace",
    "ViTConfig",
    "VisionTransformer",
    "diagnose",
    "discover_objects",
    "from_open_clip",
    "from_state_dict",
    "from_timm",
    "from_transformers",
    "list_models",
    "load",
    "save",
]
