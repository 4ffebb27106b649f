"""The command line: one short function per command."""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes

from vitreg.cli_demo import demo
from vitreg.cli_discovery import discover, evaluate_discovery
from vitreg.cli_probes import (
    evaluate_all,
    evaluate_depth,
    evaluate_knn,
    evaluate_linear,
    evaluate_position,
    evaluate_reconstruction,
    evaluate_segmentation,
    evaluate_tokens,
    evaluate_zero_shot,
)
from vitreg.cli_registers import compare, fix
from vitreg.cli_training import timeline, train
from vitreg.terminal import (
    INTERRUPTED,
    Images,
    ModelOptions,
    first_line,
    positive,
    print_json,
    print_skipped,
    progress,
    unused,
    writable_folder,
)

if TYPE_CHECKING:
    from vitreg import Diagnosis, VisionTransformer
    from vitreg.images import ImageBatch

Query = Literal["cls", "registers"] | tuple[int, int]


def diagnose(
    images: Images,
    *,
    model: ModelOptions,
    out: Path = Path("vitreg-out"),
    threshold: str = "auto",
    block: str = "auto",
    batch_size: int = 32,
    limit: int | None = None,
    strict: bool = False,
    json: bool = False,
) -> int:
    """Tell whether a model has artifacts: where, from which block on, and what they do to its attention.

    Writes report.html (open it in a browser, or send it) and diagnosis.json. Files that cannot be read are skipped
    and listed.

    Example: vitreg diagnose photos/ --model dinov2_vitb14 --out report

    Args:
        images: files, folders or globs.
        model: the model and what it sees.
        out: folder for the report.
        threshold: auto (two separated modes of the norms, or none), a norm such as 150, mean+3sd, or 5xmedian.
        block: the block to report, or auto.
        batch_size: pictures at a time.
        limit: look at this many pictures only.
        strict: a picture that cannot be read is an error.
        json: print the result as JSON.
    """
    import vitreg

    out = writable_folder(out)
    vit = model.load()
    with progress("looking at pictures") as on_progress:
        diagnosis = vitreg.diagnose(
            vit,
            images,
            threshold=threshold,
            block=block if block == "auto" else _integer("--block", block),
            batch_size=positive("--batch-size", batch_size),
            limit=limit,
            strict=strict,
            keep_partial=True,
            on_progress=on_progress,
        )
    report = diagnosis.save(out)
    _print_diagnosis(diagnosis, report, as_json=json)
    return INTERRUPTED if diagnosis.interrupted else 0


def attention(
    images: Images,
    *,
    model: ModelOptions,
    block: int = -1,
    queries: tuple[str, ...] = ("cls",),
    out: Path = Path("vitreg-out"),
    crop: Literal["checkpoint", "none"] = "checkpoint",
    strict: bool = False,
    json: bool = False,
) -> int:
    """Write the attention maps of a block: every head and their mean, as pictures and as arrays.

    For each picture and query: NAME.npy (float32, heads x rows x columns, the share of attention each patch gets; with
    the shares of class token and registers it adds up to one, or to 1 - lambda in differential attention), NAME.png
    (every head) and NAME_overlay.png (the mean).

    Example: vitreg attention dog.jpg --model dinov2_vits14_reg --queries cls registers 4,7 --out maps

    Args:
        images: files, folders or globs.
        model: the model and what it sees.
        block: counted from 0; -1 is the last.
        queries: who attends: cls, registers, or a patch as COLUMN,ROW of the grid, counted from 0.
        out: folder for the maps.
        crop: checkpoint crops as the model was trained; none keeps the whole picture and its aspect.
        strict: a picture that cannot be read is an error.
        json: print what was written as JSON.
    """
    from vitreg.images import ImageStream, find_images

    out = writable_folder(out)
    paths = find_images(images)
    vit = model.load()
    wanted: list[Query] = [_query(query) for query in queries]
    preprocess = vit.preprocess if crop == "checkpoint" else dataclasses.replace(vit.preprocess, crop="none")
    stream = ImageStream(paths, preprocess, batch_size=1, strict=strict, device=next(vit.parameters()).device)
    written: list[dict[str, object]] = []
    names: set[str] = set()
    interrupted = False
    with progress("drawing attention") as on_progress:
        try:
            for batch in stream:
                names.add(name := unused(batch.paths[0].stem, names))
                written += _attention_maps(vit, batch, name, out, block, wanted)
                on_progress(len(names), len(paths))
        except KeyboardInterrupt:
            interrupted = True
    skipped = [{"path": str(skip.path), "reason": skip.reason} for skip in stream.skipped]
    if not written and not interrupted:
        raise ValueError(f"there were no pictures to look at{': ' + skipped[0]['reason'] if skipped else ''}")
    if json:
        print_json({"maps": written, "skipped": skipped, "interrupted": interrupted})
    else:
        print_skipped([skip["reason"] for skip in skipped])
        print(f"{len(written)} maps in {out}")
    return INTERRUPTED if interrupted else 0


