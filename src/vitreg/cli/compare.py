"""`vitreg compare`: a model before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from vitreg.cli.options import Images, ModelOptions, positive, writable_folder
from vitreg.cli.output import INTERRUPTED, print_json, print_skipped, progress

if TYPE_CHECKING:
    from vitreg import Comparison, VisionTransformer


Before = Annotated[Positional[str], arg(metavar="A", help="the first model, as --model of other commands takes it")]


After = Annotated[
    Positional[str], arg(metavar="B", help="the second model: a fix of it, or one trained with registers")
]


def compare(
    before: Before,
    after: After,
    images: Images,
    *,
    architecture: str | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    size: int | None = None,
    out: Path = Path("vitreg-out"),
    batch_size: int = 32,
    limit: int | None = None,
    strict: bool = False,
    json: bool = False,
) -> int:
    """Show a model before and after: norms, attention, features, and whether the artifacts are gone.

    Writes report.html (open it in a browser, or send it), comparison.json and comparison.png. The models must have the
    same number of blocks and cut pictures into the same patches.

    Example: vitreg compare dinov2_vitb14 fixed.safetensors photos/ --out before-after

    Args:
        before: the first model.
        after: the second model.
        images: files, folders or globs.
        architecture: timm's name of the architecture, for files that do not say it.
        device: cpu, cuda, mps; auto takes a GPU where there is one.
        dtype: precision of weights and activations.
        size: side of the pictures in pixels; the first model's own by default.
        out: folder for the report.
        batch_size: pictures at a time.
        limit: look at this many pictures only.
        strict: a picture that cannot be read is an error.
        json: print the result as JSON.
    """
    out = writable_folder(out)
    one, two = (ModelOptions(name, architecture, device, dtype, size).load() for name in (before, after))
    return compare_models(one, two, images, out, batch_size, limit, strict=strict, json=json)


def compare_models(
    before: VisionTransformer,
    after: VisionTransformer,
    images: list[str],
    out: Path,
    batch_size: int,
    limit: int | None,
    *,
    strict: bool,
    json: bool,
    result: dict[str, object] | None = None,
) -> int:
    """Compare, write and print; `result` is what a command that did more has to say in its JSON."""
    import vitreg
    from vitreg.report import comparison_figure

    with progress("comparing") as on_progress:
        comparison = vitreg.compare(
            before,
            after,
            images,
            batch_size=positive("--batch-size", batch_size),
            limit=limit,
            strict=strict,
            keep_partial=True,
            on_progress=on_progress,
        )
    path = comparison.save(out)
    summary = comparison.to_dict()
    comparison_figure(summary, comparison.before.examples, comparison.after.examples, out / "comparison.png")
    if json:
        print_json({**(result or {}), **summary, "report": str(path)})
    else:
        _print_comparison(comparison, path)
    return INTERRUPTED if comparison.before.interrupted else 0


def _print_comparison(comparison: Comparison, report: Path) -> None:
    for sentence in comparison.verdict:
        print(sentence)
    print_skipped([skip.reason for skip in comparison.before.skipped])
    print(f"{comparison.before.num_images} images in {comparison.seconds:.1f} s; the report is {report}")
