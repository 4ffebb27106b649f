"""The commands of object discovery: `vitreg discover` and `vitreg evaluate discovery`."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from vitreg.discovery import Detection
from vitreg.discovery.discover import Method, detect, native_stream
from vitreg.discovery.features import Facet
from vitreg.discovery.protocol import DEFAULT, Protocol
from vitreg.discovery.summary import describe, hits, summarize
from vitreg.discovery.sweep import Axis, find_boxes, settings
from vitreg.images import find_images, open_box_set
from vitreg.terminal import (
    INTERRUPTED,
    Checkpoint,
    Images,
    positive,
    print_json,
    print_skipped,
    progress,
    unused,
    writable_folder,
)

_ROWS = 15


def discover(
    images: Images,
    *,
    model: Checkpoint,
    out: Path = Path("vitreg-out"),
    method: Method = "lost",
    facet: Facet = DEFAULT.facet,  # pyright: ignore[reportArgumentType]
    block: int = DEFAULT.block,
    normalize: bool = DEFAULT.normalize,
    center: bool = DEFAULT.center,
    bias: float = DEFAULT.bias,
    k_patches: int = DEFAULT.k_patches,
    max_objects: int = 1,
    batch_size: int = 8,
    overlays: bool = True,
    strict: bool = False,
    json: bool = False,
) -> int:
    """Find the main object of every picture, without labels or training.

    Writes detections.json, coco.json (COCO annotations, one category) and for each picture NAME.jpg: box, seed and mask
    on the photograph, beside the map of degrees. Pictures keep their own resolution. Without further options the
    documented protocol is used, the same for every model.

    Example: vitreg discover photos/ --model dinov2_vitb14_reg --out objects

    Args:
        images: files, folders or globs.
        model: the model.
        out: folder for what is written.
        method: LOST (Simeoni et al. 2021) or TokenCut (Wang et al. 2022).
        facet: the features that are compared.
        block: counted from 0; -1 is the last.
        normalize: divide features by their norm.
        center: subtract the picture's mean feature first.
        bias: added to every similarity.
        k_patches: patches of lowest degree that the seed may be expanded with.
        max_objects: objects a picture, by repeating LOST on what is left.
        batch_size: pictures at a time, of equal size.
        overlays: draw pictures.
        strict: a picture that cannot be read or is too small is an error.
        json: print detections.json.
    """
    out = writable_folder(out)
    paths = find_images(images)
    protocol = Protocol(facet, block, normalize, center, bias, k_patches)
    vit = model.load()
    stream = native_stream(vit, paths, batch_size=positive("--batch-size", batch_size), strict=strict)
    pictures: dict[Path, dict[str, Any]] = {}
    names: set[str] = set()
    interrupted = False
    with progress("discovering objects") as on_progress:
        try:
            for batch, detections in detect(vit, stream, protocol, method=method, max_objects=max_objects):
                photos = vit.preprocess.unnormalize(batch.images).permute(0, 2, 3, 1).cpu().numpy()
                for photo, (height, width), path, detection in zip(
                    photos, batch.sizes, batch.paths, detections, strict=True
                ):
                    entry = _picture(path, height, width, detection)
                    if overlays:
                        names.add(name := unused(path.stem, names))
                        entry["overlay"] = str(out / f"{name}.jpg")
                        _draw(photo[:height, :width], path.name, detection, vit.config.patch_size, out / f"{name}.jpg")
                    pictures[path] = entry
                on_progress(len(pictures), len(paths))
        except KeyboardInterrupt:
            interrupted = True
    skipped = [{"path": str(skip.path), "reason": skip.reason} for skip in stream.skipped]
    if not pictures and not interrupted:
        raise ValueError(f"there were no pictures to look at{': ' + skipped[0]['reason'] if skipped else ''}")
    found = {
        "format": "vitreg-detections/1",
        "version": metadata.version("vitreg"),
        "model": vit.config.name or model.model,
        "patch_size": vit.config.patch_size,
        "method": method,
        "protocol": dataclasses.asdict(protocol),
        "pictures": [pictures[path] for path in paths if path in pictures],
        "skipped": skipped,
        "interrupted": interrupted,
    }
    (out / "detections.json").write_text(jsonlib.dumps(found, indent=1))
    (out / "coco.json").write_text(jsonlib.dumps(_coco(found["pictures"]), indent=1))
    if json:
        print_json(found)
    else:
        print_skipped([skip["reason"] for skip in skipped])
        num = sum(len(picture["objects"]) for picture in found["pictures"])
        print(f"{num} objects in {len(pictures)} pictures; see {out}")
    return INTERRUPTED if interrupted else 0


def _picture(path: Path, height: int, width: int, detection: Detection) -> dict[str, Any]:
    return {
        "image": str(path),
        "width": width,
        "height": height,
        "grid": list(detection.mask.shape),
        "objects": [
            {
                "box": list(found.box),
                "seed": list(found.seed),
                "mask": ["".join("01"[inside] for inside in row) for row in found.mask.astype(int)],
            }
            for found in (detection, *detection.others)
        ],
    }


def _draw(photo: Any, name: str, detection: Detection, patch_size: int, path: Path) -> None:
    from vitreg.report import discovery_overlay

    x0, y0, x1, y1 = detection.box
    sheet = discovery_overlay(
        photo,
        boxes=[detection.box, *(other.box for other in detection.others)],
        seed=detection.seed,
        mask=detection.mask,
        degree=detection.degree,
        patch_size=patch_size,
        title=f"{name}: x {x0} to {x1}, y {y0} to {y1}",
    )
    sheet.save(path, quality=90)


def _coco(pictures: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's detection format; ids count from 1."""
    boxes = [(i, found["box"]) for i, picture in enumerate(pictures, start=1) for found in picture["objects"]]
    return {
        "images": [
            {"id": i, "file_name": picture["image"], "width": picture["width"], "height": picture["height"]}
            for i, picture in enumerate(pictures, start=1)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
            for number, (image, (x0, y0, x1, y1)) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "object"}],
    }


