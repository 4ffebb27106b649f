"""`vitreg fix`: artifacts into registers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from vitreg.cli.compare import compare_models
from vitreg.cli.options import Batching, Images, ModelOptions, positive, writable_folder
from vitreg.cli.output import print_json, print_skipped, progress
from vitreg.common.disk import writing
from vitreg.common.json_types import to_json


def fix(
    images: Images,
    *,
    model: ModelOptions,
    out: Path,
    method: Literal["test-time"] = "test-time",
    registers: int = 1,
    report: Path | None = None,
    reading: Batching = Batching(),
    json: bool = False,
) -> int:
    """Move a model's artifacts into registers, without training, and save the fixed model.

    The hidden units that write the artifacts are found in the images, 100 to 500 of the kind the model is for; the
    fewest that remove them from images held back are moved. The file is read by --model of every command and by
    vitreg.load. A model without artifacts is left alone.

    Example: vitreg fix photos/ --model dinov2_vitb14 --out fixed.safetensors --report before-after

    Args:
        images: files, folders or globs.
        model: the model and what it sees.
        out: the file to write, NAME.safetensors.
        method: test-time moves activations to untrained registers (Jiang et al. 2025).
        registers: so many are added.
        report: folder for a before/after report on the same images.
        reading: which images, and how many at a time.
        json: print the result as JSON.
    """
    import vitreg
    from vitreg.images import Batches

    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    report = None if report is None else writable_folder(report)
    count = positive("--registers", registers)
    vit = model.load()
    device = next(vit.parameters()).device
    batches = Batches(images, vit.preprocess, device=device, **dataclasses.asdict(reading))
    with progress("looking for the units that write them") as on_progress:
        fixed = vitreg.add_test_time_registers(vit, batches, count=count, on_progress=on_progress)
    skipped = to_json(batches.skipped)
    if fixed.num_registers == vit.num_registers:
        reason = fixed.config.changes[-1]
        if json:
            print_json({"fixed": False, "reason": reason, "skipped": skipped})
        else:
            print_skipped(batches.skipped)
            print(f"{reason}\nNothing was written.")
        return 0
    vitreg.save(fixed, out)
    result = {
        "fixed": True,
        "out": str(out),
        "register_neurons": [list(neuron) for neuron in fixed.config.register_neurons],
        "register_weight": fixed.config.register_weight,
        "change": fixed.config.changes[-1],
        "skipped": skipped,
    }
    if not json:
        print_skipped(batches.skipped if report is None else ())
        print(f"{fixed.config.changes[-1]}\nThe fixed model is {out}")
    if report is None:
        if json:
            print_json(result)
        return 0
    return compare_models(vit, fixed, images, report, reading, json=json, besides=result)
