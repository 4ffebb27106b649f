"""`vitreg evaluate reconstruction`."""

from __future__ import annotations

from vitreg.cli.evaluate.options import EvaluationOptions
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
        common: models and images.
        protocol: the protocol; by default the paper's, or as close as can be.
    """
    from vitreg.cli.evaluate.data import classification_data
    from vitreg.cli.evaluate.run import run_evaluation

    return run_evaluation(common, [classification_data(data)], {"reconstruction": protocol})
