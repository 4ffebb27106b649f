"""`vitreg evaluate reconstruction`."""

from __future__ import annotations

from vitreg.cli.evaluate.ask import ask
from vitreg.cli.evaluate.options import EvaluationData, EvaluationOptions
from vitreg.probes.protocols import ReconstructionConfig


def reconstruction(
    *,
    data: str,
    common: EvaluationOptions,
    protocol: ReconstructionConfig = ReconstructionConfig(),
) -> int:
    """Ask patches for their pixels: what normal patches and outliers hold (Table 5).

    Example: vitreg evaluate reconstruction --data imagenet/ --models dinov2_vitg14 --train-images 5000

    Args:
        data: images, as for evaluate knn; labels are not needed.
    """
    return ask(common, EvaluationData(data=data), reconstruction=protocol)
