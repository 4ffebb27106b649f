"""`vitreg export`: a model as ONNX or as an exported program."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from vitreg.cli.options import Checkpoint, Size, sides
from vitreg.cli.output import print_json, status

Model = Annotated[Positional[str], arg(metavar="MODEL")]


def export(
    model: Model,
    *,
    out: Path,
    architecture: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    size: Size | None = None,
    dynamic_batch: bool = True,
    check: bool = True,
    json: bool = False,
) -> int:
    """Write a model, fixed or not, as ONNX or as a program of torch.export.

    What is written runs without vitreg: its input is images, its outputs are cls, registers, patches and logits, where
    the model has them, and its metadata says how images are prepared. It is compared with PyTorch on photographs before
    it is kept. The batch is free; for another size of image, write another file.

    Example: vitreg export fixed.safetensors --out fixed.onnx

    Args:
        model: the model, as --model of other commands takes it.
        out: the file to write, NAME.onnx or NAME.pt2.
        architecture: timm's name of the architecture, for a file that does not say it.
        dtype: of weights and activations.
        size: side of the images in pixels, or height and width; by default the checkpoint's.
        dynamic_batch: leave the number of images at a time open.
        check: compare what was written with PyTorch.
        json: print the result as JSON.
    """
    import vitreg

    vit = Checkpoint(model=model, architecture=architecture, device="cpu", dtype=dtype).load()
    with status(f"writing {out}"):
        written = vitreg.export(
            vit, out, image_size=None if size is None else sides(size), dynamic_batch=dynamic_batch, check=check
        )
    height, width = vit.config.image_size if size is None else sides(size)
    if json:
        found = {"out": str(written.path), "outputs": written.outputs, "size": [height, width]}
        print_json(found | {"preprocess": asdict(written.preprocess), "errors": written.errors})
        return 0
    print(f"{written.path}: {', '.join(written.outputs)} of images of {height} x {width} pixels")
    if written.errors is not None:
        print(f"checked on photographs: differs from PyTorch by at most {max(written.errors.values()):.1e} (relative)")
    return 0
