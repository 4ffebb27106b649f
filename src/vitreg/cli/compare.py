"""`vitreg compare`: a model before and after, or several against the first."""

from __future__ import annotations

import dataclasses
import mimetypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from vitreg.cli.options import Batching, Images, ModelOptions, Runtime, Size, writable_folder
from vitreg.cli.output import INTERRUPTED, command_line, print_findings, print_json, print_skipped, progress, unused
from vitreg.common.words import counted, safe_name

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
    same number of blocks and cut images into the same patches. More models may follow the second: each is compared with
    the first on the same images, in a table (comparisons.json) and a folder with the report of its own.

    Example: vitreg compare dinov2_vitb14 fixed.safetensors photos/ --out before-after

    Example: vitreg compare dinov2_vitb14 moved.safetensors baked.safetensors photos/ --out methods

    Args:
        before: the first model, as --model of other commands takes it.
        after: the second model: a fix of it, or one trained with registers.
        images: files, folders or globs; before them further models, as files or names of weights.
        architecture: timm's name of the architecture, for files that do not say it.
        runtime: where they run.
        size: side of what the models see in pixels, or height and width; by default the first model's.
        out: folder for the report.
        reading: which images, and how many at a time.
        json: print the result as JSON.
    """
    out = writable_folder(out)
    options = {"architecture": architecture, "size": size, **dataclasses.asdict(runtime)}
    further, images = models_among(images)
    one, two, *rest = (ModelOptions(name, **options).load_or_observe() for name in (before, after, *further))
    if rest:
        return _compare_all([before, after, *further], [one, two, *rest], images, out, reading, json=json)
    return compare_models(one, two, images, out, reading, json=json)


def models_among(words: list[str]) -> tuple[list[str], list[str]]:
    """Further models at the start of the words, and the images, which the last word is in any case.

    A model is a file of weights, a folder that has some, or a word that is no file, folder, pattern or image's name.
    """
    from vitreg.checkpoints.files import WEIGHT_FILES

    def is_model(word: str) -> bool:
        path = Path(word)
        if path.is_dir():
            return any((path / name).is_file() for name in ("model.safetensors", "config.json"))
        no_image = not (path.exists() or set(word) & set("*?[") or word.endswith("/"))
        return path.suffix in WEIGHT_FILES or (no_image and mimetypes.guess_type(word)[0] is None)

    count = next((i for i, word in enumerate(words[:-1]) if not is_model(word)), len(words) - 1)
    return words[:count], words[count:]


def _compare_all(
    sources: list[str],
    models: list[VisionTransformer | ObservedViT],
    images: list[str],
    out: Path,
    reading: Batching,
    *,
    json: bool,
) -> int:
    """All against the first: a report of each, a page with all, and a table."""
    from rich.console import Console
    from rich.table import Table

    from vitreg.artifacts import compare_each
    from vitreg.artifacts.comparisons import save_comparisons
    from vitreg.report import comparison_figure

    with progress("comparing") as on_progress:
        options = {**dataclasses.asdict(reading), "keep_partial": True, "on_progress": on_progress}
        found = compare_each(models[0], models[1:], images, **options)
    names: list[str] = []
    for source, comparison in zip(sources[1:], found, strict=True):
        names.append(unused(safe_name(Path(source).stem if Path(source).is_file() else source), set(names)))
        folder = out / names[-1]
        comparison.save(folder, command=command_line())
        pictures = (comparison.before.examples, comparison.after.examples)
        comparison_figure(comparison.to_dict(), *pictures, folder / "comparison.png")
    summary = save_comparisons(dict(zip(names, found, strict=True)), sources[0], out, command=command_line())
    if json:
        print_json(summary)
    else:
        table = Table(*summary["header"], box=None, pad_edge=False)
        for row in summary["rows"]:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
        print_skipped(found[0].before.skipped)
        print(f"{counted(found[0].num_images, 'image')} in {found[0].seconds:.1f} s; see {out / 'report.html'}")
    return INTERRUPTED if found[0].before.interrupted else 0


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
