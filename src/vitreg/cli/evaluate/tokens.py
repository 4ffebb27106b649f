"""`vitreg evaluate tokens`."""

from __future__ import annotations

from vitreg.cli.evaluate.options import EvaluationOptions
from vitreg.probes.protocols import SingleTokenConfig


def tokens(*, data: str, common: EvaluationOptions, protocol: SingleTokenConfig = SingleTokenConfig()) -> int:
    """Classify images from one token: class token, a normal patch, an outlier, a register (Table 1).

    Example: vitreg evaluate tokens --data imagenet/ --models dinov2_vitg14 dinov2_vitg14_reg --train-images 50000

    Args:
        data: labeled images, as for evaluate knn.
        common: models and images.
        protocol: the protocol; by default the paper's, or as close as can be.
    """
    from vitreg.cli.evaluate.data import classification_data
    from vitreg.cli.evaluate.run import run_evaluation

    return run_evaluation(common, [classification_data(data)], {"tokens": protocol})
