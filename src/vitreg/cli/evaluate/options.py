"""Options that the `vitreg evaluate` commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SEGMENTATION_PROBES = {"linear": "segmentation", "+ms": "segmentation-ms"}
DEPTH_PROBES = {"lin.1": "depth", "lin.4": "depth-lin4"}


@dataclass(frozen=True)
class EvaluationOptions:
    """Which models, on how many pictures, and where results go."""

    models: tuple[str, ...]
    """names or files, as for --model; one with registers is compared with the nearest one before it that has fewer"""
    out: Path = Path("vitreg-out/evaluation")
    """folder for results and features; the same command goes on with what is in it"""
    train_images: int | None = None
    """so many training pictures, as many of each class; all by default"""
    val_images: int | None = None
    """so many validation pictures"""
    patch_images: int = 10000
    """keep the patch tokens of so many pictures (5 GB for a ViT-L/14); segmentation and depth keep all"""
    device: str = "auto"
    """cpu, cuda, mps; auto takes a GPU where there is one"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """precision of weights and activations"""
    feature_batch_size: int = 32
    """pictures at a time when features are computed"""
    json: bool = False
    """print evaluation.json"""
