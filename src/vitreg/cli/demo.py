"""`vitreg demo`: models without registers and with, and what a fix does, on the photographs of the package."""

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

from vitreg.cli.options import ModelOptions, Runtime, Size, writable_folder
from vitreg.cli.output import command_line, print_json, progress, status
from vitreg.common.disk import write_json

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float
    from PIL.Image import Image
    from torch import Tensor

    from vitreg import AttentionRows, Comparison, Detection, Diagnosis, VisionTransformer
    from vitreg.report import Panels, Photograph


PAIR = ("vitreg_tiny", "vitreg_tiny_reg4")
"""The models of the package, without registers and with."""


def demo(
    *,
    model: str | None = None,
    architecture: str | None = None,
    runtime: Runtime = Runtime(),
    size: Size | None = None,
    out: Path = Path("vitreg-out/demo"),
    json: bool = False,
) -> int:
    """Show what registers change, on nine photographs: norms, attention, and the objects that are discovered.

    Without --model the two small models of the package are shown, one trained without registers and one with, and the
    first with a test-time register; nothing is downloaded. With --model it is that model as it is, and fixed.

    Example: vitreg demo --model clip_vit_b16 --out demo

    Args:
        model: the model to show, as --model of other commands takes it; by default the pair of the package.
        architecture: timm's name of the architecture, for a file that does not say it.
        runtime: where they run.
        size: side of what the models see in pixels, or height and width, in whole patches; by default the checkpoint's.
        out: folder for report.html, demo.json and demo.png.
        json: print demo.json.
    """
    from vitreg.common.words import counted
    from vitreg.report import side_by_side_figure, write_side_by_side

    start = time.perf_counter()
    out = writable_folder(out)
    options = {"architecture": architecture, "size": size, **dataclasses.asdict(runtime)}
    models = [ModelOptions(name, **options).load() for name in (PAIR if model is None else [model])]
    summary, photographs = _look(models)
    with status("writing the report"):
        side_by_side_figure(summary, photographs, out / "demo.png")
        summary["seconds"] = round(time.perf_counter() - start, 1)
        summary["command"] = command_line()
        report = write_side_by_side(summary, photographs, out / "report.html")
        write_json(out / "demo.json", summary)
    if json:
        print_json({**summary, "report": str(report)})
        return 0
    for sentence in summary["verdict"]:
        print(sentence)
    print(f"{counted(len(photographs), 'photograph')} in {summary['seconds']} s; the report is {report}")
    return 0


def _look(vits: Sequence[VisionTransformer]) -> tuple[dict[str, Any], list[Photograph]]:
    """Everything that the report tells, and what it shows of every photograph."""
    import vitreg
    from vitreg.discovery.protocol import DEFAULT
    from vitreg.images import bundled_photographs, read_image
    from vitreg.report import Photograph

    first = vits[0]
    paths = bundled_photographs()
    images = [read_image(path) for path in paths]
    with status("looking at photographs"):
        found = [vitreg.diagnose(vit, paths) for vit in vits]
    fixed, why_not = _fix(first, images) if found[0].has_artifacts else (None, None)
    with status("looking at photographs"):
        comparison = None if fixed is None else vitreg.compare(first, fixed, paths)
        block = found[0].block
        columns = [
            _Model(_what(vit, alone=len(vits) == 1), _judged(diagnosis), vit, diagnosis, images, block)
            for vit, diagnosis in zip(vits, found, strict=True)
        ]
        if fixed is not None and comparison is not None:
            columns.append(_Model("test-time register", comparison.outcome, fixed, comparison.after, images, block))
        summary = {
            "format": "vitreg-demo/2",
            "version": metadata.version("vitreg"),
            "title": _title(found, comparison),
            "verdict": _verdict(found, comparison, why_not),
            "image_size": list(found[0].image_size),
            "grid": list(found[0].position_frequency.shape),
            "num_images": len(paths),
            "block": block,
            "discovery_block": DEFAULT.block % first.config.depth,
            "attention_from": "the class token" if first.config.class_token else "all patches",
            "models": [column.entry() for column in columns],
            "photographs": [
                {
                    "image": path.name,
                    "width": image.width,
                    "height": image.height,
                    "boxes": [column.box_in_image(i) for column in columns],
                }
                for i, (path, image) in enumerate(zip(paths, images, strict=True))
            ],
        }
        photographs = [
            Photograph(path.name, found[0].examples[i].photo, tuple(column.panels(i) for column in columns))
            for i, path in enumerate(paths)
        ]
    return summary, photographs