def _attention_maps(
    vit: VisionTransformer, batch: ImageBatch, name: str, out: Path, block: int, queries: Sequence[Query]
) -> list[dict[str, object]]:
    """Trace one picture and write a set of files for each query."""
    import torch

    from vitreg.report import write_attention

    with torch.inference_mode():
        trace = vit.trace(batch.images, blocks=[block], attention_from=queries)
    rows = trace.attention
    assert rows is not None
    photo = vit.preprocess.unnormalize(batch.images)[0].permute(1, 2, 0).cpu().numpy()
    written = []
    for q, query in enumerate(rows.queries):
        maps = rows.to_patches[0, 0, :, q].cpu().numpy()
        paths = write_attention(photo, maps, query=query, block=trace.blocks[0], name=name, folder=out)
        shares = {"to_patches": float(maps.sum((1, 2)).mean())}
        if rows.to_cls is not None:
            shares["to_class_token"] = float(rows.to_cls[0, 0, :, q].mean())
        if vit.num_registers:
            shares["to_registers"] = float(rows.to_registers[0, 0, :, q].sum(-1).mean())
        written.append({"image": str(batch.paths[0]), "query": query, "block": trace.blocks[0], **shares, **paths})
    return written


def models(filter: str = "", json: bool = False) -> int:
    """List checkpoints by name: parameters, patch size, registers, licence.

    Besides these, every name of timm's Vision Transformers can be given to --model.

    Example: vitreg models --filter dinov2

    Args:
        filter: part of a name, or a pattern with *.
        json: print the list as JSON.
    """
    from rich.table import Table

    from vitreg.checkpoints import list_models

    found = list_models(filter)
    if json:
        print_json([dataclasses.asdict(model) for model in found])
        return 0
    if not found:
        raise ValueError(f"no model's name contains {filter!r}; `vitreg models` lists all")
    table = Table("name", "parameters", "patch", "registers", "licence", "weights from timm", box=None, pad_edge=False)
    for row in found:
        size = f"{row.million_parameters:,.1f} M"
        table.add_row(
            row.name, size, str(row.patch_size), str(row.num_registers), row.licence, row.timm or "comes with vitreg"
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "diagnose": diagnose,
    "attention": attention,
    "discover": discover,
    "evaluate all": evaluate_all,
    "evaluate discovery": evaluate_discovery,
    "evaluate knn": evaluate_knn,
    "evaluate linear": evaluate_linear,
    "evaluate zero-shot": evaluate_zero_shot,
    "evaluate tokens": evaluate_tokens,
    "evaluate position": evaluate_position,
    "evaluate reconstruction": evaluate_reconstruction,
    "evaluate segmentation": evaluate_segmentation,
    "evaluate depth": evaluate_depth,
    "fix": fix,
    "compare": compare,
    "train": train,
    "timeline": timeline,
    "models": models,
    "demo": demo,
}


def main(argv: list[str] | None = None) -> None:
    """Run a command; errors are one line on stderr and exit status 2 (`--debug` shows where they arose)."""
    args = sys.argv[1:] if argv is None else argv
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if args == ["--version"]:
        from importlib import metadata

        print(metadata.version("vitreg"))
        sys.exit(0)
    # A command of two words is one name to the parser.
    if " ".join(args[:2]) in COMMANDS:
        args = [" ".join(args[:2]), *args[2:]]
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="vitreg",
            description="Find the artifacts of any Vision Transformer, and see what they do. --debug shows tracebacks.",
            args=args,
            config=(OmitArgPrefixes, FlagCreatePairsOff),
        )
    except KeyboardInterrupt:
        print("vitreg: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (ValueError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"vitreg: {first_line(error)}", file=sys.stderr)
        status = 2
    sys.exit(status)


def _query(text: str) -> Query:
    if text in ("cls", "registers"):
        return text
    column, _, row = text.partition(",")
    if not (column.strip().isdigit() and row.strip().isdigit()):
        raise ValueError(f"--queries {text!r} is unknown; use cls, registers, or a patch as COLUMN,ROW")
    return int(row), int(column)


def _integer(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{flag} {text!r} is not a block; give auto or a number") from None


def _print_diagnosis(diagnosis: Diagnosis, report: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({**diagnosis.to_dict(), "report": str(report)})
        return
    for sentence in diagnosis.verdict:
        print(sentence)
    print_skipped([skip.reason for skip in diagnosis.skipped])
    print(f"{diagnosis.num_images} images in {diagnosis.seconds:.1f} s; the report is {report}")


if __name__ == "__main__":
    main()
