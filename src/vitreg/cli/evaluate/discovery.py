"""`vitreg evaluate discovery`: CorLoc, over sweeps of settings."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from vitreg.cli.evaluate.options import check_models
from vitreg.cli.options import Checkpoint, Runtime, positive, writable_folder
from vitreg.cli.output import INTERRUPTED, print_json, progress
from vitreg.common.disk import write_json
from vitreg.common.words import safe_name
from vitreg.discovery.protocol import DEFAULT, Axis

_ROWS = 15


def discovery(
    *,
    data: str,
    models: tuple[str, ...],
    sweep: tuple[Axis, ...] = (),
    out: Path = Path("vitreg-out/evaluate-discovery"),
    runtime: Runtime = Runtime(),
    batch_size: int = 8,
    limit: int | None = None,
    json: bool = False,
) -> int:
    """Measure CorLoc: in how many images the box that LOST finds is an object's.

    Always measured is the documented protocol; --sweep adds every combination of the axes it names: the last four
    blocks, queries, keys and values, raw and normalized, centered or not, biases from -0.4 to 0.1. Writes
    discovery.json, discovery.png, and boxes-MODEL.jsonl, which holds what is done: the same command continues an
    interrupted run.

    Example: vitreg evaluate discovery --data voc2007:VOC --models dinov2_vitl14 dinov2_vitl14_reg --sweep blocks facets

    Args:
        data: voc2007:FOLDER, voc2012:FOLDER, coco20k:FOLDER, yolo:FOLDER or json:FILE.
        models: names or files, as for --model; the others are compared with the first.
        sweep: any of blocks, facets, normalize, center, bias.
        out: folder for results, and of an earlier run to continue.
        runtime: where the models run.
        batch_size: images of equal size at a time.
        limit: so many images only, from all over the set.
        json: print discovery.json.
    """
    from vitreg.cli.evaluate.run import boxed_images, short_names
    from vitreg.discovery.summary import hits, summarize
    from vitreg.discovery.sweep import find_boxes, settings
    from vitreg.images import spaced
    from vitreg.report import sweep_figure

    check_models(models)
    swept = settings(sweep)
    protocols = swept if DEFAULT in swept else [DEFAULT, *swept]
    out = writable_folder(out)
    with_boxes, boxed = boxed_images(data)
    labeled = spaced(with_boxes, limit)
    positive("--batch-size", batch_size)
    found, names = {}, short_names(models)
    try:
        for name in models:
            vit = Checkpoint(name, **dataclasses.asdict(runtime)).load()
            record = out / f"boxes-{safe_name(name)}.jsonl"
            with progress(f"looking at images with {name}") as on_progress:
                boxes = find_boxes(
                    vit, name, labeled, protocols, record, batch_size=batch_size, on_progress=on_progress
                )
            found[names[name]] = hits(boxes, labeled)
    except KeyboardInterrupt:
        print(f"vitreg: interrupted; the same command continues, {out} keeps what is done", file=sys.stderr)
        return INTERRUPTED
    summary = summarize(found, protocols, labeled, data=data, boxed=boxed, swept=swept)
    write_json(out / "discovery.json", summary)
    sweep_figure(summary, out / "discovery.png")
    if json:
        print_json(summary)
    else:
        _print_summary(summary, out)
    return 0


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from vitreg.discovery.summary import describe

    table = Table("setting", *(model["model"] for model in summary["models"]), box=None, pad_edge=False)
    table.add_row("protocol: " + describe(DEFAULT), *(_percent(model["protocol"]) for model in summary["models"]))
    columns = [model.get("settings", []) for model in summary["models"]]
    rows = sorted(zip(*columns, strict=True), key=lambda row: -sum(entry["corloc"] for entry in row))
    for row in rows[:_ROWS]:
        table.add_row(row[0]["name"], *(_percent(entry) for entry in row))
    if rows:
        label = f"mean of {len(rows)} settings"
        table.add_row(label, *(_percent(model["mean"]) for model in summary["models"]))
    table.add_row("the whole image", *[_percent(summary["whole_image"])] * len(summary["models"]))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if len(rows) > _ROWS:
        print(f"the {_ROWS} best of {len(rows)} settings; the others are in {out / 'discovery.json'}")
    for model in summary["models"]:
        if halves := model.get("halves"):
            chosen, judged = halves["on_the_half_that_chose_it"], halves["on_the_other_half"]
            print(f"{model['model']}: best is {model['best']['name']}, {_percent(model['best'])}")
            print(
                f"{model['model']}: best on one half of the images is {halves['name']}, "
                f"{chosen['corloc']:.1f} there and {_percent(judged)} on the other half"
            )
    for difference in summary["differences"]:
        for what in ("protocol", "mean"):
            if what in difference:
                print(
                    f"{difference['model']} minus {difference['minus']}, {what}: {_percent(difference[what], '+.1f')}, "
                    "paired"
                )
    without, missing = summary["num_images_without_boxes"], summary["missing_images"]
    print(f"CorLoc in percent [95 % interval] on {summary['num_images']} images; left out: {without} without boxes")
    if missing:
        print(f"and {len(missing)} that the annotations name and that do not exist, the first {missing[0]}")
    print(f"see {out}")


def _percent(share: dict[str, Any], form: str = ".1f") -> str:
    low, high = share["interval"]
    return f"{share['corloc']:{form}} [{low:{form}}, {high:{form}}]"
