"""What a probe said, kept on disk: the same question is not computed twice, and an interruption loses one answer.

Evaluations add up: answers of earlier commands that belong into one table with those of the last are found again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped, UInt8

from vitreg.common.words import safe_name
from vitreg.model import VisionTransformer
from vitreg.probes.catalogue import QUICK
from vitreg.probes.results.score import ProbeResult, Score
from vitreg.probes.store.tensor_file import UNREADABLE, open_tensors, write_tensors

_ARRAYS = ("photo", "truth", "prediction")


@dataclass(frozen=True)
class Asked:
    """All that an answer follows from, but for chance, and what readers want to know of it.

    Attributes:
        probe: its name, with `QUICK` behind it where its protocol was cut.
        model: what it was loaded from.
        weights: `StoredModel.digest`.
        architecture: in words; a model and its fix have the same.
        images: where the training images are from.
        data: `StoredData.digest` of images and labels, digests of targets, and names of the classes.
        size: height and width that the model sees; None where images keep their own.
        version: of vitreg.
    """

    probe: str
    settings: str
    model: str
    weights: str
    architecture: str
    num_registers: int
    task: str
    images: str
    num_train: int
    num_val: int
    data: str
    preprocess: str
    size: list[int] | None
    version: str = field(default_factory=lambda: metadata.version("vitreg"))

    @classmethod
    def of(cls, vit: VisionTransformer, source: str, weights: str, **what: Any) -> Asked:
        """A question of a model, which was loaded from `source`."""
        # What a model and its fix, or a model trained with registers and one without, have in common.
        c = vit.config
        architecture = f"{c.depth} blocks of {c.embed_dim} channels, patches of {c.patch_size} pixels"
        return cls(model=source, weights=weights, architecture=architecture, num_registers=vit.num_registers, **what)

    def file(self, folder: Path) -> Path:
        """Where its answer is, in the folder of an evaluation."""
        return folder / "answers" / f"{safe_name(self.model)}-{self.probe}.safetensors"

    @property
    def is_quick(self) -> bool:
        """Whether it is not the protocol's answer."""
        return self.probe.endswith(QUICK)


@dataclass(frozen=True, eq=False)
class Shown:
    """An image with the truth and the prediction for every pixel, for reports."""

    name: str
    photo: UInt8[np.ndarray, "H W 3"]
    truth: Shaped[np.ndarray, "H W"]
    prediction: Shaped[np.ndarray, "H W"]


@dataclass(frozen=True, eq=False)
class Answer:
    """What a probe said of a model."""

    asked: Asked
    result: ProbeResult
    shown: Mapping[int, Shown] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, str]:
        """In a table."""
        return self.asked.model, self.asked.probe


def size_in_pixels(size: Sequence[int] | None) -> str:
    """`224 px`, or `336 x 448 px`, height first; empty where images keep their own."""
    return "" if size is None else f"{' x '.join(map(str, dict.fromkeys(size)))} px"


def save_answer(path: Path, answer: Answer) -> None:
    """Keep an answer; a `ValueError` where it cannot be written."""
    result = answer.result
    note = {
        "asked": dataclasses.asdict(answer.asked),
        "probe": result.probe,
        "scores": [{**dataclasses.asdict(score), "sums": None} for score in result.scores],
        "details": result.details,
        "shown": {number: shown.name for number, shown in answer.shown.items()},
    }
    arrays = {f"sums.{i}": score.sums for i, score in enumerate(result.scores)}
    for number, shown in answer.shown.items():
        arrays |= {f"{name}.{number}": getattr(shown, name) for name in _ARRAYS}
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    write_tensors(path, tensors, note)


def load_answer(path: Path, asked: Asked) -> Answer | None:
    """The answer to this question; None where there is none, or only that to another."""
    answer = read_answer(path)
    return answer if answer is not None and answer.asked == asked else None


def read_answer(path: Path) -> Answer | None:
    """The answer in a file, whatever was asked; None where it is damaged or something else."""
    try:
        with open_tensors(path) as (file, note):
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        scores = tuple(
            Score(**{**values, "sums": arrays[f"sums.{i}"], "draws": tuple(values["draws"])})
            for i, values in enumerate(note["scores"])
        )
        shown = {
            int(number): Shown(name, *(arrays[f"{kind}.{number}"] for kind in _ARRAYS))
            for number, name in note["shown"].items()
        }
        return Answer(Asked(**note["asked"]), ProbeResult(note["probe"], scores, note["details"]), shown)
    except UNREADABLE:
        return None


def with_earlier(folder: Path, answers: Sequence[Answer]) -> tuple[list[Answer], list[str]]:
    """All answers in a folder that agree with the given ones, and with each other.

    Figures of one task must be of the same images and targets, those of one model of the same weights, and those of one
    probe of the same settings: else a table would compare what cannot be compared. Of two that do not agree the later
    one is kept.

    Returns:
        These and the given ones, which are of the last command, and a sentence for each that is left out.
    """
    kept, left_out = list(answers), []
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    for path in sorted(files, key=lambda path: files[path], reverse=True):
        answer = read_answer(path)
        if answer is None or answer.place in {other.place for other in kept}:
            continue
        reasons = (why_not(answer.asked, other.asked) for other in kept)
        if reason := next(filter(None, reasons), ""):
            left_out.append(f"{answer.asked.probe} of {answer.asked.model} is left out: it is {reason}")
        else:
            kept.append(answer)
    return kept, left_out


def why_not(earlier: Asked, later: Asked) -> str:
    """Why two answers cannot be in one table; empty where they can."""
    if earlier.version != later.version:
        return f"by vitreg {earlier.version}, not {later.version}"
    if earlier.model == later.model and earlier.weights != later.weights:
        return "of other weights of that name"
    if earlier.task == later.task and earlier.data != later.data:
        theirs, ours = (f"{one.images} ({one.num_train} and {one.num_val})" for one in (earlier, later))
        if theirs == ours:  # the digests differ
            return f"of {ours} with other targets or classes, or before its files changed"
        return f"of other images, targets or classes: {theirs}, not {ours}"
    if earlier.probe == later.probe and earlier.settings != later.settings:
        return "of other settings"
    return ""
