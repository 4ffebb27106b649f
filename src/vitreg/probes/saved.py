"""What a probe said, kept on disk: the same question is not computed twice, and an interruption loses one answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vitreg.disk import replacing
from vitreg.probes.score import ProbeResult, Score


def save_result(path: Path, question: str, result: ProbeResult) -> None:
    """Keep an answer.

    Args:
        path: the file, whose folder is made.
        question: all that the answer follows from.
        result: the answer.

    Raises:
        ValueError: it cannot be written.
    """
    scores = [{**dataclasses.asdict(score), "sums": None} for score in result.scores]
    note = {"question": question, "probe": result.probe, "scores": scores, "details": result.details}
    arrays = {f"sums.{i}": score.sums for i, score in enumerate(result.scores)}
    arrays |= {f"prediction.{number}": prediction for number, prediction in result.predictions.items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with replacing(path) as temporary:
        save_file(arrays, temporary, {"vitreg": json.dumps(note)})


def load_result(path: Path, question: str) -> ProbeResult | None:
    """The answer to this question; None where there is none, or only that to another."""
    try:
        with safe_open(path, framework="np") as file:
            note = json.loads((file.metadata() or {})["vitreg"])
            if note["question"] != question:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        scores = tuple(
            Score(**{**values, "sums": arrays[f"sums.{i}"], "draws": tuple(values["draws"])})
            for i, values in enumerate(note["scores"])
        )
        predictions = {int(n.partition(".")[2]): a for n, a in arrays.items() if n.startswith("prediction.")}
        return ProbeResult(note["probe"], scores, note["details"], predictions)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
