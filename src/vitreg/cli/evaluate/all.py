"""`vitreg evaluate all`: every probe, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vitreg.cli.evaluate.options import DEPTH_PROBES, SEGMENTATION_PROBES, EvaluationOptions
from vitreg.cli.options import Size


def all(
    *,
    common: EvaluationOptions,
    data: str | None = None,
    class_names: Path | None = None,
    segmentation: str | None = None,
    segmentation_size: Size | None = None,
    segmentation_ignore: int | None = None,
    segmentation_variants: tuple[Literal["linear", "+ms"], ...] = ("linear",),
    depth: str | None = None,
    depth_size: Size | None = None,
    depth_scale: float = 0.001,
    depth_variants: tuple[Literal["lin.1", "lin.4"], ...] = ("lin.1",),
    discovery: str | None = None,
) -> int:
    """Ask every probe with its default protocol, and object discovery: one table, as in the paper.

    Writes report.html, evaluation.json, evaluation.csv and evaluation.md. Every model sees every image once, whatever
    the number of probes; zero-shot classification is asked of models with a text tower.

    Example: vitreg evaluate all --data imagenet/ --segmentation ade20k:ADE --depth nyu:NYU --models dinov2_vitb14
    dinov2_vitb14_reg

    Args:
        common: models and images.
        data: images, as for evaluate knn; without labels only position and reconstruction are asked.
        class_names: as for evaluate zero-shot.
        segmentation: as --data of evaluate segmentation.
        segmentation_size: as --size, which is for all, but for segmentation only.
        segmentation_ignore: as its --ignore.
        segmentation_variants: as its --variant; several make a column each.
        depth: as --data of evaluate depth.
        depth_size: as --size, but for depth only.
        depth_scale: as its --scale.
        depth_variants: as its --variant.
        discovery: as --data of evaluate discovery.
    """
    from vitreg.cli.evaluate.data import classification_data, depth_data, segmentation_data
    from vitreg.cli.evaluate.run import run_evaluation
    from vitreg.probes.catalogue import PROBES

    found = [
        *([classification_data(data, class_names)] if data else []),
        *([segmentation_data(segmentation, segmentation_ignore, segmentation_size)] if segmentation else []),
        *([depth_data(depth, depth_scale, depth_size)] if depth else []),
    ]
    if not found and not discovery:
        raise ValueError("there is nothing to evaluate on; give --data, --segmentation, --depth or --discovery")
    tasks = {one.task for one in found}
    wanted = {SEGMENTATION_PROBES[variant] for variant in segmentation_variants} | {
        DEPTH_PROBES[v] for v in depth_variants
    }
    unwanted = {*SEGMENTATION_PROBES.values(), *DEPTH_PROBES.values()} - wanted
    if any(one.task == "classification" and one.train.labels is None for one in found):
        # Where a patch is, and what it looks like, can be asked of any image.
        unwanted |= {name for name, probe in PROBES.items() if probe.labels}
    probes = {name: probe.config for name, probe in PROBES.items() if probe.task in tasks and name not in unwanted}
    return run_evaluation(common, found, probes, discovery)
