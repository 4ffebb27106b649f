"""`vitreg evaluate linear`."""

from __future__ import annotations

from vitreg.cli.evaluate.ask import ask
from vitreg.cli.evaluate.options import EvaluationData, EvaluationOptions
from vitreg.probes.protocols import LinearConfig


def linear(*, data: str, common: EvaluationOptions, protocol: LinearConfig = LinearConfig()) -> int:
    """Train DINOv2's grid of linear classifiers on class token and patches; the best counts.

    Example: vitreg evaluate linear --data imagenet/ --models dinov2_vitb14 dinov2_vitb14_reg

    Args:
        data: labeled images, as for evaluate knn.
    """
    return ask(common, EvaluationData(data=data), linear=protocol)
