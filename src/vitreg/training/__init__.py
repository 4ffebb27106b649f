"""THE CAUSE: training with and without registers, and watching artifacts appear."""

from vitreg.training.engine.config import OptimizerConfig, TrainingConfig
from vitreg.training.recipes import RECIPES
from vitreg.training.recipes.clip import clip
from vitreg.training.recipes.deit3 import deit3
from vitreg.training.recipes.dinov2 import dinov2
from vitreg.training.start import open_data, resume, train

__all__ = ["RECIPES", "OptimizerConfig", "TrainingConfig", "clip", "deit3", "dinov2", "open_data", "resume", "train"]
