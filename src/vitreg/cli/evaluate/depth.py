"""`vitreg evaluate depth`."""

from __future__ import annotations

from typing import Literal

from vitreg.cli.evaluate.ask import ask
from vitreg.cli.evaluate.options import VARIANTS, EvaluationData, EvaluationOptions
from vitreg.probes.protocols import DepthConfig


def depth(
    *,
    data: str,
    common: EvaluationOptions,
    scale: float = 0.001,
    variant: Literal["lin.1", "lin.4"] = "lin.1",
    protocol: DepthConfig = DepthConfig(),
) -> int:
    """Tell the depth of every pixel with a linear head on patch features; RMSE.

    Example: vitreg evaluate depth --data nyu:NYU --models dinov2_vitb14 dinov2_vitb14_reg

    Args:
        data: nyu:PATH, or a folder with train/ and val/, in each images/ and depth/ (16-bit PNG, 0 where unknown).
        scale: meters in one step of the files' numbers; 0.001 for millimeters.
        variant: the head reads the last block (or --blocks), or four (lin.4), as DINOv2's.
    """
    return ask(common, EvaluationData(depth=data, depth_scale=scale), **{VARIANTS[variant]: protocol})
