"""`vitreg evaluate linear`."""

from __future__ import annotations

from vitreg.cli.evaluate.options import EvaluationOptions
from vitreg.probes.protocols import LinearConfig


def linear(*, data: str, common: EvaluationOptions, protocol: LinearConfig = LinearConfig()) -> int:
    """Train DINOv2's grid of linear classifiers on class token and patches; the best counts.

    Example: vitreg evaluate linear --data imagenet/ --models dinov2_vitb14 dinov2_vitb14_reg

    Args:
        data: labeled images, as for evaluate knn.
        common: models and images.
        protocol: the protocol; by default the paper's, or as close as can be.
    """
    from vitreg.cli.evaluate.data import classification_data
    from vitreg.cli.evaluate.run import run_evaluation

    return run_evaluation(common, [classification_data(data)], {"linear": protocol})
