"""Vision Transformers with registers: any checkpoint in, a true image of its artifacts out."""

from typing import TYPE_CHECKING, Any

from vitreg.common.lazy import lazy

if TYPE_CHECKING:
    from vitreg.artifacts import Comparison, Diagnosis, compare, diagnose
    from vitreg.checkpoints import (
        CheckpointError,
        from_open_clip,
        from_state_dict,
        from_timm,
        from_transformers,
        list_models,
        load,
        observe,
        save,
    )
    from vitreg.discovery import Detection, discover_objects
    from vitreg.images import ImageError
    from vitreg.model import AttentionRows, Preprocess, Tokens, Trace, VisionTransformer, ViTConfig
    from vitreg.probes import extract, open_store
    from vitreg.registers import (
        RegisterNeuron,
        add_prefix,
        add_registers,
        add_test_time_registers,
        bake_registers,
        distill_registers,
        export,
        find_register_neurons,
        install_registers,
        push_to_hub,
        repair_singular_defects,
    )

    __version__: str

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
    "add_prefix",
    "add_registers",
    "add_test_time_registers",
    "bake_registers",
    "compare",
    "diagnose",
    "discover_objects",
    "distill_registers",
    "export",
    "extract",
    "find_register_neurons",
    "from_open_clip",
    "from_state_dict",
    "from_timm",
    "from_transformers",
    "install_registers",
    "list_models",
    "load",
    "observe",
    "open_store",
    "push_to_hub",
    "repair_singular_defects",
    "save",
]

_get, __dir__ = lazy(
    __name__,
    {
        "artifacts": ["Comparison", "Diagnosis", "compare", "diagnose"],
        "checkpoints": [
            *("CheckpointError", "from_open_clip", "from_state_dict", "from_timm", "from_transformers"),
            *("list_models", "load", "observe", "save"),
        ],
        "discovery": ["Detection", "discover_objects"],
        "images": ["ImageError"],
        "model": ["AttentionRows", "Preprocess", "Tokens", "Trace", "ViTConfig", "VisionTransformer"],
        "probes": ["extract", "open_store"],
        "registers": [
            *("RegisterNeuron", "add_prefix", "add_registers", "add_test_time_registers", "find_register_neurons"),
            *(
                "bake_registers",
                "distill_registers",
                "export",
                "install_registers",
                "push_to_hub",
                "repair_singular_defects",
            ),
        ],
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vitreg")
    return _get(name)
