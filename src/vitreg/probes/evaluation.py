"""Asks probes of a model: one feature pass for each set of images and size, however many probes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from vitreg.common.progress import OnProgress
from vitreg.common.words import duration, safe_name, size_in_words
from vitreg.images import DenseSet, ImageSet, image_size
from vitreg.model import Preprocess, VisionTransformer
from vitreg.probes.catalogue import PROBES, QUICK, Probe, ProbeInput, Task
from vitreg.probes.pace import first_steps, telling_how_long
from vitreg.probes.results.result_cache import (
    Answer,
    Asked,
    Shown,
    architecture,
    load_answer,
    save_answer,
    size_in_pixels,
)
from vitreg.probes.results.score import ProbeResult
from vitreg.probes.store.dense_features import dense_preprocess
from vitreg.probes.store.extract import extract
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.store.manifest import read_manifest
from vitreg.probes.store.origin import FeaturesConfig, Origin, StoredData, StoredModel
from vitreg.probes.tasks.classes import classes_of_images
from vitreg.probes.tasks.linear import linear_blocks

_CROP = 224 / 256
"""The part of an image that DINOv2's evaluations keep: resized to 256, and the middle 224."""

Stage = Callable[[str], AbstractContextManager[OnProgress]]


@dataclass(frozen=True)
class EvalData:
    """What probes are asked on.

    Attributes:
        task: its kind.
        train, val: the images; those of segmentation and depth have targets.
        size: height and width in pixels that models see, but for whole patches; None for that of each probe's protocol.
        class_names: words for the classes, where the set has only numbers.
    """

    task: Task
    train: ImageSet
    val: ImageSet
    size: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None

    @cached_property
    def stored(self) -> tuple[StoredData, StoredData]:
        """What features of the two sets are of."""
        return StoredData.of(self.train), StoredData.of(self.val)

    @cached_property
    def digest(self) -> str:
        """Changes with all that answers are of: images, labels, classes and their names, targets as they are read."""
        dense = [one.targets_digest() for one in (self.train, self.val) if isinstance(one, DenseSet)]
        return f"images {[one.digest for one in self.stored]}, targets {dense}, class names {self.class_names}"


@dataclass(frozen=True)
class PassConfig:
    """How features are computed.

    Attributes:
        patch_images: patch tokens are kept of so many images of a classification set: 10000 images of a ViT-L/14 are
            5 GB.
        batch_size: images at a time.
        strict: an image that cannot be read is an error, also where features or answers without it are there.
    """

    patch_images: int = 10000
    batch_size: int = 32
    strict: bool = False


def evaluate(
    vit: VisionTransformer,
    source: str,
    data: Sequence[EvalData],
    probes: Mapping[str, Any],
    folder: Path,
    config: PassConfig | None = None,
    *,
    quick: bool = False,
    stage: Stage,
    say: Callable[[str], None] = lambda sentence: None,
) -> Iterator[Answer]:
    """Ask probes of one model; answers come as they are found, and are kept.

    Args:
        vit: the model.
        source: what it was loaded from.
        data: the images, each task once.
        probes: their settings, by name (`catalogue.PROBES`); each is asked on the data of its task.
        folder: keeps features, answers, and what a probe needs to go on after a kill.
        config: how features are computed; by default a `PassConfig()`.
        quick: cut the protocols to the data at hand; such answers are of probes called `NAME-quick`.
        stage: makes a progress bar of what is being done.
        say: told what will take how long, and how many bytes, before it starts.

    Raises:
        ValueError: as of `extract` and of each probe.
    """
    asking = _Asking(vit, source, folder, config or PassConfig(), stage, say)
    questions = [
        asking.question(one, name, settings, quick)
        for one in data
        for name, settings in probes.items()
        if PROBES[name].task == one.task
    ]
    for one in data:
        if any(question.probe.labels for question in questions if question.data is one):
            classes_of_images(one.train, one.val)
    open_questions: list[_Question] = []
    for question in questions:
        answer = load_answer(question.file, question.asked)
        if answer is None or (asking.config.strict and any(answer.result.details["skipped"].values())):
            open_questions.append(question)
        else:
            yield answer
    cases = asking.cases(open_questions)
    waiting: list[tuple[_Question, ProbeInput]] = []
    seconds: dict[str, float] = {}
    for question, case in zip(open_questions, cases, strict=True):
        with stage(f"{source}: first steps of {question.title}") as on_progress:
            result, expected = first_steps(partial(question.ask, case), on_progress)
        if result is None:
            waiting.append((question, case))
            seconds[question.title] = expected
        else:
            yield question.keep(case, result)
    if waiting:
        each = ", ".join(f"{title} {duration(expected)}" for title, expected in seconds.items())
        total = f"; {duration(sum(seconds.values()))} in all" if len(waiting) > 1 else ""
        say(f"{source}: what is left takes on this machine about: {each}{total}")
    for question, case in waiting:
        with stage(f"{source}: {question.title}") as on_progress:
            yield question.keep(case, question.ask(case, on_progress))


