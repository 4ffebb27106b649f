"""`vitreg demo`: two small models, without registers and with, and what a fix does to the first."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitreg.cli.options import Checkpoint, writable_folder
from vitreg.cli.output import command_line, print_json, status
from vitreg.common.disk import write_json

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float
    from PIL.Image import Image
    from torch import Tensor

    from vitreg import AttentionRows, Comparison, Detection, Diagnosis, VisionTransformer
    from vitreg.report import Panels, Photograph


GRID = 20
"""Patches along each side of a photograph: in the 8 of a training image there would be little to see."""


PHOTO_SIZE = 320
"""Pixels along each side of a photograph in the report."""


def demo(out: Path = Path("vitreg-out/demo"), json: bool = False) -> int:
    """Diagnose two small models, without and with registers, fix the first, and discover objects with each.

    Nothing is downloaded: models and photographs come with the package. Where the model without registers has no
    artifacts, a copy of it is given some, and the report says so.

    Example: vitreg demo --out demo

    Args:
        out: folder for report.html, demo.json and demo.png.
        json: print demo.json.
    """
    from vitreg.common.words import counted
    from vitreg.report import side_by_side_figure, write_side_by_side

    start = time.perf_counter()
    out = writable_folder(out)
    plain, trained = _load("vitreg_tiny"), _load("vitreg_tiny_reg4")
    with status("looking at photographs"):
        summary, photographs = _look(plain, trained)
    summary["seconds"] = round(time.perf_counter() - start, 1)
    summary["command"] = command_line()
    report = write_side_by_side(summary, photographs, out / "report.html")
    side_by_side_figure(summary, photographs, out / "demo.png")
    write_json(out / "demo.json", summary)
    if json:
        print_json({**summary, "report": str(report)})
        return 0
    for sentence in summary["verdict"]:
        print(sentence)
    print(f"{counted(len(photographs), 'photograph')} in {summary['seconds']} s; the report is {report}")
    return 0


def _load(name: str) -> VisionTransformer:
    """A bundled model, for photographs of `GRID` x `GRID` patches."""
    vit = Checkpoint(name).load()
    side = GRID * vit.config.patch_size
    vit.config = dataclasses.replace(vit.config, name=name, preprocess=vit.preprocess.with_size(side, side))
    return vit


def _look(plain: VisionTransformer, trained: VisionTransformer) -> tuple[dict[str, Any], list[Photograph]]:
    """Everything that the report tells, and what it shows of every photograph."""
    import vitreg
    from vitreg.artifacts import plant_artifacts
    from vitreg.discovery.protocol import DEFAULT
    from vitreg.images import bundled_photographs, read_image
    from vitreg.report import Photograph

    paths = bundled_photographs()
    images = [read_image(path) for path in paths]
    views = _batch(plain, [view for image in images for view in _views(image)])
    without, with_registers = vitreg.diagnose(plain, paths), vitreg.diagnose(trained, paths)
    ill = plain if without.has_artifacts else plant_artifacts(plain, views)
    fixed = vitreg.add_test_time_registers(ill, views)
    comparison = vitreg.compare(ill, fixed, paths)
    block, planted = comparison.before.block, ill is not plain

    columns = [
        ("without registers", _judged(without), plain, without),
        (f"{trained.num_registers} trained registers", _judged(with_registers), trained, with_registers),
    ]
    if planted:
        columns.append(("planted outliers", "artifacts, planted", ill, comparison.before))
    what = f"{'planted outliers, ' if planted else ''}test-time register"
    columns.append((what, comparison.outcome, fixed, comparison.after))
    models = [_Model(*column, images, block) for column in columns]
    summary = {
        "format": "vitreg-demo/1",
        "version": metadata.version("vitreg"),
        "title": _title(without, with_registers, comparison, planted=planted),
        "verdict": _verdict(without, with_registers, comparison, planted=planted),
        "planted": ill.config.changes[-1] if planted else None,
        "image_size": list(without.image_size),
        "grid": [GRID, GRID],
        "num_images": len(paths),
        "block": block,
        "discovery_block": DEFAULT.block % plain.config.depth,
        "attention_from": "the class token" if plain.config.class_token else "all patches",
        "models": [model.entry() for model in models],
        "photographs": [
            {
                "image": path.name,
                "width": image.width,
                "height": image.height,
                "boxes": [model.box_in_image(i) for model in models],
            }
            for i, (path, image) in enumerate(zip(paths, images, strict=True))
        ],
    }
    larger = plain.preprocess.with_size(PHOTO_SIZE, PHOTO_SIZE)
    photographs = [
        Photograph(
            path.name,
            larger.pixels(image).permute(1, 2, 0).numpy(),
            tuple(model.panels(i) for model in models),
        )
        for i, (path, image) in enumerate(zip(paths, images, strict=True))
    ]
    return summary, photographs


def _views(image: Image) -> list[Image]:
    """An image and its quarters, for more images to find register neurons in."""
    width, height = image.width // 2, image.height // 2
    corners = [(x, y) for y in (0, height) for x in (0, width)]
    return [image, *(image.crop((x, y, x + width, y + height)) for x, y in corners)]


def _batch(vit: VisionTransformer, images: Sequence[Image]) -> Float[Tensor, "B 3 H W"]:
    import torch

    return torch.stack([vit.preprocess(image) for image in images]).to(next(vit.parameters()).device)


@dataclass(frozen=True)
class _Model:
    """A column of the report.

    Attributes:
        what: how the model differs from the others.
        verdict: in a word or two.
        vit, diagnosis, images: the model, and what was found in which images.
        block: the one whose norms and attention are shown.
    """

    what: str
    verdict: str
    vit: VisionTransformer
    diagnosis: Diagnosis
    images: list[Image]
    block: int

    @cached_property
    def _detections(self) -> list[Detection]:
        import vitreg

        return vitreg.discover_objects(self.vit, _batch(self.vit, self.images))

    @cached_property
    def _attention(self) -> AttentionRows:
        """From the class token, or from every patch where there is none."""
        import torch

        queries = "cls" if self.vit.config.class_token else range(GRID * GRID)
        with torch.inference_mode():
            rows = self.vit.trace(_batch(self.vit, self.images), blocks=[self.block], attention_from=queries).attention
        assert rows is not None
        return rows

    @cached_property
    def _received(self) -> Float[np.ndarray, "B h w"]:
        """What each patch receives: mean over heads and queries."""
        return self._attention.to_patches[0].mean((1, 2)).cpu().numpy()

    def _outliers(self, i: int, block: int) -> np.ndarray:
        threshold = self.diagnosis.blocks[block].threshold
        return self.diagnosis.examples[i].norms[block] >= (math.inf if threshold is None else threshold)

    def panels(self, i: int) -> Panels:
        """What the report shows of image `i`."""
        from vitreg.report import Panels

        x0, y0, x1, y1 = (side // self.vit.config.patch_size for side in self._detections[i].box)
        norms = self.diagnosis.examples[i].norms[self.block]
        return Panels((x0, y0, x1, y1), norms, self._outliers(i, self.block), self._received[i])

    def box_in_image(self, i: int) -> list[int]:
        """The box in pixels of the image itself, of which the model saw a part."""
        image, preprocess = self.images[i], self.vit.preprocess
        left, top, right, bottom = preprocess.region(image.height, image.width)
        height, width = preprocess.size
        across, down = (right - left) / width, (bottom - top) / height
        x0, y0, x1, y1 = self._detections[i].box
        places = (left + x0 * across, top + y0 * down, left + x1 * across, top + y1 * down)
        return [round(min(max(at, 0), side)) for at, side in zip(places, image.size * 2, strict=True)]

    def entry(self) -> dict[str, Any]:
        """The model in the summary."""
        at, norms = self.diagnosis.blocks[self.block], self.diagnosis.register_norms
        # A query of this block sees the outliers of the one before.
        pairs = enumerate(self._received) if self.block else ()
        shares = [float(received[self._outliers(i, self.block - 1)].sum()) for i, received in pairs]
        registers = self._attention.to_registers[0].sum(-1).mean()
        return {
            "name": self.diagnosis.model["name"],
            "what": self.what,
            "verdict": self.verdict,
            "outlier_fraction": at.outlier_fraction,
            "largest_over_median": at.max / at.median,
            "onset_block": self.diagnosis.onset_block,
            "register_norms": [] if norms is None else norms[self.block].tolist(),
            "attention_on_outliers": sum(shares) / len(self.images),
            "attention_on_registers": float(registers) if self.vit.num_registers else None,
            "diagnosis": self.diagnosis.to_dict(),
        }


def _judged(diagnosis: Diagnosis) -> str:
    if diagnosis.undecided is not None:
        return "too few patches to tell"
    return "artifacts" if diagnosis.has_artifacts else "no artifacts"


def _title(without: Diagnosis, with_registers: Diagnosis, comparison: Comparison, *, planted: bool) -> str:
    one, two = (f"{found.model['name']} has {_judged(found)}" for found in (without, with_registers))
    verbs = {"removed": "removes", "partly removed": "removes some of"}
    fix = f"a test-time register {verbs.get(comparison.outcome, 'does not remove')}"
    if planted:
        return f"Planted outliers: {one} of its own, a copy has planted ones, and {fix} them"
    return f"{one}, {two}, and {fix} those of the first"


def _verdict(without: Diagnosis, with_registers: Diagnosis, comparison: Comparison, *, planted: bool) -> list[str]:
    """The findings as sentences; the table has the rest."""
    sentences = [without.verdict[0], with_registers.verdict[0]]
    if planted:
        change = comparison.before.model["changes"][-1]
        sentences.append(f"To show what artifacts do, a copy of the first model is given some. {change}")
    # The second sentence on a fix is of the class token's attention, where there is one.
    found = comparison.verdict[: 1 + without.model["has_class_token"]]
    return [*sentences, *comparison.after.model["changes"][-1:], *found]
