"""`vitreg fix`: a model without its artifacts, by any of the methods."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitreg.cli.compare import compare_models
from vitreg.cli.options import Batching, Images, ModelOptions, positive, writable_folder
from vitreg.cli.output import print_json, print_skipped, progress
from vitreg.common.disk import writing
from vitreg.common.json_types import to_json
from vitreg.common.words import duration

if TYPE_CHECKING:
    from vitreg import VisionTransformer
    from vitreg.images import Batches

Method = Literal["test-time", "baked", "distilled", "prefix", "repaired"]

METHODS: dict[Method, tuple[str, str]] = {
    "test-time": ("add_test_time_registers", "looking for the units that write them"),
    "baked": ("bake_registers", "teaching the units to fire on registers"),
    "distilled": ("distill_registers", "distilling"),
    "prefix": ("add_prefix", "looking for the units to silence"),
    "repaired": ("repair_singular_defects", "repairing"),
}
"""The function of each, and what it does while it runs."""

ADDS_REGISTERS = ("test-time", "baked", "distilled")
"""Methods that take a number of registers."""


def fix(
    images: Images,
    *,
    model: ModelOptions,
    out: Path,
    method: Method = "test-time",
    registers: int | None = None,
    report: Path | None = None,
    reading: Batching = Batching(),
    json: bool = False,
) -> int:
    """Remove a model's artifacts, and save the fixed model.

    What writes the artifacts is found in the images, 100 to 500 of the kind the model is for; some are held back to
    choose by. The file is read by --model of every command and by vitreg.load. A model without artifacts, or that the
    method cannot fix, is left alone.

    Example: vitreg fix photos/ --model dinov2_vitb14 --out fixed.safetensors --report before-after

    Args:
        images: files, folders or globs.
        model: the model and what it sees.
        out: the file to write, NAME.safetensors.
        method: test-time moves activations to untrained registers (Jiang et al. 2025); baked makes of these ordinary
            ones, which timm and transformers run; distilled trains registers on the model's own features, means over
            shifted views (PH-Reg 2025), and takes longest; prefix silences the units and
            gives attention fixed keys and values instead (RegCache 2025); repaired changes the weights that write
            artifacts (SINDER 2024).
        registers: so many are added; by default 1, of baked as many as attention counts, of distilled 4.
        report: folder for a before/after report on the same images.
        reading: which images, and how many at a time.
        json: print the result as JSON.
    """
    import vitreg
    from vitreg.images import Batches
    from vitreg.registers import is_changed

    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    if registers is not None and method not in ADDS_REGISTERS:
        raise ValueError(f"--method {method} adds no registers; leave out --registers")
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    report = None if report is None else writable_folder(report)
    count = {} if registers is None else {"count": positive("--registers", registers)}
    vit = model.load()
    device = next(vit.parameters()).device
    batches = Batches(images, vit.preprocess, device=device, **dataclasses.asdict(reading))
    begun = time.perf_counter()
    fixed = _fixed(method, vit, batches, count)
    seconds = time.perf_counter() - begun
    skipped, change = to_json(batches.skipped), fixed.config.changes[-1]
    if not is_changed(vit, fixed):
        if json:
            print_json({"fixed": False, "method": method, "reason": change, "skipped": skipped})
        else:
            print_skipped(batches.skipped)
            print(f"{change}\nNothing was written.")
        return 0
    vitreg.save(fixed, out)
    result = {
        "fixed": True,
        "method": method,
        "out": str(out),
        "register_neurons": [list(neuron) for neuron in fixed.config.register_neurons],
        "register_weight": fixed.config.register_weight,
        "change": change,
        "seconds": seconds,
        "skipped": skipped,
    }
    if not json:
        print_skipped(batches.skipped if report is None else ())
        print(f"{change}\nThe fixed model is {out}; it took {duration(seconds)}")
    if report is None:
        if json:
            print_json(result)
        return 0
    return compare_models(vit, fixed, images, report, reading, json=json, besides=result)


def _fixed(method: Method, vit: VisionTransformer, batches: Batches, count: dict[str, Any]) -> VisionTransformer:
    """What the method makes of the model."""
    import vitreg
    from vitreg.registers import is_changed

    if method == "baked":
        unfixed, vit = vit, _fixed("test-time", vit, batches, {})
        if not is_changed(unfixed, vit):
            return vit
    function, doing = METHODS[method]
    with progress(doing) as on_progress:
        return getattr(vitreg, function)(vit, batches, **count, on_progress=on_progress)
