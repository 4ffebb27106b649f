"""Asks probes of a model on one set of pictures: one feature pass, however many probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vitreg.images import DenseSet, ImageSet, Part, evenly
from vitreg.model import Preprocess, VisionTransformer
from vitreg.probes.catalogue import PROBES, Case, Task
from vitreg.probes.classes import classes_of_pictures
from vitreg.probes.dense_features import dense_preprocess
from vitreg.probes.features import Progress, extract
from vitreg.probes.origin import FeaturesConfig, Origin
from vitreg.probes.saved import load_result, save_result
from vitreg.probes.score import ProbeResult
from vitreg.probes.store import FeatureStore

_HELD_OUT = 5

Stage = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Data:
    """What probes are asked on.

    Attributes:
        task: its kind.
        train, val: the pictures; those of segmentation and depth have targets.
        size: height and width in pixels that pictures are brought to, but for whole patches; None for the checkpoint's
            own preprocessing.
        class_names: words for the classes, where the set has only numbers.
    """

    task: Task
    train: ImageSet
    val: ImageSet
    size: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None

    @cached_property
    def targets(self) -> str:
        """Changes with what answers follow from besides features, which know images, labels and classes."""
        dense = [one.targets_digest() for one in (self.train, self.val) if isinstance(one, DenseSet)]
        return f"targets {dense}, class names {self.class_names}"


@dataclass(frozen=True)
class PassConfig:
    """How features are computed.

    Attributes:
        patch_images: patch tokens are kept of so many pictures of a classification set: 10000 pictures of a ViT-L/14
            are 5 GB.
        batch_size: pictures at a time.
    """

    patch_images: int = 10000
    batch_size: int = 32


def evaluate(
    vit: VisionTransformer,
    source: str,
    data: Data,
    probes: Mapping[str, Any],
    folder: Path,
    config: PassConfig | None = None,
    *,
    stage: Stage,
) -> dict[str, ProbeResult]:
    """Ask probes of one model.

    Args:
        vit: the model.
        source: what it was loaded from.
        data: the pictures.
        probes: their settings, by name (`catalogue.PROBES`); all are of the data's task.
        folder: keeps features, answers, and what a probe needs to go on after a kill.
        config: how features are computed; by default a `PassConfig()`.
        stage: makes a progress bar of what is being done.

    Raises:
        ValueError: as of `extract` and of each probe.
    """
    config = config or PassConfig()
    name = safe_name(source)
    if any(PROBES[probe].labels for probe in probes):
        classes_of_pictures(data.train, data.val)
    features = _features_config(vit, data.task, probes, config)

    def store(images: ImageSet, part: str, scale: float = 1.0) -> FeatureStore:
        size = None if data.size is None else (scale * data.size[0], scale * data.size[1])
        preprocess = preprocessing(vit, size)
        # Another set, size or block is another folder, so that one evaluation never stands in the way of the next.
        digest = Origin.of(vit, images, preprocess, features).digest()[:12]
        out = folder / "features" / f"{name}-{data.task}-{part}-{digest}"
        enlarged = "" if scale == 1 else f", {scale:g} times as large"
        with stage(f"{source}: features of {len(images)} {part} pictures{enlarged}") as on_progress:
            return extract(
                vit,
                images,
                out,
                features,
                preprocess=preprocess,
                batch_size=config.batch_size,
                on_progress=on_progress,
            )

    # Those that train nothing never look at the training pictures, which may be a million.
    train = store(data.train, "training") if any(PROBES[probe].trains for probe in probes) else None
    val = store(data.val, "validation")
    train = train or val
    enlarged = {
        scale: store(data.val, "validation", scale)
        for scale in dict.fromkeys(scale for probe in probes for scale in PROBES[probe].enlarged)
    }
    found = {}
    for probe, settings in probes.items():
        vals = (val, *(enlarged[scale] for scale in PROBES[probe].enlarged))
        ids = [one.id for one in (train, *vals)]
        question = f"vitreg {metadata.version('vitreg')}, {probe}, {settings}, {data.targets}, {ids}"
        answer = folder / "answers" / f"{name}-{probe}.safetensors"
        result = load_result(answer, question)
        if result is None:
            state = folder / "states" / f"{name}-{probe}-{train.id[:12]}.safetensors"
            case = Case(vit, source, train, vals, data.train, data.val, data.class_names, state)
            with stage(f"{source}: {PROBES[probe].title}") as on_progress:
                result = PROBES[probe].ask(case, settings, on_progress)
            save_result(answer, question, result)
            state.unlink(missing_ok=True)
        found[probe] = result
    return found


def _features_config(
    vit: VisionTransformer, task: Task, probes: Mapping[str, Any], config: PassConfig
) -> FeaturesConfig:
    """What the probes need together; of a classification set what all of its probes do, for the next one to find.

    The patch tokens of several blocks, which some probes of every pixel need, are too large to be kept in advance.
    """
    depth = vit.config.depth
    blocks: set[int] = set()
    patch_blocks: set[int] = set()
    asked = dict(probes)
    if task == "classification":
        asked = {name: probe.config for name, probe in PROBES.items() if probe.task == task} | asked
    for name, settings in asked.items():
        needed = set(PROBES[name].blocks(settings, depth))
        blocks |= needed
        patch_blocks |= needed if PROBES[name].patches else set()
    return FeaturesConfig(
        blocks=tuple(sorted(blocks)),
        patch_blocks=tuple(sorted(patch_blocks)),
        patches=config.patch_images if task == "classification" else None,
    )


def preprocessing(vit: VisionTransformer, size: tuple[float, float] | None) -> Preprocess:
    """The checkpoint's, or that which brings whole pictures to a size, as probes of every pixel need it.

    Args:
        vit: the model.
        size: height and width, which are rounded to whole patches.
    """
    if size is None:
        return vit.preprocess
    patch = vit.config.patch_size
    height, width = (max(1, round(side / patch)) * patch for side in size)
    return dense_preprocess(vit.preprocess, height, width)


def choose(images: ImageSet, count: int | None) -> ImageSet:
    """So many images of a set, as many of each class, spread over the set; all where `count` is None or too large.

    Numbers differ by one where `count` is no multiple of the number of classes. A class that has fewer images than its
    share gives all of them, and the others make up for it in equal parts.
    """
    if count is None or count >= len(images):
        return images
    classes = _by_class(images)
    sizes = np.array([len(rows) for rows in classes])
    taken = np.zeros_like(sizes)
    while left := count - int(taken.sum()):
        more = np.flatnonzero(taken < sizes)
        if share := left // len(more):
            taken[more] += np.minimum(share, (sizes - taken)[more])
        else:
            taken[more[evenly(len(more), left)]] += 1
    chosen = [rows[evenly(len(rows), number)] for rows, number in zip(classes, taken.tolist(), strict=True)]
    return _part(images, np.sort(np.concatenate(chosen)))


def hold_out(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Training and validation images of a set that is not divided: every fifth of each class is held out.

    Classes of one or two images are for training only.

    Raises:
        ValueError: no class has three images.
    """
    held_out = np.zeros(len(images), dtype=bool)
    for rows in _by_class(images):
        held_out[rows[_HELD_OUT // 2 :: _HELD_OUT]] = True
    if not held_out.any():
        few = "" if images.labels is None else ", and three of no class"
        raise ValueError(
            f"{images.source} has {len(images)} pictures{few}, of which none can be held out; give more, or a folder "
            "with train/ and val/"
        )
    return _part(images, np.flatnonzero(~held_out)), _part(images, np.flatnonzero(held_out))


def safe_name(source: str) -> str:
    """A model's source as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in source).strip("-.")[-100:]


def _by_class(images: ImageSet) -> list[np.ndarray]:
    """The rows of each class; of all, where there are none."""
    if images.labels is None:
        return [np.arange(len(images))]
    labels = np.asarray(images.labels)
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _part(images: ImageSet, indices: np.ndarray) -> ImageSet:
    return images.part(indices.tolist()) if isinstance(images, DenseSet) else Part(images, indices)
