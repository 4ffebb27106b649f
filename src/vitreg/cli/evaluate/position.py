"""`vitreg evaluate position`."""

from __future__ import annotations

from vitreg.cli.evaluate.ask import ask
from vitreg.cli.evaluate.options import EvaluationData, EvaluationOptions
from vitreg.probes.protocols import PositionConfig


def position(*, data: str, common: EvaluationOptions, protocol: PositionConfig = PositionConfig()) -> int:
    """Ask patches where they are: what normal patches and outliers know of their place (Table 5).

    Example: vitreg evaluate position --data imagenet/ --models dinov2_vitg14 --train-images 5000 --val-images 1000

    Args:
        data: images, as for evaluate knn; labels are not needed.
    """
    return ask(common, EvaluationData(data=data), position=protocol)
