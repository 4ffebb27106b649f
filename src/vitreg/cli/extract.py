"""`vitreg extract`: features of any number of images."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from vitreg.cli.options import ModelOptions, positive
from vitreg.cli.output import print_json, progress
from vitreg.common.words import counted, duration, size_in_words
from vitreg.probes.store.names import StoredType, Token

Source = Annotated[Positional[str], arg(metavar="SOURCE")]
_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""What torchrun and Slurm call the number of a process, and how many there are."""


def extract(
    source: Source,
    *,
    model: ModelOptions,
    out: Path = Path("vitreg-out/extract"),
    tokens: tuple[Token, ...] = ("cls", "registers", "patches", "mean"),
    blocks: tuple[int, ...] = (-1,),
    store_dtype: StoredType = "float16",
    shard_size: int = 4096,
    batch_size: int = 32,
    strict: bool = False,
    shard: str | None = None,
    update: bool = False,
    engine: Literal["local", "ray"] = "local",
    num_workers: int = 1,
    address: str | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> int:
    """Keep what a model makes of any number of images, as Parquet that other tools open.

    A pass that is killed goes on where it was, to the same bytes. Each process of torchrun or Slurm takes its share of
    the shards. The norms of all patches are added up on the way: vitreg diagnose --store. docs/scale.md has sizes.

    Example: vitreg extract photos/ --model dinov2_vitb14 --out features

    Args:
        source: a folder of images, tars (shard-*.tar), Parquet, or captions.csv.
        model: the model and what it sees.
        out: folder of the store.
        tokens: what is kept: cls, registers, patches, mean (of the patches), pooled (what the head reads).
        blocks: after which blocks, -1 for the last.
        store_dtype: of what is kept.
        shard_size: images a file, where they are not in tars or Parquet: these are a file for each tar or row group.
        batch_size: images at a time.
        strict: an image or a shard that cannot be read is an error.
        shard: which of how many processes this is, 0/4 to 3/4; by default as torchrun or Slurm say.
        update: compute what was added to the source, or changed there, since the store was begun.
        engine: local, or ray (pip install "vitreg[scale]"), on which shards are a map.
        num_workers: of Ray, each with a GPU or its share of the cores.
        address: of a Ray cluster, or auto; by default one is started on this machine.
        dry_run: only say how many shards, bytes and hours it will be.
        json: print the result as JSON.
    """
    from vitreg.probes import FeaturesConfig, FeatureStore
    from vitreg.probes.store.extract import extract_part
    from vitreg.probes.store.on_ray import Ray
    from vitreg.probes.store.plan import plan_extraction

    positive("--batch-size", batch_size)
    part = _part(shard)
    vit = model.load()
    config = FeaturesConfig(
        blocks, tokens=tokens, norm_blocks=blocks, dtype=store_dtype, shard_size=positive("--shard-size", shard_size)
    )
    if dry_run:
        plan = plan_extraction(vit, source, config, batch_size=batch_size)
        if json:
            print_json(dataclasses.asdict(plan) | {"seconds": plan.seconds})
            return 0
        print(
            f"{counted(plan.num_images, 'image')} in {counted(plan.num_shards, 'shard')} take "
            f"{size_in_words(plan.num_bytes)} and {duration(plan.seconds / part[1])}, with "
            f"{counted(part[1], 'process')} at {plan.images_per_second:.3g} images per second"
        )
        return 0
    with progress("extracting") as on_progress:
        done = extract_part(
            vit, source, out.expanduser(), config, part=part, batch_size=batch_size, strict=strict,
            on_progress=on_progress, say=lambda sentence: print(f"vitreg: {sentence}", file=sys.stderr),
            update=update, ray=Ray(num_workers, address) if engine == "ray" else None,
        )  # fmt: skip
    if not done:
        found: dict[str, object] = {"out": str(out), "finished": False}
        sentence = f"{out}: the shards of process {part[0]} of {part[1]} are there, others are not"
    else:
        store = FeatureStore.open(out)
        if strict:
            store.check_complete()
        size = sum(one.path.stat().st_size for one in store.all_shards)
        found = {"out": str(out), "finished": True, "num_images": store.num_images, "num_bytes": size}
        found |= {"num_shards": len(store.all_shards), "num_skipped": len(store) - store.num_images}
        sentence = (
            f"{out}: {counted(store.num_images, 'image')} in {counted(len(store.all_shards), 'shard')}, "
            f"{size_in_words(size)}"
        )
        if lost := len(store) - store.num_images:
            sentence += f"; {counted(lost, 'image')} could not be read, the column error says why"
    print_json(found) if json else print(sentence)
    return 0


def _part(shard: str | None) -> tuple[int, int]:
    """Which part this process does, of how many."""
    if shard is None:
        named = next(((os.environ[i], os.environ[n]) for i, n in _RANKS if i in os.environ and n in os.environ), None)
        shard = "/".join(named or ("0", "1"))
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard {shard} must be I/N, as 0/4, 1/4, 2/4 and 3/4 of four processes")
    return int(index), int(count)
