"""The commands of the fix: `vitreg fix` and `vitreg compare`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from vitreg.terminal import (
    INTERRUPTED,
    Images,
    ModelOptions,
    positive,
    print_json,
    print_skipped,
    progress,
    writable_folder,
)

if TYPE_CHECKING:
    from vitreg import Comparison, VisionTransformer

Before = Annotated[Positional[str], arg(metavar="A", help="the first model, as --model of other commands takes it")]
After = Annotated[
    Positional[str], arg(metavar="B", help="the second model: a fix of it, or one trained with registers")
]


def fix(
    images: Images,
    *,
    model: ModelOptions,
    out: Path,
    method: Literal["test-time"] = "test-time",
    registers: int = 1,
    report: Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    json: bool = False,
) -> int:
    """Move a model's artifacts into registers, without training, and save the fixed model.

    The hidden units that write the artifacts are found in the pictures, 100 to 500 of the kind the model is for; the
    fewest that remove them from pictures held back are moved. The file is read by --model of every command and by
    vitreg.load. A model without artifacts is left alone.

    Example: vitreg fix photos/ --model dinov2_vitb14 --out fixed.safetensors --report before-after

    Args:
        images: files, folders or globs.
        model: the model and what it sees.
        out: the file to write, NAME.safetensors.
        method: test-time moves activations to untrained registers (Jiang et al. 2025).
        registers: how many to add.
        report: folder for a before/after report on the same pictures.
        batch_size: pictures at a time.
        limit: use this many pictures only.
        json: print the result as JSON.
    """
    import vitreg
    from vitreg.images import find_images

    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    writable_folder(out.parent)
    report = None if report is None else writable_folder(report)
    paths = find_images(images)[: None if limit is None else positive("--limit", limit)]
    vit = model.load()
    with warnings.catch_warnings(record=True) as said, progress("looking for the units that write them") as on_progress:
        warnings.simplefilter("always")
        fixed = vitreg.add_test_time_registers(
            vit,
            paths,
            count=positive("--registers", registers),
            batch_size=positive("--batch-size", batch_size),
            on_progress=on_progress,
        )
    if fixed is vit:
        reason = str(said[-1].message)
        if json:
            print_json({"fixed": False, "reason": reason})
        else:
            print(f"{reason}\nNothing was written.")
        return 0
    vitreg.save(fixed, out)
    result = {
        "fixed": True,
        "out": str(out),
        "register_neurons": [list(neuron) for neuron in fixed.config.register_neurons],
        "register_weight": fixed.config.register_weight,
        "change": fixed.config.changes[-1],
    }
    if not json:
        print(f"{fixed.config.changes[-1]}\nThe fixed model is {out}")
    if report is None:
        if json:
            print_json(result)
        return 0
    return _compare(vit, fixed, paths, report, batch_size, None, strict=False, json=json, result=result)


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
    return _compare(one, two, images, out, batch_size, limit, strict=strict, json=json)


def _compare(
    before: VisionTransformer,
    after: VisionTransformer,
    images: list[str] | list[Path],
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
