"""THE CAUSE: training with and without registers, and watching artifacts appear."""

from typing import TYPE_CHECKING

from vitreg.common.lazy import lazy

if TYPE_CHECKING:
    from vitreg.training.engine.config import OptimizerConfig, TrainingConfig
    from vitreg.training.recipes.catalogue import RECIPES
    from vitreg.training.recipes.clip import clip
    from vitreg.training.recipes.deit3 import deit3
    from vitreg.training.recipes.dinov2 import dinov2
    from vitreg.training.recipes.distill import distill
    from vitreg.training.start import open_data, resume, train

__all__ = [
    "RECIPES",
    "OptimizerConfig",
    "TrainingConfig",
    "clip",
    "deit3",
    "dinov2",
    "distill",
    "open_data",
    "resume",
    "train",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "engine.config": ["OptimizerConfig", "TrainingConfig"],
        "recipes.catalogue": ["RECIPES"],
        "recipes.clip": ["clip"],
        "recipes.deit3": ["deit3"],
        "recipes.dinov2": ["dinov2"],
        "recipes.distill": ["distill"],
        "start": ["open_data", "resume", "train"],
    },
)
