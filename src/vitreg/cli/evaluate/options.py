"""Options that the `vitreg evaluate` commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vitreg.cli.options import Size, positive, sides

SEGMENTATION_PROBES = {"linear": "segmentation", "+ms": "segmentation-ms"}
DEPTH_PROBES = {"lin.1": "depth", "lin.4": "depth-lin4"}


@dataclass(frozen=True)
class EvaluationOptions:
    """Models and images.

    Attributes:
        models: names or files, as for --model; one with registers is compared with the nearest one before it that has
            fewer.
        out: folder for results and features; the same command goes on with what is in it.
        limit: so many training images and so many validation images only, from all over the files and classes.
        strict: an image that cannot be read is an error.
        train_images: so many training images.
        val_images: so many validation images.
        size: side of what the models see in pixels, or height and width, rounded to whole patches; by default the
            protocol's: 224, 512 and 480 for the short side of segmentation and depth, zero-shot the checkpoint's own.
        quick: cut the protocols to the data at hand (fewer steps, draws and sentences); such figures are called quick.
        patch_images: keep the patch tokens of so many images (5 GB for a ViT-L/14); segmentation and depth keep all.
        device: cpu, cuda, mps; auto takes a GPU where there is one.
        dtype: of weights and activations.
        batch_size: images at a time, when features are computed.
        json: print evaluation.json.
    """

    models: tuple[str, ...]
    out: Path = Path("vitreg-out/evaluate")
    limit: int | None = None
    strict: bool = False
    train_images: int | None = None
    val_images: int | None = None
    size: Size | None = None
    quick: bool = False
    patch_images: int = 10000
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 32
    json: bool = False

    def __post_init__(self) -> None:
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"--models {' '.join(self.models) or 'is empty'}: name at least one model, and each once")
        for flag in ("limit", "train_images", "val_images", "patch_images", "batch_size"):
            if (value := getattr(self, flag)) is not None:
                positive(f"--{flag.replace('_', '-')}", value)
        if self.size is not None:
            sides(self.size)
