"""THE CAUSE: training with and without registers, and watching artifacts appear."""

from vitreg.training.engine.config import OptimizerConfig, TrainingConfig
from vitreg.training.engine.start import open_data, resume, train
from vitreg.training.recipes.catalogue import RECIPES, clip, deit3, dinov2

__all__ = ["RECIPES", "OptimizerConfig", "TrainingConfig", "clip", "deit3", "dinov2", "open_data", "resume", "train"]