def evaluate_discovery(
    *,
    data: str,
    models: tuple[str, ...],
    sweep: tuple[Axis, ...] = (),
    out: Path = Path("vitreg-out/discovery"),
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    batch_size: int = 8,
    json: bool = False,
) -> int:
    """Measure CorLoc: in how many pictures the box that LOST finds is an object's, for every model and setting.

    Always measured is the documented protocol; --sweep adds every combination of the axes it names: the last four
    blocks, queries, keys and values, raw and normalised, centred or not, biases from -0.4 to 0.1. Writes
    discovery.json, discovery.png, and boxes-MODEL.jsonl, which holds what is done: the same command continues an
    interrupted run.

    Example: vitreg evaluate discovery --data voc2007:VOC --models dinov2_vitl14 dinov2_vitl14_reg --sweep blocks facets

    Args:
        data: voc2007:FOLDER, voc2012:FOLDER, coco20k:FOLDER, yolo:FOLDER or json:FILE.
        models: names or files, as for --model; the others are compared with the first.
        sweep: any of blocks, facets, normalize, center, bias.
        out: folder for results, and of an earlier run to continue.
        device: cpu, cuda, mps; auto takes a GPU where there is one.
        dtype: precision of weights and activations.
        batch_size: pictures at a time, of equal size.
        json: print discovery.json.
    """
    from vitreg.report import sweep_figure

    if not models or len(set(models)) < len(models):
        raise ValueError(f"--models {' '.join(models) or 'is empty'}: name at least one model, and each once")
    swept = settings(sweep)
    protocols = swept if DEFAULT in swept else [DEFAULT, *swept]
    out = writable_folder(out)
    boxed = open_box_set(data)
    labelled = [image for image in boxed.images if len(image.boxes)]
    if not labelled:
        raise ValueError(f"{data} has {len(boxed.images)} pictures and not one box; CorLoc needs boxes")
    positive("--batch-size", batch_size)
    found = {}
    try:
        for name in models:
            vit = Checkpoint(name, device=device, dtype=dtype).load()
            record = out / f"boxes-{''.join(c if c.isalnum() or c in '-_.' else '-' for c in name)}.jsonl"
            with progress(f"looking at pictures with {name}") as on_progress:
                boxes = find_boxes(
                    vit, name, labelled, protocols, record, batch_size=batch_size, on_progress=on_progress
                )
            found[name] = hits(boxes, labelled)
    except KeyboardInterrupt:
        print(f"vitreg: interrupted; the same command continues, {out} keeps what is done", file=sys.stderr)
        return INTERRUPTED
    summary = summarize(found, protocols, labelled, data=data, boxed=boxed, swept=swept)
    (out / "discovery.json").write_text(jsonlib.dumps(summary, indent=1))
    sweep_figure(summary, out / "discovery.png")
    if json:
        print_json(summary)
    else:
        _print_summary(summary, out)
    return 0


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    table = Table("setting", *(model["model"] for model in summary["models"]), box=None, pad_edge=False)
    table.add_row("protocol: " + describe(DEFAULT), *(_percent(model["protocol"]) for model in summary["models"]))
    columns = [model.get("settings", []) for model in summary["models"]]
    rows = sorted(zip(*columns, strict=True), key=lambda row: -sum(entry["corloc"] for entry in row))
    for row in rows[:_ROWS]:
        table.add_row(row[0]["name"], *(_percent(entry) for entry in row))
    if rows:
        label = f"mean of {len(rows)} settings"
        table.add_row(label, *(_percent(model["mean"]) for model in summary["models"]))
    table.add_row("the whole picture", *[_percent(summary["whole_picture"])] * len(summary["models"]))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if len(rows) > _ROWS:
        print(f"the {_ROWS} best of {len(rows)} settings; the others are in {out / 'discovery.json'}")
    for model in summary["models"]:
        if halves := model.get("halves"):
            chosen, judged = halves["on_the_half_that_chose_it"], halves["on_the_other_half"]
            print(f"{model['model']}: best is {model['best']['name']}, {_percent(model['best'])}")
            print(
                f"{model['model']}: best on one half of the pictures is {halves['name']}, "
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
    print(f"CorLoc in percent [95 % interval] on {summary['num_images']} pictures; left out: {without} without boxes")
    if missing:
        print(f"and {len(missing)} that the annotations name and that do not exist, the first {missing[0]}")
    print(f"see {out}")


def _percent(share: dict[str, Any], form: str = ".1f") -> str:
    low, high = share["interval"]
    return f"{share['corloc']:{form}} [{low:{form}}, {high:{form}}]"
