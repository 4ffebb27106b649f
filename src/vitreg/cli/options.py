"""Options that commands share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from vitreg.cli.output import first_line, status

if TYPE_CHECKING:
    from vitreg import VisionTransformer


Images = Annotated[Positional[list[str]], arg(metavar="IMAGES", help="files, folders (searched through) or globs")]


@dataclass(frozen=True)
class Checkpoint:
    """Which model, and where it runs."""

    model: str
    """short name (`vitreg models`), timm name, hub repository, open_clip:ARCH/PRETRAINED, or a file"""
    architecture: str | None = None
    """timm's name of the architecture, for a file that does not say it"""
    device: str = "auto"
    """cpu, cuda, mps; auto takes a GPU where there is one"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """precision of weights and activations"""

    def load(self) -> VisionTransformer:
        """The model, ready to look at pictures."""
        import torch

        import vitreg
        from vitreg.devices import resolve_device

        device = resolve_device(self.device)
        with status(f"loading {self.model}"):
            try:
                return vitreg.load(
                    self.model,
                    architecture=self.architecture,
                    device=device,
                    dtype=getattr(torch, self.dtype),
                )
            except RuntimeError as error:
                raise ValueError(f"cannot use device {self.device!r}: {first_line(error)}") from error


@dataclass(frozen=True)
class ModelOptions(Checkpoint):
    """Which model, where it runs and what it sees."""

    size: int | None = None
    """side of the pictures in pixels, a multiple of the patch size; the checkpoint's own by default"""

    def load(self) -> VisionTransformer:
        """The model, ready to look at pictures of the size that was asked for."""
        vit = super().load()
        if self.size is not None:
            if self.size < 1 or self.size % vit.config.patch_size:
                raise ValueError(f"--size {self.size} is not a multiple of the patch size {vit.config.patch_size}")
            preprocess = vit.preprocess.with_size(self.size, self.size)
            vit.config = dataclasses.replace(vit.config, preprocess=preprocess)
        return vit


def positive(flag: str, value: int) -> int:
    """The value, or a `ValueError` that names the flag."""
    if value < 1:
        raise ValueError(f"{flag} {value} must be at least 1")
    return value


def writable_folder(out: Path) -> Path:
    """The output folder, made and tried before any work is done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".vitreg-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from error
    return out
