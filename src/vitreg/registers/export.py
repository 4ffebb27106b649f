"""A model, fixed or not, as a file that runs without vitreg: ONNX, or PyTorch's exported program."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.checkpoints import from_module
from vitreg.checkpoints.hub import import_optional
from vitreg.checkpoints.state import one_line
from vitreg.common.disk import replacing_files
from vitreg.images import bundled_photographs, read_image
from vitreg.model import Preprocess, VisionTransformer
from vitreg.model.pos_embed import resize_positions
from vitreg.model.rel_pos import RelPosBias

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}
"""Relative error of an output up to which a written file counts as the model, by the precision of the weights. Rounding
alone gives about 1e-6 in float32, a wrong operator more than 1e-2."""

METADATA = "vitreg.json"
"""Name of the file in a `.pt2` that holds what ONNX has in its metadata."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: where it is; weights of more than 2 GB are in `NAME.onnx.data` beside it.
        outputs: names of what it returns, in order.
        preprocess: what turns an image into its input; its size is that of the file.
        errors: largest relative error of each output on photographs, against PyTorch; None where it was not checked.
    """

    path: Path
    outputs: tuple[str, ...]
    preprocess: Preprocess
    errors: dict[str, float] | None


def export(
    vit: VisionTransformer | nn.Module,
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    dynamic_batch: bool = True,
    check: bool = True,
) -> Exported:
    """Write a model as ONNX or as a program of `torch.export`, and compare what was written with it on photographs.

    The input is `images`, `[batch, 3, height, width]` float32, normalized. The outputs are `cls` and `registers` where
    the model has them, `patches`, and `logits` where it has a head (CLIP: the projected embedding). The metadata has
    the preprocessing, the grid and the whole `ViTConfig` in JSON: as ONNX's metadata, as the file `vitreg.json` in a
    program. A fix is part of what is written.

    The size of the images is fixed: position embeddings are resized here, by the checkpoint's own rule, because ONNX's
    antialiased bicubic is another (pytorch #177138), and so are the angles of RoPE. For another size write another
    file. The batch is of any size unless `dynamic_batch` is false.

    Args:
        vit: the model, as for `diagnose`, in float32 or float16; it is written as in evaluation mode.
        path: `NAME.onnx` or `NAME.pt2`.
        image_size: in pixels, one side or height and width, whole patches; by default the checkpoint's.
        dynamic_batch: one file for every batch; otherwise for single images.
        check: compare with PyTorch in onnxruntime on photographs that come with the package.

    Raises:
        ValueError: another suffix or precision, a size that is no whole patches, an operator that ONNX lacks, a result
            that differs from PyTorch's, a package that is missing (`pip install "vitreg[export]"`), a full disk.
    """
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path} must end in .onnx or .pt2")
    vit = from_module(vit)
    if (dtype := next(vit.parameters()).dtype) not in TOLERANCE:
        raise ValueError(f"the model is in {str(dtype).removeprefix('torch.')}; export vit.float() or vit.half()")
    write, open_ = _FORMATS[path.suffix]
    if path.suffix == ".onnx":
        for library in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
            import_optional(library, "ONNX", "export", ", or write a .pt2")
    model = _Outputs(_at_size(vit, image_size))
    with replacing_files(path.parent) as folder:
        write(_program(model, dynamic_batch), model, folder / path.name, dynamic_batch)
        errors = _errors(model, open_(folder / path.name), dynamic_batch) if check else None
        if errors and max(errors.values()) > TOLERANCE[dtype]:
            worst = max(errors, key=lambda name: errors[name])
            raise ValueError(
                f"{worst} of the written model differs from PyTorch's by {errors[worst]:.1e} (relative), more than "
                f"{TOLERANCE[dtype]:.0e}; nothing was kept. Write the other format, and report this"
            )
    return Exported(path, model.names, model.vit.preprocess, errors)


class _Outputs(nn.Module):
    """The model with its outputs as a tuple, named in order by `names`."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        parts = {
            "cls": vit.config.class_token,
            "registers": vit.num_registers > 0,
            "patches": True,
            "logits": vit.head is not None,
        }
        self.names = tuple(name for name, there in parts.items() if there)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.vit(images)
        found = {"cls": tokens.cls, "registers": tokens.registers, "patches": tokens.patches}
        if self.vit.head is not None:
            found["logits"] = self.vit.head(self.vit.pool(tokens))
        return tuple(value for name in self.names if (value := found[name]) is not None)

    @property
    def metadata(self) -> dict[str, str]:
        """What a user needs to prepare images and to read the outputs."""
        config = self.vit.config
        told = {"preprocess": asdict(config.preprocess), "grid": config.grid, "config": config.to_dict()}
        return {"producer": "vitreg", "name": config.name} | {key: json.dumps(value) for key, value in told.items()}


