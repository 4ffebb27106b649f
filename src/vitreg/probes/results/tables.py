"""An evaluation as tables: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vitreg.probes.results.result_cache import size_in_pixels

LEGEND = (
    "In brackets: 95 % bootstrap interval over the validation images and over random choices. ▲ better, ▼ worse than "
    "the model above of its architecture with fewer registers, by more than the paired interval of the difference. "
    "Without a mark are rows whose patches or sizes are not the same in both models, and those of a single random "
    "choice. ± is the deviation over such choices."
)
_COLUMNS = (
    "model", "num_registers", "compared_with", "probe", "quick", "height", "width", "figure", "of", "unit", "value",
    "low", "high", "deviation", "difference", "difference_low", "difference_high", "significant", "missing",
)  # fmt: skip


def markdown(summary: Mapping[str, Any]) -> str:
    """The table of all probes, and one for every probe that has several figures."""
    parts = [_grid(*headline_table(summary)), *summary["notes"]]
    for title, header, rows, notes in tables(summary):
        parts += [f"## {title}", _grid(header, rows), *(f"– {note}" for note in notes)]
    return "\n\n".join([*parts, LEGEND]) + "\n"


def headline_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: models by probes, of each probe its first figure; the layout of the paper's table 2."""
    probes = _probes(summary)
    header = ["model"]
    rows = [[model["name"]] for model in summary["models"]]
    for probe, title in probes.items():
        answers = [model["probes"].get(probe) for model in summary["models"]]
        sizes = ["" if answer is None else size_in_pixels(answer["size"]) for answer in answers]
        first = next(answer["scores"][0] for answer in answers if answer)
        common = "" if len({*filter(None, sizes)}) > 1 else max(sizes)
        figure = ", ".join(filter(None, (_figure(first), first["subject"])))
        header.append(f"{title}{common and ', ' + common}: {figure}")
        for row, answer, size in zip(rows, answers, sizes, strict=True):
            at = "" if common or not size else f" at {size}"
            row.append("–" if answer is None else cell(answer["scores"][0]) + at)
    return header, rows


def tables(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Title, header, rows and what is missing, for every probe with several figures: models and subjects by figures."""
    for probe, title in _probes(summary).items():
        asked = {model["name"]: model["probes"][probe] for model in summary["models"] if probe in model["probes"]}
        answers = {name: answer["scores"] for name, answer in asked.items()}
        if all(len(scores) == 1 for scores in answers.values()):
            continue
        figures = list(dict.fromkeys(_figure(score) for scores in answers.values() for score in scores))
        named = any(score["subject"] for scores in answers.values() for score in scores)
        rows: list[list[str]] = []
        notes: dict[str, None] = {}
        for model, scores in answers.items():
            for subject in dict.fromkeys(score["subject"] for score in scores):
                found = {_figure(score): score for score in scores if score["subject"] == subject}
                cells = [cell(found[figure]) if figure in found else "–" for figure in figures]
                rows.append(
                    [model, size_in_pixels(asked[model]["size"]) or "own", *([subject] if named else []), *cells]
                )
                notes |= dict.fromkeys(f"{model}, {subject}: {s['missing']}" for s in found.values() if s["missing"])
        yield title, ["model", "size", *(["of"] if named else []), *figures], rows, list(notes)


def cell(score: Mapping[str, Any]) -> str:
    """`84.7 [83.9, 85.4] ▲`."""
    if score["value"] is None:
        return "–"
    low, high = (_number(bound, score) for bound in score["interval"])
    deviation = "" if score["deviation"] is None else f" ±{_number(score['deviation'], score)}"
    text = f"{_number(score['value'], score)}{deviation} [{low}, {high}]"
    better = (score["difference"] or {}).get("better")
    return text if better is None else f"{text} {'▲' if better else '▼'}"


def write_csv(summary: Mapping[str, Any]) -> str:
    """One row for each figure."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for model in summary["models"]:
        for probe, answer in model["probes"].items():
            for score in answer["scores"]:
                difference = score["difference"] or {"value": None, "interval": (None, None), "significant": None}
                writer.writerow([
                    model["name"], model["num_registers"], model["compared_with"], probe, answer["quick"],
                    *(answer["size"] or (None, None)), score["name"],
                    score["subject"], score["unit"], score["value"], *score["interval"], score["deviation"],
                    difference["value"], *difference["interval"], difference["significant"], score["missing"],
                ])  # fmt: skip
    return text.getvalue()


def _probes(summary: Mapping[str, Any]) -> dict[str, str]:
    """Titles of the probes, in the order they were made."""
    return {probe: found["title"] for model in summary["models"] for probe, found in model["probes"].items()}


def _figure(score: Mapping[str, Any]) -> str:
    unit = f" ({score['unit']})" if score["unit"] else ""
    return f"{score['name']}{unit} {'↓' if score['lower_is_better'] else '↑'}"


def _number(value: float | None, score: Mapping[str, Any]) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if score["unit"] == "%" else f"{value:#.3g}".removesuffix(".")


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(entry).replace('|', chr(92) + '|') for entry in line)} |" for line in lines)
