"""`vitreg diagnose`: does a model have artifacts?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from vitreg.cli.options import Batching, Images, ModelOptions, writable_folder
from vitreg.cli.output import INTERRUPTED, command_line, print_findings, progress


def diagnose(
    images: Images,
    *,
    model: ModelOptions,
    out: Path = Path("vitreg-out/diagnose"),
    threshold: str = "auto",
    block: int | Literal["auto"] = "auto",
    reading: Batching = Batching(),
    json: bool = False,
) -> int:
    """Tell whether a model has artifacts: where, from which block on, and what they do to its attention.

    Writes report.html (open it in a browser, or send it) and diagnosis.json. Files that cannot be read are skipped
    and listed. A model of timm or transformers that cannot be converted is observed as it is (docs/diagnosis.md).

    Example: vitreg diagnose photos/ --model dinov2_vitb14 --out report

    Args:
        images: files, folders or globs.
        model: the model and what it sees.
        out: folder for the report.
        threshold: auto (two separated modes of the norms, or none), a norm such as 150, mean+3sd, or 5xmedian.
        block: the block to report, or auto.
        reading: which images, and how many at a time.
        json: print the result as JSON.
    """
    import vitreg

    out = writable_folder(out)
    vit = model.load_or_observe()
    with progress("looking at images") as on_progress:
        diagnosis = vitreg.diagnose(
            vit,
            images,
            threshold=threshold,
            block=block,
            **dataclasses.asdict(reading),
            keep_partial=True,
            on_progress=on_progress,
        )
    report = diagnosis.save(out, command=command_line())
    print_findings(diagnosis, diagnosis.skipped, report, as_json=json, besides={})
    return INTERRUPTED if diagnosis.interrupted else 0
