"""Vision Transformers with registers: any checkpoint in, a true picture of its artifacts out."""

from vitreg.artifacts import Comparison, Diagnosis, compare, diagnose
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
from vitreg.registers import RegisterNeuron, add_registers, add_test_time_registers, find_register_neurons

__all__ = [
    "AttentionRows",
    "CheckpointError",
    "Comparison",
    "Detection",
    "Diagnosis",
    "ImageError",
    "Preprocess",
    "RegisterNeuron",
    "Tokens",
    "Trace",
    "ViTConfig",
    "VisionTransformer",
    "add_registers",
    "add_test_time_registers",
    "compare",
    "diagnose",
    "discover_objects",
    "find_register_neurons",
    "from_open_clip",
    "from_state_dict",
    "from_timm",
    "from_transformers",
    "list_models",
    "load",
    "save",
]
