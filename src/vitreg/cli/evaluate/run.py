"""Asks probes of models: what all `vitreg evaluate` commands but `discovery` end in."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json as jsonlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vitreg import VisionTransformer
from vitreg.cli.evaluate.options import EvaluationOptions
from vitreg.cli.options import Checkpoint, sides, writable_folder
from vitreg.cli.output import INTERRUPTED, command_line, print_json, progress
from vitreg.common.disk import replace_text
from vitreg.common.words import safe_name
from vitreg.images import BoxedImage, open_box_set
from vitreg.images.files import ImageFiles
from vitreg.probes.catalogue import PROBES
from vitreg.probes.choosing import choose
from vitreg.probes.evaluation import EvalData, PassConfig, evaluate
from vitreg.probes.results.earlier import with_earlier
from vitreg.probes.results.result_cache import Answer, Asked, architecture, save_answer
from vitreg.probes.results.score import ProbeResult, Score
from vitreg.probes.results.summary import Evaluated, summarize
from vitreg.probes.results.tables import LEGEND, headline_table, markdown, tables, write_csv
from vitreg.probes.store.origin import FeaturesConfig, StoredModel
from vitreg.probes.tasks.text_encoders import has_text_tower


def run_evaluation(
    options: EvaluationOptions, found: Sequence[EvalData], probes: Mapping[str, Any], discovery: str | None = None
) -> int:
    """Ask the probes of every model, and write and print what they say, with what earlier commands found."""
    start = time.monotonic()
    found = [_chosen(data, options, probes) for data in found]
    boxes = None if discovery is None else _boxes(discovery)
    out = writable_folder(options.out)
    answers: list[Answer] = []
    interrupted = False
    try:
        for answer in _answers(options, found, probes, discovery, boxes, out):
            answers.append(answer)
    except KeyboardInterrupt:
        interrupted = True
    together, left_out = with_earlier(out / "answers", answers)
    if not together:
        print("vitreg: interrupted before the first answer; the same command continues", file=sys.stderr)
        return INTERRUPTED
    notes = [f"{sentence}." for sentence in left_out]
    if interrupted:
        notes.append("The last command was interrupted: what is missing was not asked.")
    summary = summarize(_by_model(together, options.models, out), notes)
    summary |= {"seconds": time.monotonic() - start, "command": command_line()}
    _write(summary, together, out)
    if options.json:
        print_json(summary)
    else:
        _print_summary(summary, out)
    if interrupted:
        print(f"vitreg: interrupted; the same command continues, {out} keeps what is done", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _chosen(data: EvalData, options: EvaluationOptions, probes: Mapping[str, Any]) -> EvalData:
    """The images that flags ask for."""
    count, classes = options.train_images or options.limit, len(set(data.train.labels or ()))
    if count is not None and count < classes and any(PROBES[probe].labels for probe in probes):
        flag = "--train-images" if options.train_images else "--limit"
        raise ValueError(f"{flag} {count} is fewer than the classes of {data.train.source}; give at least {classes}")
    return dataclasses.replace(
        data,
        train=choose(data.train, count),
        val=choose(data.val, options.val_images or options.limit),
        size=data.size or (None if options.size is None else sides(options.size)),
    )


def _answers(
    options: EvaluationOptions,
    found: Sequence[EvalData],
    probes: Mapping[str, Any],
    discovery: str | None,
    boxes: Sequence[BoxedImage] | None,
    out: Path,
) -> Iterator[Answer]:
    """Of every model, as they come."""
    config = PassConfig(options.patch_images, options.batch_size, options.strict)
    for source, vit in _models(options, probes):
        asked = dict(probes)
        if len(probes) > 1 and not has_text_tower(source):
            asked.pop("zero-shot", None)
        yield from evaluate(
            vit, source, found, asked, out, config, quick=options.quick, stage=progress, say=_say_on_stderr
        )
        if discovery is not None:
            assert boxes is not None
            yield _discover(vit, source, discovery, boxes, out, options.batch_size)


def _models(options: EvaluationOptions, probes: Mapping[str, Any]) -> Iterator[tuple[str, VisionTransformer]]:
    """Every model. All are loaded before the first is used, so that a wrong name ends the command now, not at night."""

    def load(source: str) -> VisionTransformer:
        vit = Checkpoint(source, device=options.device, dtype=options.dtype).load()
        for probe, settings in probes.items():
            FeaturesConfig(PROBES[probe].blocks(settings, vit.config.depth)).for_depth(vit.config.depth)
        return vit

    first, *others = options.models
    vit = load(first)
    for source in others:
        load(source)
    yield first, vit
    del vit
    yield from ((source, load(source)) for source in others)


def _say_on_stderr(sentence: str) -> None:
    print(f"vitreg: {sentence}", file=sys.stderr)


def _boxes(source: str) -> list[BoxedImage]:
    labeled = [image for image in open_box_set(source).images if len(image.boxes)]
    if not labeled:
        raise ValueError(f"{source} has not one box; CorLoc needs boxes")
    return labeled


def _discover(
    vit: VisionTransformer, source: str, data: str, labeled: Sequence[BoxedImage], out: Path, batch_size: int
) -> Answer:
    """CorLoc by the documented protocol, from a file that an interrupted run continues."""
    from vitreg.discovery.protocol import DEFAULT
    from vitreg.discovery.summary import hits
    from vitreg.discovery.sweep import find_boxes

    record = out / f"boxes-{safe_name(source)}.jsonl"
    with progress(f"{source}: object discovery") as on_progress:
        boxes = find_boxes(vit, source, labeled, [DEFAULT], record, batch_size=batch_size, on_progress=on_progress)
    score = Score.mean("CorLoc", hits(boxes, labeled)[0], unit="%")
    files = ImageFiles(data, [str(image.path) for image in labeled]).digest()
    truth = repr((files, [image.boxes.tolist() for image in labeled])).encode()
    asked = Asked(
        probe="discovery",
        settings=str(DEFAULT),
        model=source,
        weights=StoredModel.of(vit).digest,
        architecture=architecture(vit),
        num_registers=vit.num_registers,
        task="discovery",
        images=data,
        num_train=0,
        num_val=len(labeled),
        data=hashlib.blake2b(truth, digest_size=16).hexdigest(),
        preprocess="padded to whole patches",
        size=None,
    )
    details = {"protocol": dataclasses.asdict(DEFAULT), "images": len(labeled)}
    answer = Answer(asked, ProbeResult("discovery", (score,), details))
    save_answer(out / "answers" / f"{safe_name(source)}-discovery.safetensors", answer)
    return answer


def _by_model(answers: Sequence[Answer], models: Sequence[str], out: Path) -> list[Evaluated]:
    """Rows in the order of the last command, if it asked all of these models; else new ones follow those of before."""
    found = {answer.asked.model for answer in answers}
    order = dict.fromkeys(models)
    if not found <= order.keys():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = jsonlib.loads((out / "evaluation.json").read_text(encoding="utf-8"))
            order = dict.fromkeys([*(model["source"] for model in before["models"]), *models])
        order |= dict.fromkeys(sorted(found))
    names = short_names([model for model in order if model in found])
    return [
        Evaluated(name, {one.asked.probe: one for one in answers if one.asked.model == source})
        for source, name in names.items()
    ]


def short_names(sources: Sequence[str]) -> dict[str, str]:
    """Files and runs without their folders, where they still differ."""
    short = {s: Path(s).name.removesuffix(".safetensors") if Path(s).exists() else s for s in sources}
    return short if len(set(short.values())) == len(short) else {source: source for source in sources}


def _write(summary: dict[str, Any], answers: Sequence[Answer], out: Path) -> None:
    from vitreg.report import DenseImage, write_evaluation
    from vitreg.report import Table as Grid

    replace_text(out / "evaluation.json", jsonlib.dumps(summary, indent=1))
    replace_text(out / "evaluation.csv", write_csv(summary))
    replace_text(out / "evaluation.md", markdown(summary))
    names = {model["source"]: model["name"] for model in summary["models"]}
    images: dict[str, list[DenseImage]] = {"segmentation": [], "depth": []}
    class_names: list[str] = []
    for task, cards in images.items():
        dense = [answer for answer in answers if answer.asked.task == task]
        # Of several variants one is shown.
        same = [answer for answer in dense if answer.asked.probe == dense[0].asked.probe]
        for number, first in sorted(same[0].shown.items()) if same else ():
            predictions = {names[one.asked.model]: one.shown[number].prediction for one in same if number in one.shown}
            cards.append(DenseImage(first.name, first.photo, first.truth, predictions))
        if same and task == "segmentation":
            class_names = [row["class"] for row in same[0].result.details["IoU"]]
    header, rows = headline_table(summary)
    write_evaluation(
        summary,
        out / "report.html",
        tables=[Grid("All probes", header, rows, summary["notes"]), *(Grid(*table) for table in tables(summary))],
        legend=LEGEND,
        masks=images["segmentation"],
        depths=images["depth"],
        class_names=class_names,
    )


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    parts = [("", *headline_table(summary), summary["notes"]), *tables(summary)]
    for title, header, rows, notes in parts:
        table = Table(*header, title=title or None, title_justify="left", box=None, pad_edge=False)
        table.columns[0].overflow = "fold"
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for note in notes:
            print(f"– {note}")
        print()
    for sentence in summary["verdict"]:
        print(sentence)
    print(LEGEND)
    print(f"{summary['seconds']:.0f} s; see {out / 'report.html'}")
