"""THE CAUSE: training with and without registers, and watching artifacts appear."""

from vitreg.training.config import OptimizerConfig, TrainingConfig
from vitreg.training.recipes import RECIPES, clip, deit3, dinov2
from vitreg.training.start import open_data, resume, train

__all__ = ["RECIPES", "OptimizerConfig", "TrainingConfig", "clip", "deit3", "dinov2", "open_data", "resume", "train"]
