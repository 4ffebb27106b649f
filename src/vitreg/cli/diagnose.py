"""`vitreg diagnose`: does a model have artifacts?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from vitreg.cli.options import Batching, ModelOptions, writable_folder
from vitreg.cli.output import INTERRUPTED, command_line, print_findings, progress

Images = Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES")]


@dataclass(frozen=True)
class _MaybeModel(ModelOptions):
    """The model, where it runs and what it sees; none is needed for a store."""

    model: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]


def diagnose(
    images: Images = (),
    *,
    model: _MaybeModel = _MaybeModel(),
    store: Path | None = None,
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
        store: instead of images and a model, what vitreg extract wrote: the norms that it added up.
        out: folder for the report.
        threshold: auto (two separated modes of the norms, or none), a norm such as 150, mean+3sd, or 5xmedian.
        block: the block to report, or auto.
        reading: which images, and how many at a time.
        json: print the result as JSON.
    """
    import vitreg

    if store is not None:
        if images or model.model:
            raise ValueError("--store says of which images and model it is; leave IMAGES and --model out")
        from vitreg.probes import diagnose_store

        out = writable_folder(out)
        diagnosis = diagnose_store(store, threshold=threshold, block=block)
        report = diagnosis.save(out, command=command_line())
        print_findings(diagnosis, diagnosis.skipped, report, as_json=json, besides={})
        return 0
    if not (images and model.model):
        missing = " and ".join(n for n, given in (("IMAGES", images), ("--model", model.model)) if not given)
        raise ValueError(f"diagnose needs {missing}; see vitreg diagnose --help")
    out = writable_folder(out)
    vit = model.load_or_observe()
    with progress("looking at images") as on_progress:
        diagnosis = vitreg.diagnose(
            vit,
            list(images),
            threshold=threshold,
            block=block,
            **dataclasses.asdict(reading),
            keep_partial=True,
            on_progress=on_progress,
        )
    report = diagnosis.save(out, command=command_line())
    print_findings(diagnosis, diagnosis.skipped, report, as_json=json, besides={})
    return INTERRUPTED if diagnosis.interrupted else 0