def _fix(vit: VisionTransformer, images: Sequence[Image]) -> tuple[VisionTransformer | None, str | None]:
    """The model with a test-time register, or why there is none.

    Nine photographs are few to find register neurons in, so that their quarters are looked at too.
    """
    import vitreg

    views = _batch(vit, [view for image in images for view in _views(image)])
    with progress("looking for the units that write artifacts") as on_progress:
        try:
            fixed = vitreg.add_test_time_registers(vit, views, on_progress=on_progress)
        except ValueError as error:  # too few outliers in them to tell
            return None, f"No register was added: {error}."
    if fixed.num_registers == vit.num_registers:
        return None, fixed.config.changes[-1]
    return fixed, None


def _views(image: Image) -> list[Image]:
    """An image and its quarters."""
    width, height = image.width // 2, image.height // 2
    corners = [(x, y) for y in (0, height) for x in (0, width)]
    return [image, *(image.crop((x, y, x + width, y + height)) for x, y in corners)]


def _batch(vit: VisionTransformer, images: Sequence[Image]) -> Float[Tensor, "B 3 H W"]:
    import torch

    of = next(vit.parameters())
    return torch.stack([vit.preprocess(image) for image in images]).to(of.device)


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

        rows, columns = self.diagnosis.examples[0].norms.shape[1:]
        queries = "cls" if self.vit.config.class_token else range(rows * columns)
        with torch.inference_mode():
            rows = self.vit.trace(_batch(self.vit, self.images), blocks=[self.block], attention_from=queries).attention
        assert rows is not None
        return rows

    @cached_property
    def _received(self) -> Float[np.ndarray, "B h w"]:
        """What each patch receives: mean over heads and queries."""
        return self._attention.to_patches[0].float().mean((1, 2)).cpu().numpy()

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


def _what(vit: VisionTransformer, *, alone: bool) -> str:
    """How a model differs from the others."""
    from vitreg.common.words import counted

    if alone:
        return "as it is"
    return counted(vit.num_registers, "trained register") if vit.num_registers else "without registers"


def _judged(diagnosis: Diagnosis) -> str:
    if diagnosis.undecided is not None:
        return "too few patches to tell"
    return "artifacts" if diagnosis.has_artifacts else "no artifacts"


def _title(found: Sequence[Diagnosis], comparison: Comparison | None) -> str:
    has = [f"{diagnosis.model['name']} has {_judged(diagnosis)}" for diagnosis in found]
    if comparison is None:
        return " and ".join(has)
    verbs = {"removed": "removes", "partly removed": "removes some of"}
    them = "them" if len(found) == 1 else "those of the first"
    return ", ".join([*has, f"and a test-time register {verbs.get(comparison.outcome, 'does not remove')} {them}"])


def _verdict(found: Sequence[Diagnosis], comparison: Comparison | None, why_not: str | None) -> list[str]:
    """The findings as sentences; the table has the rest."""
    sentences = [diagnosis.verdict[0] for diagnosis in found]
    if comparison is not None:
        change = f"{comparison.after.model['changes'][-1]} These images are the photographs and their quarters."
        # To a comparison the fixed model is the second of two; here it may be the third.
        return [*sentences, change, *(told.replace("the second", "the fixed") for told in comparison.verdict)]
    if found[0].has_artifacts is False:
        why_not = "No register was added, because there are no artifacts to move."
    return sentences if why_not is None else [*sentences, why_not]