def _at_size(vit: VisionTransformer, image_size: int | tuple[int, int] | None) -> VisionTransformer:
    """A copy on the CPU whose own size is this one."""
    config, patch = vit.config, vit.config.patch_size
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size or config.image_size
    if height % patch or width % patch or min(height, width) < patch:
        raise ValueError(f"image_size {height} x {width} is not in whole patches of {patch} pixels")
    vit = copy.deepcopy(vit).cpu().eval().requires_grad_(False)
    preprocess = vit.preprocess
    if preprocess.crop in ("none", "pad"):  # these let every image keep a size of its own
        preprocess = replace(preprocess, crop="center")
    if preprocess.output_size(height, width) != (height, width):
        preprocess = preprocess.with_size(height, width)
    vit.config = replace(config, image_size=(height, width), preprocess=preprocess)
    for module in vit.modules():
        if isinstance(module, RelPosBias):
            module.resize(vit.config.grid)
    if vit.pos_embed is not None:
        table = resize_positions(vit.pos_embed, config.grid, vit.config.grid, config.position_interpolation)
        vit.pos_embed = nn.Parameter(table, requires_grad=False)
    return vit


def _program(model: _Outputs, dynamic_batch: bool) -> Any:
    """The model as a graph of PyTorch's operators."""
    images = torch.zeros(1 + dynamic_batch, 3, *model.vit.config.image_size)
    # PyTorch 2.6 takes the largest integer out of an open range, where registers are expanded to the batch.
    shapes = {"images": {0: torch.export.Dim("batch", max=2**31 - 1)}} if dynamic_batch else None
    with torch.no_grad(), _quiet():
        return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)


def _write_onnx(program: Any, model: _Outputs, temporary: Path, dynamic_batch: bool) -> None:
    shapes = {"images": {0: "batch"}} if dynamic_batch else None
    names: dict[str, Any] = {"input_names": ["images"], "output_names": list(model.names)}
    try:
        with torch.no_grad(), _quiet():
            written = torch.onnx.export(program, **names, dynamic_shapes=shapes, dynamo=True, verbose=False)
    except Exception as error:
        operator = re.search(r"OpOverload\(op='([\w.]+)'", str(error))
        what = operator[1] if operator else f"a part of this model ({one_line(error)[:200]})"
        raise ValueError(f"ONNX cannot express {what}; write a .pt2 instead") from error
    assert written is not None
    written.model.metadata_props.update(model.metadata)
    written.save(temporary)


def _write_program(program: Any, model: _Outputs, temporary: Path, dynamic_batch: bool) -> None:
    torch.export.save(program, temporary, extra_files={METADATA: json.dumps(model.metadata)})


def _open_onnx(path: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


def _open_program(path: Path) -> Callable[[Tensor], list[Tensor]]:
    module = torch.export.load(path).module()
    return lambda images: list(module(images))


_FORMATS = {".onnx": (_write_onnx, _open_onnx), ".pt2": (_write_program, _open_program)}


@torch.no_grad()
def _errors(
    model: _Outputs, run: Callable[[Float[Tensor, "B 3 H W"]], list[Tensor]], dynamic_batch: bool
) -> dict[str, float]:
    """Relative errors on four photographs: a batch of three, which is not the example's, and one alone."""
    photographs = [model.vit.preprocess(read_image(path)) for path in bundled_photographs()[:4]]
    found = dict.fromkeys(model.names, 0.0)
    for images in torch.stack(photographs).split([3, 1] if dynamic_batch else 1):
        for name, ours, theirs in zip(model.names, run(images), model(images), strict=True):
            error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            found[name] = max(found[name], error) if error == error else float("inf")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell their steps through loggers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
