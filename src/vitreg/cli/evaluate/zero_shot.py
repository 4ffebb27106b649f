"""`vitreg evaluate zero-shot`."""

from __future__ import annotations

from pathlib import Path

from vitreg.cli.evaluate.ask import ask
from vitreg.cli.evaluate.options import EvaluationData, EvaluationOptions
from vitreg.probes.protocols import ZeroShotConfig


def zero_shot(
    *,
    data: str,
    common: EvaluationOptions,
    class_names: Path | None = None,
    protocol: ZeroShotConfig = ZeroShotConfig(),
) -> int:
    """Classify images by sentences about the classes, with the text tower of a CLIP or SigLIP.

    Example: vitreg evaluate zero-shot --data imagenet/ --models open_clip:ViT-B-16/laion2b_s34b_b88k

    Args:
        data: labeled images, as for evaluate knn.
        class_names: a file with a name a line, in the order of the classes, where folders are not named by words.
    """
    return ask(common, EvaluationData(data=data, class_names=class_names), zero_shot=protocol)
