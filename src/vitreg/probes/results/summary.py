"""An evaluation in plain data: what every probe says of every model, and where a model differs from its pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from vitreg.common.words import counted
from vitreg.probes.catalogue import QUICK, TITLES
from vitreg.probes.results.result_cache import Answer, Asked
from vitreg.probes.results.score import Score


@dataclass(frozen=True)
class Evaluated:
    """A model and what the probes say of it.

    Attributes:
        name: of the model, for tables.
        answers: by probe; at least one.
    """

    name: str
    answers: Mapping[str, Answer]

    @property
    def model(self) -> Asked:
        """What is known of the model."""
        return next(iter(self.answers.values())).asked


def summarize(models: Sequence[Evaluated], notes: Sequence[str] = ()) -> dict[str, Any]:
    """The evaluation in JSON types, format `vitreg-evaluation/1`; docs/probes.md describes the keys.

    A model with registers is compared with the nearest one before it that has fewer and is otherwise alike, which makes
    the pairs of the paper's tables. Intervals are 95 % bootstrap intervals over the validation images, those of
    differences paired. `notes` are what else is to be said.
    """
    pairs = pair_up([model.model for model in models])
    rows = [
        {
            "name": model.name,
            "source": model.model.model,
            "weights": model.model.weights,
            "num_registers": model.model.num_registers,
            "compared_with": None if pair is None else models[pair].name,
            "probes": {
                probe: _probe(model.answers[probe], None if pair is None else models[pair].answers.get(probe))
                for probe in sorted(model.answers, key=_column)
            },
        }
        for model, pair in zip(models, pairs, strict=True)
    ]
    asked = [answer.asked for model in models for answer in model.answers.values()]
    return {
        "format": "vitreg-evaluation/1",
        "version": metadata.version("vitreg"),
        "verdict": [sentence for row in rows if row["compared_with"] for sentence in _verdict(row)],
        "notes": [*notes, *_skipped(models)],
        "data": {one.task: {"source": one.images, "num_train": one.num_train, "num_val": one.num_val} for one in asked},
        "models": rows,
    }


def title_of(probe: str) -> str:
    """What to call a probe in tables."""
    protocol = probe.removesuffix(QUICK)
    return TITLES[protocol] + ", quick" * (protocol != probe)


def _column(probe: str) -> tuple[int, bool]:
    """In the order of the catalogue, quick answers behind those by the protocol."""
    protocol = probe.removesuffix(QUICK)
    return list(TITLES).index(protocol), protocol != probe


def _skipped(models: Sequence[Evaluated]) -> list[str]:
    """What is left out of figures because it cannot be read."""
    found: dict[str, None] = {}
    for model in models:
        for answer in model.answers.values():
            for part, number in answer.result.details.get("skipped", {}).items():
                if number:
                    of = f"{counted(number, f'{part} image')} of {answer.asked.images}"
                    found[f"{of} cannot be read and count for nothing."] = None
    return list(found)


def _verdict(row: dict[str, Any]) -> list[str]:
    """What registers changed, in sentences."""
    changes: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for probe in row["probes"].values():
        for score in probe["scores"]:
            if difference := score["difference"]:
                low, high = difference["interval"]
                of = f", {score['subject']}" if score["subject"] else ""
                unit = f" {score['unit']}" if score["unit"] not in ("", "%") else ""
                digits = ".1f" if score["unit"] == "%" else "#.3g"
                changes[difference["better"]].append(
                    f"{score['name']}{of} ({probe['title']}) by "
                    f"{difference['value']:+{digits}}{unit} [{low:+{digits}}, {high:+{digits}}]"
                )
    against = f"{row['name']} against {row['compared_with']}"
    words = {True: "better", False: "worse"}
    sentences = [f"{against}: {word} in {'; '.join(changes[sign])}." for sign, word in words.items() if changes[sign]]
    if equal := len(changes[None]):
        sentences.append(
            f"{against}: {counted(equal, 'figure')} {'does' if equal == 1 else 'do'} not differ significantly."
        )
    return sentences


def pair_up(models: Sequence[Asked]) -> list[int | None]:
    """For every model the nearest one before it that has fewer registers and the same blocks, channels and patches."""

    def fits(number: int, own: Asked) -> bool:
        other = models[number]
        return other.num_registers < own.num_registers and other.architecture == own.architecture

    return [next((n for n in reversed(range(row)) if fits(n, own)), None) for row, own in enumerate(models)]


def _probe(answer: Answer, other: Answer | None) -> dict[str, Any]:
    asked = answer.asked
    comparable = other.result.scores if other is not None and other.asked.size == asked.size else ()
    theirs = {(score.name, score.subject): score for score in comparable}
    return {
        "title": title_of(asked.probe),
        "quick": asked.is_quick,
        "size": asked.size,
        "settings": asked.settings,
        "scores": [_score(score, theirs.get((score.name, score.subject))) for score in answer.result.scores],
        "details": answer.result.details,
    }


def _score(score: Score, other: Score | None) -> dict[str, Any]:
    difference = None
    if other is not None and (found := score.minus(other)) is not None:
        difference = {
            "value": found.value,
            "interval": list(found.interval),
            "significant": found.is_significant,
            "better": (found.value < 0) == score.lower_is_better if found.is_significant else None,
        }
    return {
        "name": score.name,
        "subject": score.subject,
        "unit": score.unit,
        "lower_is_better": score.lower_is_better,
        "value": _finite(score.value),
        "interval": [_finite(bound) for bound in score.interval()],
        "deviation": score.deviation,
        "missing": score.missing,
        "difference": difference,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
