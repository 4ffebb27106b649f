"""An evaluation in plain data: what every probe says of every model, and where a model differs from its pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from vitreg.probes.catalogue import TITLES
from vitreg.probes.score import ProbeResult, Score


@dataclass(frozen=True)
class Evaluated:
    """A model and what the probes say of it.

    Attributes:
        name: of the model, as it was asked for.
        num_registers: its registers, those of a fix included.
        results: by probe.
    """

    name: str
    num_registers: int
    results: Mapping[str, ProbeResult]


def summarize(models: Sequence[Evaluated], data: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The evaluation in JSON types, format `vitreg-evaluation/1`; docs/probes.md describes the keys.

    A model with registers is compared with the nearest one before it that has fewer, which makes the pairs of the
    paper's tables. Intervals are 95 % bootstrap intervals over the validation pictures, those of differences paired.

    Args:
        models: in the order of the table.
        data: what is known of each task's pictures.
    """
    pairs = pair_up([model.num_registers for model in models])
    rows = [
        {
            "name": model.name,
            "num_registers": model.num_registers,
            "compared_with": None if pair is None else models[pair].name,
            "probes": {
                probe: _probe(probe, result, None if pair is None else models[pair].results.get(probe))
                for probe, result in model.results.items()
            },
        }
        for model, pair in zip(models, pairs, strict=True)
    ]
    return {
        "format": "vitreg-evaluation/1",
        "version": metadata.version("vitreg"),
        "verdict": [sentence for row in rows if row["compared_with"] for sentence in _verdict(row)],
        "data": {task: dict(known) for task, known in data.items()},
        "models": rows,
    }


def _verdict(row: dict[str, Any]) -> list[str]:
    """What registers changed, in sentences."""
    changes: dict[bool, list[str]] = {True: [], False: []}
    equal = 0
    for probe in row["probes"].values():
        for score in probe["scores"]:
            difference = score["difference"]
            if difference is None:
                continue
            if difference["better"] is None:
                equal += 1
                continue
            low, high = difference["interval"]
            of = f", {score['subject']}" if score["subject"] else ""
            unit = f" {score['unit']}" if score["unit"] not in ("", "%") else ""
            digits = ".1f" if score["unit"] == "%" else "#.3g"
            changes[difference["better"]].append(
                f"{score['name']}{of} ({probe['title']}) by "
                f"{difference['value']:+{digits}}{unit} [{low:+{digits}}, {high:+{digits}}]"
            )
    against = f"{row['name']} against {row['compared_with']}"
    sentences = [
        f"{against}: {word} in {'; '.join(changes[better])}."
        for better, word in ((True, "better"), (False, "worse"))
        if changes[better]
    ]
    if equal:
        figures = "figure does" if equal == 1 else "figures do"
        sentences.append(f"{against}: {equal} {figures} not differ significantly.")
    return sentences


def pair_up(num_registers: Sequence[int]) -> list[int | None]:
    """For every model the nearest one before it that has fewer registers."""
    return [
        next((i for i in reversed(range(row)) if num_registers[i] < own), None) for row, own in enumerate(num_registers)
    ]


def _probe(name: str, result: ProbeResult, other: ProbeResult | None) -> dict[str, Any]:
    theirs = {} if other is None else {(score.name, score.subject): score for score in other.scores}
    scores = [_score(score, theirs.get((score.name, score.subject))) for score in result.scores]
    return {"title": TITLES[name], "scores": scores, "details": result.details}


def _score(score: Score, other: Score | None) -> dict[str, Any]:
    difference = None if other is None else score.minus(other)
    better = None
    if difference is not None and difference.is_significant:
        better = (difference.value < 0) == score.lower_is_better
    return {
        "name": score.name,
        "subject": score.subject,
        "unit": score.unit,
        "lower_is_better": score.lower_is_better,
        "value": _finite(score.value),
        "interval": [_finite(bound) for bound in score.interval()],
        "deviation": score.deviation,
        "missing": score.missing,
        "difference": None
        if difference is None
        else {
            "value": difference.value,
            "interval": list(difference.interval),
            "significant": difference.is_significant,
            "better": better,
        },
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
