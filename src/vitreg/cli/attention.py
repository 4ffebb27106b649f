"""`vitreg attention`: the attention maps of a block."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vitreg.cli.options import Images, ModelOptions, Reading, writable_folder
from vitreg.cli.output import INTERRUPTED, print_json, print_skipped, progress, unused
from vitreg.common.json_types import to_json

if TYPE_CHECKING:
    from vitreg import VisionTransformer
    from vitreg.images import ImageBatch


Query = Literal["cls", "registers"] | tuple[int, int]


def attention(
    images: Images,
    *,
    model: ModelOptions,
    block: int = -1,
    queries: tuple[str, ...] = ("cls",),
    out: Path = Path("vitreg-out/attention"),
    crop: Literal["checkpoint", "none"] = "checkpoint",
    reading: Reading = Reading(),
    json: bool = False,
) -> int:
    """Write the attention maps of a block: every head and their mean, as images and as arrays.

    For each image and query: NAME.npy (float32, heads x rows x columns, the share of attention each patch gets; with
    the shares of class token and registers it adds up to one, or to 1 - lambda in differential attention), NAME.png
    (every head) and NAME_overlay.png (the mean).

    Example: vitreg attention dog.jpg --model dinov2_vits14_reg --queries cls registers 4,7 --out maps

    Args:
        images: files, folders or globs.
        model: the model and what it sees.
        block: counted from 0; -1 is the last.
        queries: who attends: cls, registers, or a patch as ROW,COLUMN of the grid, counted from 0.
        out: folder for the maps.
        crop: checkpoint crops as the model was trained; none keeps the whole image and its aspect.
        reading: which images.
        json: print what was written as JSON.
    """
    from vitreg.common.words import counted
    from vitreg.images import ImageStream, find_images, no_images, spaced

    out = writable_folder(out)
    # What follows --queries up to the next flag is taken for a query, images too.
    swallowed = [] if images else [word for word in queries if not _is_query(word)]
    wanted: list[Query] = [_query(query) for query in queries if query not in swallowed]
    paths = spaced(find_images(images or swallowed), reading.limit)
    vit = model.load()
    preprocess = vit.preprocess if crop == "checkpoint" else dataclasses.replace(vit.preprocess, crop="none")
    device = next(vit.parameters()).device
    stream = ImageStream(paths, preprocess, batch_size=1, device=device, strict=reading.strict)
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
    if not written and not interrupted:
        raise no_images(stream.skipped)
    skipped = to_json(stream.skipped)
    if json:
        print_json({"maps": written, "skipped": skipped, "interrupted": interrupted})
    else:
        print_skipped(stream.skipped)
        print(f"{counted(len(written), 'map')} in {out}")
    return INTERRUPTED if interrupted else 0


def _attention_maps(
    vit: VisionTransformer, batch: ImageBatch, name: str, out: Path, block: int, queries: Sequence[Query]
) -> list[dict[str, object]]:
    """Trace one image and write a set of files for each query."""
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


def _is_query(text: str) -> bool:
    return text in ("cls", "registers") or re.fullmatch(r"\d+,\d+", text) is not None


def _query(text: str) -> Query:
    if not _is_query(text):
        raise ValueError(f"--queries {text!r} is unknown; use cls, registers, or a patch as ROW,COLUMN")
    if text == "cls" or text == "registers":
        return text
    row, _, column = text.partition(",")
    return int(row), int(column)
