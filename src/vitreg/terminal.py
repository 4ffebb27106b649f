"""What the commands share: options, progress, output."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from vitreg import VisionTransformer

Images = Annotated[Positional[list[str]], arg(metavar="IMAGES", help="files, folders (searched through) or globs")]

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


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

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with status(f"loading {self.model}"):
            try:
                return vitreg.load(
                    self.model,
                    architecture=self.architecture,
                    device=device,
                    dtype=getattr(torch, self.dtype),
                )
            except (RuntimeError, AssertionError) as error:
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


def first_line(error: BaseException) -> str:
    """An error's message in one line."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for {error.filename}" if error.filename else ""
        return f"the disk has no room left{where}; make room, or choose another --out"
    return " ".join(str(error).split()) or type(error).__name__


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


def unused(stem: str, taken: set[str]) -> str:
    """A name for a picture's files; pictures of different folders may share theirs."""
    name, n = stem, 2
    while name in taken:
        name, n = f"{stem}-{n}", n + 1
    return name


def print_json(value: object) -> None:
    """The only thing on standard output of a command with `--json`."""
    print(json.dumps(value, indent=1))


def print_skipped(reasons: list[str]) -> None:
    """The first 20 files that were left out, and why."""
    if reasons:
        print(f"skipped {len(reasons)} file{'s' if len(reasons) > 1 else ''}:")
        for reason in reasons[:20]:
            print(f"  {reason}")
        if len(reasons) > 20:
            print(f"  and {len(reasons) - 20} more")


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner on stderr; silent when it is no terminal."""
    console = Console(stderr=True)
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def progress(text: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr, fed with (done, total); silent when it is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
