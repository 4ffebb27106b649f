"""The Vision Transformer with registers."""

from vitreg.model.block import Block
from vitreg.model.config import PositionInterpolation, RopeConfig, ViTConfig
from vitreg.model.observed_config import ObservedConfig
from vitreg.model.preprocess import Preprocess
from vitreg.model.tokens import Masked, Tokens
from vitreg.model.trace import AttentionRows, Query, Trace
from vitreg.model.vision_transformer import REGISTER_STD, VisionTransformer

__all__ = [
    "REGISTER_STD",
    "AttentionRows",
    "Block",
    "Masked",
    "ObservedConfig",
    "PositionInterpolation",
    "Preprocess",
    "Query",
    "RopeConfig",
    "Tokens",
    "Trace",
    "ViTConfig",
    "VisionTransformer",
]
