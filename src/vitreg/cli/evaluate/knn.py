"""`vitreg evaluate knn`."""

from __future__ import annotations

from vitreg.cli.evaluate.ask import ask
from vitreg.cli.evaluate.options import EvaluationData, EvaluationOptions
from vitreg.probes.protocols import KNNConfig


def knn(*, data: str, common: EvaluationOptions, protocol: KNNConfig = KNNConfig()) -> int:
    """Classify images by their nearest labeled neighbors: the protocol of DINO and DINOv2.

    Example: vitreg evaluate knn --data imagenet/ --models dinov2_vitb14 dinov2_vitb14_reg

    Args:
        data: labeled images: a folder with train/ and val/ and folders for the classes, Parquet, tars; where it is
            not divided, every fifth image is held out.
    """
    return ask(common, EvaluationData(data=data), knn=protocol)
