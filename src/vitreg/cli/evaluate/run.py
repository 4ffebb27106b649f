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
from vitreg.cli.evaluate.options import VARIANTS, EvaluationData, EvaluationOptions, both_sides
from vitreg.cli.options import Checkpoint, writable_folder
from vitreg.cli.output import INTERRUPTED, command_line, print_json, progress
from vitreg.common.devices import resolve_device
from vitreg.common.disk import replace_text, write_json
from vitreg.common.words import safe_name
from vitreg.images import BoxedImage, BoxSet, open_box_set
from vitreg.images.files import ImageFiles
from vitreg.probes.catalogue import PROBES, EvalData
from vitreg.probes.choosing import choose
from vitreg.probes.evaluation import evaluate
from vitreg.probes.passes import PassConfig
from vitreg.probes.results.result_cache import Answer, Asked, save_answer, with_earlier
from vitreg.probes.results.score import ProbeResult, Score
from vitreg.probes.results.summary import Evaluated, summarize
from vitreg.probes.results.tables import LEGEND, headline_table, markdown, tables, write_csv
from vitreg.probes.store.origin import FeaturesConfig, StoredModel
from vitreg.probes.tasks.text_encoders import has_text_tower


def run_evaluation(options: EvaluationOptions, probes: Mapping[str, Any], data: EvaluationData) -> int:
    """Ask the probes of every model, and write and print what they say, with what earlier commands found."""
    start = time.monotonic()
    found = data.opened()
    probes = _askable(probes, data, found)
    found = [_chosen(one, options, probes) for one in found]
    boxes = None if data.discovery is None else boxed_images(data.discovery)[0]
    out = writable_folder(options.out)
    config = PassConfig(options.patch_images, options.batch_size, options.strict)
    answers: list[Answer] = []
    interrupted = False
    try:
        for source, vit in _models(options, probes):
            asked = {name: of for name, of in probes.items() if name != "zero-shot" or has_text_tower(source)} or probes
            for answer in evaluate(
                vit, source, found, asked, out, config, quick=options.quick, stage=progress, say=_say_on_stderr
            ):
                answers.append(answer)
            if boxes is not None:
                answers.append(_discover(vit, source, data.discovery or "", boxes, out, options.batch_size))
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


def _askable(probes: Mapping[str, Any], data: EvaluationData, found: Sequence[EvalData]) -> dict[str, Any]:
    """Those that are asked for or, where none is, all that can be; what a patch holds needs no labels."""
    labeled = {one.task: one.train.labels is not None for one in found}
    variants = {VARIANTS[variant] for variant in (*data.segmentation_variants, *data.depth_variants)}
    return dict(probes) or {
        name: probe.config
        for name, probe in PROBES.items()
        if probe.task in labeled
        and (labeled[probe.task] or not probe.labels)
        and (name in variants or name not in VARIANTS.values())
    }


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
        size=data.size or both_sides(options.size),
    )


def _models(options: EvaluationOptions, probes: Mapping[str, Any]) -> Iterator[tuple[str, VisionTransformer]]:
    """Every model on its device, and no longer than it is used.

    All are loaded before the first is used, so that a wrong name ends the command now, not at night.
    """
    resolve_device(options.device)
    loaded: dict[str, VisionTransformer] = {}
    for source in options.models:
        loaded[source] = vit = Checkpoint(source, device="cpu", dtype=options.dtype).load()
        for probe, settings in probes.items():
            FeaturesConfig(PROBES[probe].blocks(settings, vit.config.depth)).for_depth(vit.config.depth)
    for source in options.models:
        with options.using() as device:
            vit = loaded.pop(source).to(device)
        yield source, vit


def _say_on_stderr(sentence: str) -> None:
    print(f"vitreg: {sentence}", file=sys.stderr)


def boxed_images(source: str) -> tuple[list[BoxedImage], BoxSet]:
    """The images that have boxes, and the set."""
    boxed = open_box_set(source)
    labeled = [image for image in boxed.images if len(image.boxes)]
    if not labeled:
        raise ValueError(f"{source} has {len(boxed.images)} images and not one box; CorLoc needs boxes")
    return labeled, boxed


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
    asked = Asked.of(
        vit,
        source,
        StoredModel.of(vit).digest,
        probe="discovery",
        settings=str(DEFAULT),
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
    save_answer(asked.file(out), answer)
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

    write_json(out / "evaluation.json", summary)
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
