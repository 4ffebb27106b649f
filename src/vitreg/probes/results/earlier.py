"""Evaluations add up: answers of earlier commands that belong into one table with those of the last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitreg.probes.results.result_cache import Answer, Asked, read_answer


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
        return f"of other images, targets or classes: {theirs}, not {ours}"
    if earlier.probe == later.probe and earlier.settings != later.settings:
        return "of other settings"
    return ""
