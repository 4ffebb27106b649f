"""`vitreg evaluate tokens`."""

from __future__ import annotations

from vitreg.cli.evaluate.ask import ask
from vitreg.cli.evaluate.options import EvaluationData, EvaluationOptions
from vitreg.probes.protocols import SingleTokenConfig


def tokens(*, data: str, common: EvaluationOptions, protocol: SingleTokenConfig = SingleTokenConfig()) -> int:
    """Classify images from one token: class token, a normal patch, an outlier, a register (Table 1).

    Example: vitreg evaluate tokens --data imagenet/ --models dinov2_vitg14 dinov2_vitg14_reg --train-images 50000

    Args:
        data: labeled images, as for evaluate knn.
    """
    return ask(common, EvaluationData(data=data), tokens=protocol)
