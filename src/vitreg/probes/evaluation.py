"""Asks probes of a model: one feature pass for each set of images and size, however many probes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitreg.common.progress import OnProgress
from vitreg.common.words import duration
from vitreg.images import DenseSet
from vitreg.model import Preprocess, VisionTransformer
from vitreg.probes.catalogue import PROBES, QUICK, EvalData, Probe, ProbeInput
from vitreg.probes.pace import first_steps
from vitreg.probes.passes import PassConfig, Passes, preprocessing
from vitreg.probes.results.result_cache import Answer, Asked, Shown, load_answer, save_answer
from vitreg.probes.results.score import ProbeResult
from vitreg.probes.tasks.classes import classes_of


def evaluate(
    vit: VisionTransformer,
    source: str,
    data: Sequence[EvalData],
    probes: Mapping[str, Any],
    folder: Path,
    config: PassConfig | None = None,
    *,
    quick: bool = False,
    stage: Callable[[str], AbstractContextManager[OnProgress]],
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
    passes = Passes(vit, source, folder / "features", config or PassConfig(), stage, say)
    questions = [
        _Question.of(passes, one, name, settings, quick, folder)
        for one in data
        for name, settings in probes.items()
        if PROBES[name].task == one.task
    ]
    for one in data:
        if any(question.probe.labels for question in questions if question.data is one):
            classes_of(one.train, one.val)
    still_open: list[_Question] = []
    for question in questions:
        answer = load_answer(question.file, question.asked)
        if answer is None or (passes.config.strict and any(answer.result.details["skipped"].values())):
            still_open.append(question)
        else:
            yield answer
    inputs = [question.read(passes, still_open) for question in still_open]
    waiting: list[tuple[_Question, ProbeInput, float]] = []
    for question, reads in zip(still_open, inputs, strict=True):
        with stage(f"{source}: first steps of {question.title}") as on_progress:
            result, seconds = first_steps(partial(question.probe.ask, reads, question.settings), on_progress)
        if result is None:
            waiting.append((question, reads, seconds))
        else:
            yield question.keep(reads, result)
    if waiting:
        each = ", ".join(f"{question.title} {duration(seconds)}" for question, _, seconds in waiting)
        total = f"; {duration(sum(seconds for *_, seconds in waiting))} in all" if len(waiting) > 1 else ""
        say(f"{source}: what is left takes on this machine about: {each}{total}")
    for question, reads, _ in waiting:
        with stage(f"{source}: {question.title}") as on_progress:
            yield question.keep(reads, question.probe.ask(reads, question.settings, on_progress))


@dataclass(frozen=True)
class _Question:
    """A probe with its settings, of one model on one set of images."""

    probe: Probe
    settings: Any
    data: EvalData
    preprocess: Preprocess
    asked: Asked
    file: Path

    @classmethod
    def of(cls, passes: Passes, data: EvalData, name: str, settings: Any, quick: bool, folder: Path) -> _Question:
        probe, key = PROBES[name], name
        if quick:
            # What was chosen is kept: three draws that were asked for are not cut to two.
            own = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
            chosen = {name: value for name, value in own.items() if value != getattr(probe.config, name)}
            cut = dataclasses.replace(probe.quick(settings, len(data.train)), **chosen)
            settings, key = cut, name + QUICK * (cut != settings)
        preprocess = preprocessing(passes.vit, probe, data)
        limited = probe.patches and data.task == "classification"
        asked = Asked.of(
            passes.vit,
            passes.source,
            passes.model.digest,
            probe=key,
            settings=f"{settings}, patches of {passes.config.patch_images if limited else 'all'} images",
            task=data.task,
            images=data.train.source,
            num_train=len(data.train),
            num_val=len(data.val),
            data=data.digest,
            preprocess=str(preprocess),
            size=list(preprocess.size),
        )
        return cls(probe, settings, data, preprocess, asked, asked.file(folder))

    @property
    def title(self) -> str:
        return f"{self.probe.title}{', quick' * self.asked.is_quick}"

    def read(self, passes: Passes, questions: Sequence[_Question]) -> ProbeInput:
        """What it is asked of, from a pass that all questions of the same data and size share."""
        fellows = [one for one in questions if one.data is self.data and one.preprocess == self.preprocess]
        data, features = self.data, passes.features(self.data.task, [(one.probe, one.settings) for one in fellows])
        # Those that train nothing never look at the training images, which may be a million.
        train = passes.store(data, "training", self.preprocess, features) if self.probe.trains else None
        vals = tuple(
            passes.store(data, "validation", preprocessing(passes.vit, self.probe, data, scale), features)
            for scale in (1.0, *self.probe.enlarged)
        )
        train = train or vals[0]
        state = self.file.parents[1] / "states" / f"{self.file.stem}-{train.id[:12]}.safetensors"
        return ProbeInput(passes.vit, passes.source, train, vals, data, state)

    def keep(self, reads: ProbeInput, result: ProbeResult) -> Answer:
        """The answer, once it is on the disk."""
        skipped = {"training": len(reads.train.skipped) * self.probe.trains, "validation": len(reads.val.skipped)}
        val = self.data.val
        shown = {
            number: Shown(Path(val.name(number)).name, np.asarray(val.image(number)), val.target(number), prediction)
            for number, prediction in result.predictions.items()
            if isinstance(val, DenseSet)
        }
        result = dataclasses.replace(result, details={**result.details, "skipped": skipped}, predictions={})
        answer = Answer(self.asked, result, shown)
        save_answer(self.file, answer)
        reads.state.unlink(missing_ok=True)
        return answer
