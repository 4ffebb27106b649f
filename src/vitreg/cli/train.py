"""`vitreg train`: Vision Transformers with registers, from scratch."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from vitreg.cli.output import INTERRUPTED, print_json, progress

if TYPE_CHECKING:
    from vitreg.training import TrainingConfig
    from vitreg.training.engine.run_folder import RunFolder


Recipe = Annotated[
    Positional[Literal["deit3", "dinov2", "clip"] | None],
    arg(metavar="RECIPE"),
]


def train(
    recipe: Recipe = None,
    *,
    data: str | None = None,
    val: str | None = None,
    registers: int | None = None,
    arch: Literal["micro", "tiny", "small", "base", "large", "huge", "giant"] | None = None,
    out: Path = Path("vitreg-out/train"),
    resume: Path | None = None,
    smoke: bool = False,
    size: int | None = None,
    patch_size: int | None = None,
    batch_size: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    warmup_steps: int | None = None,
    drop_path: float | None = None,
    ema_decay: float | None = None,
    seed: int | None = None,
    accumulation: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    sharding: Literal["ddp", "fsdp"] | None = None,
    compile: bool = False,
    gradient_checkpointing: bool = False,
    log_every: int | None = None,
    checkpoint_every: int | None = None,
    diagnose_every: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Train a Vision Transformer with registers, and record when artifacts appear.

    Writes a run's folder: model.safetensors (--model RUN in other commands), log.jsonl, diagnosis.jsonl, TensorBoard
    curves, checkpoints. Ctrl-C leaves a checkpoint; --resume goes on exactly where it was. For several GPUs start it as
    torchrun --nproc-per-node 8 -m vitreg train ...

    Example: vitreg train deit3 --data imagenet/ --arch small --registers 4 --out runs/small-4

    Example: vitreg train deit3 --smoke --data tiny-imagenet-100/ --out runs/smoke

    Example: vitreg train --resume runs/small-4

    Args:
        recipe: deit3 (from labels), dinov2 (from images alone) or clip (from captions); left out with --resume.
        data: class folders, Parquet files, WebDataset tars or captions.csv; or a folder with train and val parts.
        val: held-out images; by default those in --data, or a twentieth of it, at most 1000.
        registers: 4 by default, as in the paper.
        arch: size of the model; deit3 takes small by default, clip base, dinov2 large.
        out: the run's folder, a new one.
        resume: folder of a run to go on with.
        smoke: a small form of the recipe that takes two minutes on two CPU cores.
        size: side of what the model sees in pixels; the recipe's by default, as all that follows.
        patch_size: in pixels.
        batch_size: images at a time: a step's, over all processes.
        epochs: passes over the images.
        steps: optimizer steps, instead of epochs.
        lr: peak learning rate.
        weight_decay: of matrices; tokens, norms and biases have none.
        warmup_steps: until the peak.
        drop_path: rate of stochastic depth.
        ema_decay: save a moving average of the weights.
        seed: of everything random.
        accumulation: split each process's part of a batch into so many passes, to save memory.
        dtype: of activations; bfloat16 computes in half precision and keeps the weights in float32.
        sharding: ddp copies the model to every process, fsdp spreads it over them.
        compile: torch.compile the blocks.
        gradient_checkpointing: recompute blocks in the backward pass, to save memory.
        log_every: steps between progress reports; every step is in log.jsonl.
        checkpoint_every: steps between checkpoints.
        diagnose_every: steps between diagnoses on held-out images; 0 for the end only.
        workers: processes that decode images, for each training process.
        device: cpu, cuda, mps; auto takes a GPU where there is one.
        json: print the result as JSON.
    """
    from vitreg import training
    from vitreg.training.engine.run_folder import RunFolder

    shape = {"image_size": size, "patch_size": patch_size, "batch_size": batch_size, "epochs": epochs}
    optimizer = {"lr": lr, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
    rest = {
        "num_steps": steps,
        "drop_path": drop_path,
        "ema_decay": ema_decay,
        "seed": seed,
        "accumulation": accumulation,
        "dtype": dtype,
        "sharding": sharding,
        "compile": compile or None,
        "gradient_checkpointing": gradient_checkpointing or None,
        "log_every": log_every,
        "checkpoint_every": checkpoint_every,
        "diagnose_every": diagnose_every,
    }
    if resume is not None:
        changed = {"registers": registers, "arch": arch, "smoke": smoke or None, **shape, **optimizer, **rest}
        _check_resumed(RunFolder(resume), recipe, [name for name, value in changed.items() if value is not None])
        with _telling(RunFolder(resume), quiet=json) as tell:
            done = training.resume(resume, data=data, val=val, device=device, num_workers=workers, on_log=tell)
        return _conclude(RunFolder(resume), done, as_json=json)
    if recipe is None or data is None:
        raise ValueError("give a recipe and --data, as in: vitreg train deit3 --data imagenet/; or --resume RUN")
    opened = training.open_data(data, val, seed=seed or 0, device=device)
    config = training.RECIPES[recipe](
        num_images=len(opened.images),
        num_classes=len(opened.images.classes),
        num_registers=4 if registers is None else registers,
        size=arch,
        smoke=smoke,
        **shape,
    )
    config = _changed(config, optimizer, rest)
    with _telling(RunFolder(out), quiet=json) as tell:
        done = training.train(config, opened, out, device=device, num_workers=workers, on_log=tell)
    return _conclude(RunFolder(out), done, as_json=json)


def _changed(config: TrainingConfig, optimizer: dict[str, Any], rest: dict[str, Any]) -> TrainingConfig:
    """The recipe's config with what was asked for on the command line; shorter runs warm up for a shorter time."""
    given = {name: value for name, value in optimizer.items() if value is not None}
    steps = rest["num_steps"]
    if steps is not None and steps < config.num_steps and "warmup_steps" not in given:
        given["warmup_steps"] = config.optimizer.warmup_steps * steps // config.num_steps
    changes = {name: value for name, value in rest.items() if value is not None}
    if steps is not None and "diagnose_every" not in changes:
        changes["diagnose_every"] = max(1, steps // 20)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **given), **changes)


def _check_resumed(folder: RunFolder, recipe: str | None, changed: list[str]) -> None:
    stored = folder.describe()["recipe"]
    if recipe not in (None, stored):
        raise ValueError(f"{folder.path} is a run of {stored}, not of {recipe}; leave the recipe out, or start anew")
    if changed:
        renamed = {"num_steps": "steps", "image_size": "size"}
        flags = ", ".join(f"--{renamed.get(name, name).replace('_', '-')}" for name in changed)
        raise ValueError(f"a resumed run keeps its settings; leave out {flags}, or start anew with another --out")


@contextmanager
def _telling(folder: RunFolder, *, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Shows how far a run is, and a line for each diagnosis."""
    with progress("training") as advance:

        def tell(entry: dict[str, Any]) -> None:
            if "blocks" in entry:
                if not quiet:
                    print(_sentence(entry), file=sys.stderr)
                return
            speed = f"loss {entry['loss']:.4g}, {entry['images_per_second']:.4g} images/s"
            if entry["skipped"]:
                speed += f", {entry['skipped']} skipped"
            advance(entry["step"], folder.describe()["num_steps"], speed)

        yield tell


def _sentence(entry: dict[str, Any]) -> str:
    """A diagnosis in a line."""
    last = entry["blocks"][-1]
    merits = "".join(f"{name} {value:.4g}, " for name, value in entry["metrics"].items())
    found = "no artifacts" if entry["undecided"] is None else "too few patches to tell whether there are artifacts"
    if entry["has_artifacts"]:
        found = f"artifacts from block {entry['onset_block']} on, {entry['outlier_fraction']:.2%} of the patches"
    return f"step {entry['step']}: {merits}norms up to {last['max'] / last['median']:.1f} medians, {found}"


def _conclude(folder: RunFolder, done: bool, *, as_json: bool) -> int:
    """Print where the run stands, on the first process."""
    from vitreg.training.engine.run_folder import read_lines

    if os.environ.get("RANK", "0") == "0":
        last = list(read_lines(folder.log))[-1]
        diagnoses = list(read_lines(folder.diagnoses)) if folder.diagnoses.exists() else []
        if as_json:
            latest = diagnoses[-1] if diagnoses else None
            print_json({"run": str(folder.path), "finished": done, "log": last, "diagnosis": latest})
        elif done:
            print(f"finished after {last['step']} steps, loss {last['loss']:.4g}; the model is {folder.path}:")
            print(f"  vitreg diagnose IMAGES --model {folder.path}")
        else:
            print(f"stopped after {last['step']} steps; go on with: vitreg train --resume {folder.path}")
        if last.get("skipped") and not as_json:
            print(f"{last['skipped']} images could not be read and were replaced by others; see {folder.skipped}")
    return 0 if done else INTERRUPTED