@dataclass(frozen=True)
class _Question:
    """A probe with its settings, of one model on one set of images."""

    probe: Probe
    settings: Any
    data: EvalData
    preprocess: Preprocess
    asked: Asked
    file: Path

    @property
    def title(self) -> str:
        return f"{self.probe.title}{', quick' * self.asked.is_quick}"

    def ask(self, case: ProbeInput, on_progress: OnProgress) -> ProbeResult:
        return self.probe.ask(case, self.settings, on_progress)

    def keep(self, case: ProbeInput, result: ProbeResult) -> Answer:
        """The answer, once it is on the disk."""
        skipped = {"training": len(case.train.skipped) * self.probe.trains, "validation": len(case.val.skipped)}
        val = self.data.val
        shown = {
            number: Shown(Path(val.name(number)).name, np.asarray(val.image(number)), val.target(number), prediction)
            for number, prediction in result.predictions.items()
            if isinstance(val, DenseSet)
        }
        result = dataclasses.replace(result, details={**result.details, "skipped": skipped}, predictions={})
        answer = Answer(self.asked, result, shown)
        save_answer(self.file, answer)
        case.state.unlink(missing_ok=True)
        return answer


@dataclass(frozen=True)
class _Asking:
    """What is asked of one model."""

    vit: VisionTransformer
    source: str
    folder: Path
    config: PassConfig
    stage: Stage
    say: Callable[[str], None]

    @cached_property
    def model(self) -> StoredModel:
        return StoredModel.of(self.vit)

    def question(self, data: EvalData, name: str, settings: Any, quick: bool) -> _Question:
        probe, key = PROBES[name], name
        if quick and (cut := probe.quick(settings, len(data.train))) != settings:
            settings, key = cut, name + QUICK
        preprocess = preprocessing(self.vit, probe, data)
        limited = probe.patches and data.task == "classification"
        asked = Asked(
            probe=key,
            settings=f"{settings}, patches of {self.config.patch_images if limited else 'all'} images",
            model=self.source,
            weights=self.model.digest,
            architecture=architecture(self.vit),
            num_registers=self.vit.num_registers,
            task=data.task,
            images=data.train.source,
            num_train=len(data.train),
            num_val=len(data.val),
            data=data.digest,
            preprocess=str(preprocess),
            size=list(preprocess.size),
        )
        file = self.folder / "answers" / f"{safe_name(self.source)}-{key}.safetensors"
        return _Question(probe, settings, data, preprocess, asked, file)

    def cases(self, questions: Sequence[_Question]) -> list[ProbeInput]:
        """What probes read, from passes that all probes of a size share."""
        cases: list[ProbeInput] = []
        for question in questions:
            probe, data, preprocess = question.probe, question.data, question.preprocess
            fellows = [one for one in questions if one.data is data and one.preprocess == preprocess]
            features = _features_config(self.vit, data.task, fellows, self.config)
            # Those that train nothing never look at the training images, which may be a million.
            train = self._store(data, "training", preprocess, features) if probe.trains else None
            vals = tuple(
                self._store(data, "validation", preprocessing(self.vit, probe, data, scale), features)
                for scale in (1.0, *probe.enlarged)
            )
            train = train or vals[0]
            state = self.folder / "states" / f"{question.file.stem}-{train.id[:12]}.safetensors"
            cases.append(ProbeInput(self.vit, self.source, train, vals, data.train, data.val, data.class_names, state))
        return cases

    def _store(self, data: EvalData, part: str, preprocess: Preprocess, features: FeaturesConfig) -> FeatureStore:
        """The features of a part of the data: those that are there, if they have all that is needed."""
        images = data.train if part == "training" else data.val
        stored = data.stored[part != "training"]
        origin = Origin(self.model, preprocess, stored, features.for_depth(self.vit.config.depth))
        folder = self.folder / "features"
        if (found := _find_store(folder, origin)) is not None:
            if self.config.strict:
                found.check_complete()
            return found
        # Other images, sizes or blocks are another folder, so that one evaluation never stands in the way of the next.
        out = folder / f"{safe_name(self.source)}-{data.task}-{part}-{origin.digest()[:12]}"
        what = f"{self.source}: features of {len(images)} {part} images at {size_in_pixels(preprocess.size)}"
        self.say(f"{what} take {size_in_words(features.num_bytes(self.vit, preprocess, len(images)))} in {folder}")
        with self.stage(what) as on_progress:
            return extract(
                self.vit,
                images,
                out,
                features,
                preprocess=preprocess,
                batch_size=self.config.batch_size,
                strict=self.config.strict,
                on_progress=telling_how_long(lambda told: self.say(f"{what}: {told} left"), on_progress),
            )


