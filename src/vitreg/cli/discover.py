"""`vitreg discover`: the main object of every image."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitreg.cli.options import Batching, Checkpoint, Images, writable_folder
from vitreg.cli.output import INTERRUPTED, print_json, print_skipped, progress, unused
from vitreg.common.disk import replacing, write_json
from vitreg.common.json_types import to_json
from vitreg.discovery.protocol import DEFAULT, Method, Protocol

if TYPE_CHECKING:
    from vitreg import Detection


def discover(
    images: Images,
    *,
    model: Checkpoint,
    out: Path = Path("vitreg-out/discover"),
    method: Method = "lost",
    protocol: Protocol = DEFAULT,
    max_objects: int = 1,
    reading: Batching = Batching(batch_size=8),
    overlays: bool = True,
    json: bool = False,
) -> int:
    """Find the main object of every image, without labels or training.

    Writes detections.json, coco.json (COCO annotations, one category) and for each image NAME.jpg: box, seed and mask
    on the photograph, beside the map of degrees. Images keep their own resolution. Without further options the
    documented protocol is used, the same for every model.

    Example: vitreg discover photos/ --model dinov2_vitb14_reg --out objects

    Args:
        images: files, folders or globs.
        model: the model.
        out: folder for what is written.
        method: LOST (Simeoni et al. 2021) or TokenCut (Wang et al. 2022).
        protocol: what is compared; without these flags the documented protocol.
        max_objects: objects an image, by repeating LOST on what is left.
        reading: which images, and how many of equal size at a time.
        overlays: draw what was found on each photograph.
        json: print detections.json.
    """
    from vitreg.common.words import counted
    from vitreg.discovery.discover import detect, native_stream
    from vitreg.images import find_images, no_images, spaced

    out = writable_folder(out)
    paths = spaced(find_images(images), reading.limit)
    vit = model.load()
    stream = native_stream(vit, paths, batch_size=reading.batch_size, strict=reading.strict)
    entries: dict[Path, dict[str, Any]] = {}
    names: set[str] = set()
    interrupted = False
    with progress("discovering objects") as on_progress:
        try:
            for batch, detections in detect(vit, stream, protocol, method=method, max_objects=max_objects):
                photos = vit.preprocess.unnormalize(batch.images).permute(0, 2, 3, 1).cpu().numpy()
                for photo, (height, width), path, detection in zip(
                    photos, batch.sizes, batch.paths, detections, strict=True
                ):
                    entry = _entry(path, height, width, detection)
                    if overlays:
                        names.add(name := unused(path.stem, names))
                        entry["overlay"] = str(out / f"{name}.jpg")
                        _draw(photo[:height, :width], path.name, detection, vit.config.patch_size, out / f"{name}.jpg")
                    entries[path] = entry
                on_progress(len(entries), len(paths))
        except KeyboardInterrupt:
            interrupted = True
    if not entries and not interrupted:
        raise no_images(stream.skipped)
    skipped = to_json(stream.skipped)
    found = {
        "format": "vitreg-detections/1",
        "version": metadata.version("vitreg"),
        "model": vit.config.name or model.model,
        "patch_size": vit.config.patch_size,
        "method": method,
        "protocol": dataclasses.asdict(protocol),
        "images": [entries[path] for path in paths if path in entries],
        "skipped": skipped,
        "interrupted": interrupted,
    }
    write_json(out / "detections.json", found)
    write_json(out / "coco.json", _coco(found["images"]))
    if json:
        print_json(found)
    else:
        print_skipped(stream.skipped)
        num = sum(len(entry["objects"]) for entry in found["images"])
        print(f"{counted(num, 'object')} in {counted(len(entries), 'image')}; see {out}")
    return INTERRUPTED if interrupted else 0


def _entry(path: Path, height: int, width: int, detection: Detection) -> dict[str, Any]:
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
    with replacing(path) as temporary:
        sheet.save(temporary, quality=90)


def _coco(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's detection format; ids count from 1."""
    boxes = [(i, found["box"]) for i, entry in enumerate(entries, start=1) for found in entry["objects"]]
    return {
        "images": [
            {"id": i, "file_name": entry["image"], "width": entry["width"], "height": entry["height"]}
            for i, entry in enumerate(entries, start=1)
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
