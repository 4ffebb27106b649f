"""`vitreg evaluate all`: every probe, in one table."""

from __future__ import annotations

from vitreg.cli.evaluate.ask import ask
from vitreg.cli.evaluate.options import EvaluationData, EvaluationOptions


def all(*, common: EvaluationOptions, data: EvaluationData) -> int:
    """Ask every probe with its default protocol, and object discovery: one table, as in the paper.

    Writes report.html, evaluation.json, evaluation.csv and evaluation.md. Every model sees every image once, whatever
    the number of probes; zero-shot classification is asked of models with a text tower.

    Example: vitreg evaluate all --data imagenet/ --segmentation ade20k:ADE --depth nyu:NYU --models dinov2_vitb14
    dinov2_vitb14_reg
    """
    return ask(common, data)