def _find_store(folder: Path, wanted: Origin) -> FeatureStore | None:
    """A finished store that has what is wanted, and maybe more."""
    for path in sorted(folder.glob("*/manifest.json")):
        try:
            manifest = read_manifest(path.parent)
        except ValueError:  # it stands in nobody's way
            continue
        if manifest is not None and manifest.finding is not None and manifest.origin.covers(wanted):
            return FeatureStore.open(path.parent)
    return None


def _features_config(
    vit: VisionTransformer, task: Task, questions: Sequence[_Question], config: PassConfig
) -> FeaturesConfig:
    """What the probes need together.

    Of a classification set the class tokens of the last blocks are kept in any case, 10 kB an image of a ViT-L, because
    k-NN is often followed by the linear probe, and another pass takes hours. Patch tokens are kept for who asks.
    """
    depth = vit.config.depth
    blocks: set[int] = set()
    patch_blocks: set[int] = set()
    for question in questions:
        needed = {block % depth for block in question.probe.blocks(question.settings, depth)}
        blocks |= needed
        patch_blocks |= needed if question.probe.patches else set()
    if task == "classification":
        blocks |= {block % depth for block in linear_blocks(depth)}
        patch_blocks |= {depth - 1}
        patches = config.patch_images if any(question.probe.patches for question in questions) else 0
        return FeaturesConfig(tuple(sorted(blocks)), patches, tuple(sorted(patch_blocks)))
    return FeaturesConfig(tuple(sorted(blocks)), None, tuple(sorted(patch_blocks)))


def preprocessing(vit: VisionTransformer, probe: Probe, data: EvalData, scale: float = 1.0) -> Preprocess:
    """What is done to images: all of each where every pixel is asked for, else what a checkpoint or a protocol crops.

    At a size that is not the checkpoint's own, DINOv2's crop is taken.

    Args:
        vit: the model, whose own size is kept where it is below the protocol's.
        probe: has the protocol's size.
        data: has the size that was asked for, if one was.
        scale: by how much images are enlarged besides.
    """
    own = vit.preprocess
    if isinstance(data.train, DenseSet):
        height, width = data.size or image_size(data.train.name(0))
        if data.size is None and probe.size is not None:
            scale *= probe.size / min(height, width)
        return dense_preprocess(own, *_whole_patches(vit, (height, width), scale))
    side = min(own.size) if probe.size is None else probe.size
    if data.size is None and side >= min(own.size):
        return own
    size = _whole_patches(vit, data.size or (side, side))
    return own if size == own.size else dataclasses.replace(own, size=size, crop="center", crop_pct=_CROP)


def _whole_patches(vit: VisionTransformer, size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    patch = vit.config.patch_size
    height, width = (max(1, round(scale * side / patch)) * patch for side in size)
    return height, width
