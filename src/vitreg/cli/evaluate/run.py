"""Asks probes of models: what all `vitreg evaluate` commands but `discovery` end in."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vitreg.cli.evaluate.options import EvaluationOptions
from vitreg.cli.options import Checkpoint, writable_folder
from vitreg.cli.output import INTERRUPTED, print_json, progress
from vitreg.disk import replace_text
from vitreg.images import (
    DenseSet,
    SegmentationSet,
    open_box_set,
)
from vitreg.probes.catalogue import PROBES
from vitreg.probes.evaluation import Data, PassConfig, choose, evaluate, safe_name
from vitreg.probes.score import ProbeResult, Score
from vitreg.probes.summary import Evaluated, summarize
from vitreg.probes.tables import LEGEND, headline_table, markdown, tables, write_csv
from vitreg.probes.text_encoders import has_text_tower


def run_evaluation(
    options: EvaluationOptions, found: Sequence[Data], probes: Mapping[str, Any], discovery: str | None = None
) -> int:
    """Ask the probes of every model, and write and print what they say."""
    start = time.monotonic()
    out = writable_folder(options.out)
    config = PassConfig(options.patch_images, options.batch_size)
    train_images, val_images = options.train_images or options.limit, options.val_images or options.limit
    found = [
        dataclasses.replace(data, train=choose(data.train, train_images), val=choose(data.val, val_images))
        for data in found
    ]
    models: list[Evaluated] = []
    names = _short_names(options.models)
    try:
        for source in options.models:
            vit = Checkpoint(source, device=options.device, dtype=options.dtype).load()
            results: dict[str, ProbeResult] = {}
            for data in found:
                asked = {name: settings for name, settings in probes.items() if PROBES[name].task == data.task}
                if len(probes) > 1 and not has_text_tower(source):
                    asked.pop("zero-shot", None)
                results |= evaluate(vit, source, data, asked, out, config, stage=progress)
            if discovery is not None:
                results["discovery"] = _discover(vit, source, discovery, out, options.batch_size)
            models.append(Evaluated(names[source], vit.num_registers, results))
    except KeyboardInterrupt:
        print(f"vitreg: interrupted; the same command continues, {out} keeps what is done", file=sys.stderr)
        return INTERRUPTED
    summary = summarize(models, _described(found, discovery))
    summary |= {"seconds": time.monotonic() - start, "command": f"vitreg {shlex.join(sys.argv[1:])}"}
    _write(summary, models, found, out)
    if options.json:
        print_json(summary)
    else:
        _print_summary(summary, out)
    return 0


def _short_names(sources: Sequence[str]) -> dict[str, str]:
    """Files and runs without their folders, where they still differ."""
    short = {s: Path(s).name.removesuffix(".safetensors") if Path(s).exists() else s for s in sources}
    return short if len(set(short.values())) == len(short) else {source: source for source in sources}


def _discover(vit: Any, source: str, data: str, out: Path, batch_size: int) -> ProbeResult:
    """CorLoc by the documented protocol, from a file that an interrupted run continues."""
    from vitreg.discovery.protocol import DEFAULT
    from vitreg.discovery.summary import hits
    from vitreg.discovery.sweep import find_boxes

    labelled = [image for image in open_box_set(data).images if len(image.boxes)]
    if not labelled:
        raise ValueError(f"{data} has not one box; CorLoc needs boxes")
    record = out / f"boxes-{safe_name(source)}.jsonl"
    with progress(f"{source}: object discovery") as on_progress:
        boxes = find_boxes(vit, source, labelled, [DEFAULT], record, batch_size=batch_size, on_progress=on_progress)
    score = Score.mean("CorLoc", hits(boxes, labelled)[0], unit="%")
    return ProbeResult("discovery", (score,), {"protocol": dataclasses.asdict(DEFAULT), "pictures": len(labelled)})


def _described(found: Sequence[Data], discovery: str | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        data.task: {
            "source": data.train.source,
            "num_train": len(data.train),
            "num_val": len(data.val),
            "size": data.size,
        }
        for data in found
    }
    return described | ({"discovery": {"source": discovery}} if discovery else {})


def _write(summary: dict[str, Any], models: Sequence[Evaluated], found: Sequence[Data], out: Path) -> None:
    from vitreg.report import DensePicture, write_evaluation
    from vitreg.report import Table as Grid

    replace_text(out / "evaluation.json", jsonlib.dumps(summary, indent=1))
    replace_text(out / "evaluation.csv", write_csv(summary))
    replace_text(out / "evaluation.md", markdown(summary))
    pictures: dict[str, list[DensePicture]] = {"segmentation": [], "depth": []}
    class_names: Sequence[str] = ()
    for data in found:
        val = data.val
        if not isinstance(val, DenseSet):
            continue
        # Of several variants the first is shown.
        probe = next(name for name in models[0].results if PROBES[name].task == data.task)
        answers = [model.results[probe] for model in models]
        if isinstance(val, SegmentationSet):
            class_names = val.class_names
        for number in sorted(answers[0].predictions):
            pictures[data.task].append(
                DensePicture(
                    Path(val.name(number)).name,
                    np.asarray(val.picture(number)),
                    val.target(number),
                    tuple(answer.predictions[number] for answer in answers),
                )
            )
    header, rows = headline_table(summary)
    write_evaluation(
        summary,
        out / "report.html",
        tables=[Grid("All probes", header, rows), *(Grid(*table) for table in tables(summary))],
        legend=LEGEND,
        masks=pictures["segmentation"],
        depths=pictures["depth"],
        class_names=class_names,
    )


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    parts = [("", *headline_table(summary), []), *tables(summary)]
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
