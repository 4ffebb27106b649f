"""`vitreg compare`: a model before and after."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from vitreg.cli.options import Batching, Images, ModelOptions, Runtime, Size, writable_folder
from vitreg.cli.output import INTERRUPTED, command_line, print_findings, progress

if TYPE_CHECKING:
    from vitreg import VisionTransformer
    from vitreg.checkpoints import ObservedViT

Before = Annotated[Positional[str], arg(metavar="A")]
After = Annotated[Positional[str], arg(metavar="B")]


def compare(
    before: Before,
    after: After,
    images: Images,
    *,
    architecture: str | None = None,
    runtime: Runtime = Runtime(),
    size: Size | None = None,
    out: Path = Path("vitreg-out/compare"),
    reading: Batching = Batching(),
    json: bool = False,
) -> int:
    """Show a model before and after: norms, attention, features, and whether the artifacts are gone.

    Writes report.html (open it in a browser, or send it), comparison.json and comparison.png. The models must have the
    same number of blocks and cut images into the same patches.

    Example: vitreg compare dinov2_vitb14 fixed.safetensors photos/ --out before-after

    Args:
        before: the first model, as --model of other commands takes it.
        after: the second model: a fix of it, or one trained with registers.
        images: files, folders or globs.
        architecture: timm's name of the architecture, for files that do not say it.
        runtime: where they run.
        size: side of what the models see in pixels, or height and width; by default the first model's.
        out: folder for the report.
        reading: which images, and how many at a time.
        json: print the result as JSON.
    """
    out = writable_folder(out)
    options = {"architecture": architecture, "size": size, **dataclasses.asdict(runtime)}
    one, two = (ModelOptions(name, **options).load_or_observe() for name in (before, after))
    return compare_models(one, two, images, out, reading, json=json)


def compare_models(
    before: VisionTransformer | ObservedViT,
    after: VisionTransformer | ObservedViT,
    images: list[str],
    out: Path,
    reading: Batching,
    *,
    json: bool,
    besides: dict[str, object] | None = None,
) -> int:
    """Compare, write and print; `besides` is what a command that did more has to say in its JSON."""
    import vitreg
    from vitreg.report import comparison_figure

    with progress("comparing") as on_progress:
        options = {**dataclasses.asdict(reading), "keep_partial": True, "on_progress": on_progress}
        comparison = vitreg.compare(before, after, images, **options)
    path = comparison.save(out, command=command_line())
    summary = comparison.to_dict()
    comparison_figure(summary, comparison.before.examples, comparison.after.examples, out / "comparison.png")
    print_findings(comparison, comparison.before.skipped, path, as_json=json, besides=besides or {})
    return INTERRUPTED if comparison.before.interrupted else 0
