"""`vitreg train`: Vision Transformers with registers, from scratch."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from vitreg.cli.options import positive
from vitreg.cli.output import INTERRUPTED, print_json, progress
from vitreg.cli.overrides import changed, flags_of, overrides
from vitreg.training.engine.config import LoopConfig, OptimizerConfig, TrainingConfig
from vitreg.training.recipes.configs import METHODS
from vitreg.training.recipes.sizes import Size

if TYPE_CHECKING:
    from vitreg.training.engine.run_folder import RunFolder

Recipe = Annotated[Positional[Literal["deit3", "dinov2", "clip", "distill"] | None], arg(metavar="RECIPE")]


@dataclass(frozen=True)
class RunOptions:
    """The run.

    Attributes:
        data: class folders, Parquet files, WebDataset tars or captions.csv; or a folder with train and val parts.
        val: held-out images; by default those in --data, or a twentieth of it, at most 1000.
        limit: train on so many images only, from all over the set.
        out: the run's folder, a new one.
        resume: folder of a run to go on with.
        smoke: a small form of the recipe that takes two minutes on two CPU cores.
        epochs: passes over the images, instead of --steps.
        workers: processes that decode images, for each training process.
        device: cpu, cuda, mps; auto takes a GPU where there is one.
        json: print the result as JSON.
    """

    data: str | None = None
    val: str | None = None
    limit: int | None = None
    out: Path = Path("vitreg-out/train")
    resume: Path | None = None
    smoke: bool = False
    epochs: float | None = None
    workers: int | None = None
    device: str = "auto"
    json: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None:
            positive("--limit", self.limit)


@dataclass(frozen=True)
class ModelShape:
    """The model; what is left out is the recipe's.

    Attributes:
        registers: 4 by default, as in the paper.
        arch: size of the model; deit3 takes small by default, clip base, dinov2 large.
        size: side of what the model sees in pixels.
        patch_size: in pixels.
    """

    registers: int | None = None
    arch: Size | None = None
    size: int | None = None
    patch_size: int | None = None


def with_settings_of(args: Sequence[str]) -> Callable[..., int]:
    """`train`, which takes every setting of the recipe that is among the arguments."""

    @functools.wraps(train)
    def command(*values: Any, **named: Any) -> int:
        return train(*values, **named)

    # Folders may be called like a recipe.
    words = [word for before, word in pairwise(["", *args]) if before not in ("--data", "--val", "--out", "--resume")]
    nested: dict[str, type] = {"optimizer": OptimizerConfig}
    if recipe := next((word for word in words if word in METHODS), None):
        nested["method"] = METHODS[recipe]
    command.__annotations__ |= {"given": overrides(TrainingConfig, LoopConfig, **nested)}
    return command


def train(
    recipe: Recipe = None,
    *,
    run: RunOptions = RunOptions(),
    shape: ModelShape = ModelShape(),
    given: dict[str, Any],
) -> int:
    """Train a Vision Transformer with registers, and record when artifacts appear.

    Writes a run's folder: model.safetensors (--model RUN in other commands), log.jsonl, diagnosis.jsonl, TensorBoard
    curves, checkpoints. Ctrl-C leaves a checkpoint; --resume goes on exactly where it was. For several GPUs start it as
    torchrun --nproc-per-node 8 -m vitreg train ...

    Example: vitreg train deit3 --data imagenet/ --arch small --registers 4 --out runs/small-4

    Example: vitreg train dinov2 --smoke --num-prototypes 512 --data tiny-imagenet-100/ --out runs/smoke

    Example: vitreg train distill --teacher dinov2_vitb14 --arch mini --data photographs/ --out runs/student

    Example: vitreg train --resume runs/small-4

    Args:
        recipe: deit3 (from labels), dinov2 (from images alone), clip (from captions) or distill (from another model),
            each with settings of its own: vitreg train RECIPE --help; left out with --resume.
        run: the run.
        shape: the model; the recipe's by default.
        given: the recipe's by default.
    """
    from vitreg import training
    from vitreg.training.engine.run_folder import RunFolder

    options: dict[str, Any] = {"device": run.device, "num_workers": run.workers}
    if run.resume is not None:
        folder = RunFolder(run.resume)
        _check_resumed(folder, recipe, run, shape, given)
        with _telling(folder, quiet=run.json) as tell:
            done = training.resume(run.resume, data=run.data, val=run.val, on_log=tell, **options)
        return _conclude(folder, done, as_json=run.json)
    if recipe is None or run.data is None:
        raise ValueError("give a recipe and --data, as in: vitreg train deit3 --data imagenet/; or --resume RUN")
    opened = training.open_data(run.data, run.val, limit=run.limit, seed=given.get("seed", 0), device=run.device)
    images = opened.images
    config = configured(recipe, run, shape, given, num_images=len(images), num_classes=len(images.classes))
    with _telling(RunFolder(run.out), quiet=run.json) as tell:
        done = training.train(config, opened, run.out, on_log=tell, **options)
    return _conclude(RunFolder(run.out), done, as_json=run.json)


def configured(
    recipe: str, run: RunOptions, shape: ModelShape, given: dict[str, Any], *, num_images: int, num_classes: int
) -> TrainingConfig:
    """The recipe's config with what was given instead; shorter runs warm up for a shorter time."""
    from vitreg.training import RECIPES

    shaping = ("teacher", "start") if recipe == "distill" else ()  # what decides the student's shape
    config = RECIPES[recipe](
        **{name: given.get("method", {}).get(name, "") for name in shaping},
        num_images=num_images,
        num_classes=num_classes,
        num_registers=4 if shape.registers is None else shape.registers,
        size=shape.arch,
        image_size=shape.size,
        patch_size=shape.patch_size,
        batch_size=given.get("batch_size"),
        epochs=run.epochs,
        smoke=run.smoke,
    )
    if (steps := given.get("num_steps")) is not None:
        follows = {"diagnose_every": max(1, steps // 20), "optimizer": {}}
        if steps < config.num_steps:
            follows["optimizer"] = {"warmup_steps": config.optimizer.warmup_steps * steps // config.num_steps}
        config = changed(config, follows)
    return changed(config, given)


def _check_resumed(
    folder: RunFolder, recipe: str | None, run: RunOptions, shape: ModelShape, given: dict[str, Any]
) -> None:
    stored = folder.describe()["recipe"]
    if recipe not in (None, stored):
        raise ValueError(f"{folder.path} is a run of {stored}, not of {recipe}; leave the recipe out, or start anew")
    chosen = dataclasses.asdict(shape) | {"smoke": run.smoke or None, "limit": run.limit, "epochs": run.epochs}
    flags = [*flags_of({name: value for name, value in chosen.items() if value is not None}), *flags_of(given)]
    if flags:
        raise ValueError(
            f"a resumed run keeps its settings; leave out {', '.join(flags)}, or start anew with another --out"
        )


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
