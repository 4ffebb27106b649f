"""`vitreg evaluate segmentation`."""

from __future__ import annotations

from typing import Literal

from vitreg.cli.evaluate.ask import ask
from vitreg.cli.evaluate.options import VARIANTS, EvaluationData, EvaluationOptions
from vitreg.probes.protocols import SegmentationConfig


def segmentation(
    *,
    data: str,
    common: EvaluationOptions,
    ignore: int | None = None,
    variant: Literal["linear", "+ms"] = "linear",
    protocol: SegmentationConfig = SegmentationConfig(),
) -> int:
    """Name the class of every pixel with a linear head on patch features; mIoU.

    Example: vitreg evaluate segmentation --data ade20k:ADEChallengeData2016 --models dinov2_vitb14 dinov2_vitb14_reg

    Args:
        data: ade20k:PATH, voc2012:PATH, or a folder with train/ and val/, in each images/ and masks/.
        ignore: number in the masks of a folder that does not count, besides 255.
        variant: linear reads the last block (or --blocks); +ms four, and averages over three sizes of the images.
    """
    return ask(common, EvaluationData(segmentation=data, segmentation_ignore=ignore), **{VARIANTS[variant]: protocol})
