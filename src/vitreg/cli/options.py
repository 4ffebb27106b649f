"""Options that commands share."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeVar

from tyro.conf import Positional, arg

from vitreg.cli.output import first_line, status
from vitreg.common.disk import lock, unlock, writing

if TYPE_CHECKING:
    import torch

    from vitreg import VisionTransformer
    from vitreg.checkpoints import ObservedViT

Loaded = TypeVar("Loaded")
Model = TypeVar("Model", "VisionTransformer", "ObservedViT", "VisionTransformer | ObservedViT")
Images = Annotated[Positional[list[str]], arg(metavar="IMAGES")]
Size = int | tuple[int, int]

_locks: list[TextIO | None] = []
"""Of the folders that the command writes to."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where models run.

    Attributes:
        device: cpu, cuda, mps; auto takes a GPU where there is one.
        dtype: of weights and activations.
    """

    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @contextlib.contextmanager
    def using(self) -> Iterator[torch.device]:
        """The device; that it cannot be used is one sentence."""
        from vitreg.common.devices import resolve_device

        device = resolve_device(self.device)
        try:
            yield device
        except RuntimeError as error:
            raise ValueError(f"cannot use device {self.device!r}: {first_line(error)}") from error


@dataclass(frozen=True)
class Checkpoint(Runtime):
    """The model, and where it runs.

    Attributes:
        model: short name (see vitreg models), timm name, hub repository, open_clip:ARCH/PRETRAINED, or a file.
        architecture: timm's name of the architecture, for a file that does not say it.
    """

    model: str
    architecture: str | None = None

    def load(self) -> VisionTransformer:
        """The model, ready to look at images.

        Raises:
            ValueError: it cannot be loaded; the message says so where it could be observed.
        """
        import vitreg
        from vitreg.checkpoints import can_be_observed

        try:
            return self._loaded_by(vitreg.load)
        except vitreg.CheckpointError as refusal:
            if not can_be_observed(self.model, self.architecture, refusal):
                raise
            advice = "if it has patch tokens, `vitreg diagnose` and `vitreg compare` can observe it as it is"
            raise vitreg.CheckpointError(f"{refusal}; {advice}") from refusal

    def load_or_observe(self) -> VisionTransformer | ObservedViT:
        """The model, or what is not converted as it is, and a line that says why."""
        from vitreg.checkpoints import load_or_observe

        vit, refusal = self._loaded_by(load_or_observe)
        if refusal:
            print(f"vitreg: {refusal.partition('; ')[0]}; it is observed as it is", file=sys.stderr)
        return vit

    def _loaded_by(self, load: Callable[..., Loaded]) -> Loaded:
        import torch

        from vitreg.common.memory import keep_freed_memory

        keep_freed_memory()
        with status(f"loading {self.model}"), self.using() as device:
            dtype = getattr(torch, self.dtype)
            return load(self.model, architecture=self.architecture, device=device, dtype=dtype)


@dataclass(frozen=True)
class ModelOptions(Checkpoint):
    """The model, where it runs and what it sees.

    Attributes:
        size: side of what the model sees in pixels, or height and width, in whole patches; by default the checkpoint's.
    """

    size: Size | None = None

    def load(self) -> VisionTransformer:
        """The model, ready to look at images of the size that was asked for."""
        return self._sized(super().load())

    def load_or_observe(self) -> VisionTransformer | ObservedViT:
        """The same, and models that are not converted are observed."""
        return self._sized(super().load_or_observe())

    def _sized(self, vit: Model) -> Model:
        if self.size is not None:
            height, width = sides(self.size)
            if height % vit.config.patch_size or width % vit.config.patch_size:
                given = self.size if height == width else f"{height} {width}"
                raise ValueError(f"--size {given} is not a multiple of the patch size {vit.config.patch_size}")
            config: Any = vit.config
            vit.config = dataclasses.replace(config, preprocess=vit.preprocess.with_size(height, width))
        return vit


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which images.

    Attributes:
        limit: so many images only, from all over the files.
        strict: an image that cannot be read is an error.
    """

    limit: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None:
            positive("--limit", self.limit)


@dataclass(frozen=True, kw_only=True)
class Batching(Reading):
    """Which images, and how many at a time.

    Attributes:
        batch_size: images at a time.
    """

    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("--batch-size", self.batch_size)


def sides(size: Size) -> tuple[int, int]:
    """Height and width; one number is both."""
    height, width = (size, size) if isinstance(size, int) else size
    return positive("--size", height), positive("--size", width)


def positive(flag: str, value: int) -> int:
    """The value, or a `ValueError` that names the flag."""
    if value < 1:
        raise ValueError(f"{flag} {value} must be at least 1")
    return value


def writable_folder(out: Path) -> Path:
    """The folder that a command writes to, made before any work is done, and kept from other processes until it ends.

    Raises:
        ValueError: it cannot be written, or another process writes to it.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    _locks.append(lock(out, "writes to"))
    return out


def release_folders() -> None:
    """The opposite of `writable_folder`, for all of them."""
    while _locks:
        unlock(_locks.pop())
