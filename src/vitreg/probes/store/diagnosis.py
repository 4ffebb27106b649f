"""What the norms that a store kept say of the model, whatever the number of images."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

from vitreg.artifacts import Diagnosis, LogAxis, NormStatistics, check_block, choose_thresholds, conclude, parse_rule
from vitreg.images import SkippedImage
from vitreg.probes.store.manifest import Manifest, read_manifest
from vitreg.probes.store.shards import FOLDER, Shard, open_shard

NOT_KEPT = (
    "A feature pass keeps norms: the class token's attention, neighbors and channels of outliers were not looked at."
)


def diagnose_store(
    path: str | os.PathLike[str], *, threshold: float | int | str = "auto", block: int | str = "auto"
) -> Diagnosis:
    """What `diagnose` says of the images of a store, from histograms that the pass added up; no feature is read.

    Args:
        path: the store; it may be unfinished.
        threshold: as of `diagnose`; a norm is rounded to 3 %.
        block: as of `diagnose`.

    Raises:
        ValueError: there is no store, no shard of it yet, or no norms were kept.
    """
    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} holds no feature store (there is no manifest.json in it); run the feature pass")
    start = time.perf_counter()
    there = (
        sorted(f.name for f in (folder / FOLDER).glob("shard-*"))
        if manifest.finding is None
        else manifest.finding.shards
    )
    found = diagnose_shards(
        [open_shard(folder / FOLDER / name) for name in there], manifest, threshold=threshold, block=block
    )
    if found is None:
        raise ValueError(f"{folder} has no norms yet; go on with the feature pass, and keep patches of some images")
    return dataclasses.replace(found, seconds=time.perf_counter() - start)


def diagnose_shards(
    shards: Sequence[Shard], manifest: Manifest, *, threshold: float | int | str = "auto", block: int | str = "auto"
) -> Diagnosis | None:
    """The same of some files; None where there are no norms in them."""
    rule = parse_rule(threshold)
    check_block(block, manifest.model["depth"])
    states = [norms for shard in shards if (norms := shard.norms) is not None]
    if not states:
        return None
    rows, columns = shards[0].note["grid"]
    statistics = NormStatistics.added((rows, columns), LogAxis(), states)
    skipped = [error for shard in shards for error in shard.skipped]
    diagnosis = conclude(
        statistics,
        choose_thresholds(statistics, rule),
        rule,
        block=block,
        skipped=tuple(SkippedImage(Path(image.name), image.reason, image.number) for image in skipped),
        interrupted=len(shards) < manifest.num_shards,
        seconds=0.0,
        model=manifest.model,
        image_size=manifest.origin.preprocess.size,
    )
    sentences = [*diagnosis.verdict, NOT_KEPT]
    if diagnosis.threshold is not None and not statistics.has_positions(diagnosis.block):
        kept = ", ".join(map(str, manifest.origin.config.norm_blocks or ()))
        sentences.append(f"Where in the image outliers are was kept of block {kept} only.")
    return dataclasses.replace(diagnosis, verdict=tuple(sentences))
