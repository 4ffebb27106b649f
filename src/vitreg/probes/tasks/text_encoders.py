"""Text towers for zero-shot classification: open_clip's, and those of our own CLIP runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.checkpoints.from_open_clip import open_clip_model
from vitreg.checkpoints.hub import downloading
from vitreg.checkpoints.state import CheckpointError
from vitreg.checkpoints.text_tower import TextTower, load_text_tower
from vitreg.probes.tasks.templates import import_open_clip


@runtime_checkable
class TextEncoder(Protocol):
    """Anything that embeds sentences where a model embeds images."""

    def encode(self, sentences: Sequence[str]) -> Float[Tensor, "S E"]:
        """Embeddings; their length does not matter."""
        ...


@dataclass(frozen=True)
class OpenClipText:
    """The text side of an open_clip model, CLIP or SigLIP, with its own tokenizer."""

    model: Any
    tokenizer: Callable[[list[str]], Int[Tensor, "S L"]]

    @torch.inference_mode()
    def encode(self, sentences: Sequence[str]) -> Float[Tensor, "S E"]:
        """As of the protocol."""
        device = next(self.model.parameters()).device
        return self.model.encode_text(self.tokenizer(list(sentences)).to(device)).float()


@dataclass(frozen=True)
class TrainedText:
    """The text tower that a run of the clip recipe trained."""

    tower: TextTower

    @torch.inference_mode()
    def encode(self, sentences: Sequence[str]) -> Float[Tensor, "S E"]:
        """As of the protocol."""
        device = self.tower.logit_scale.device
        return self.tower(self.tower.tokenize(sentences).to(device)).float()


def has_text_tower(source: str | os.PathLike[str]) -> bool:
    """Whether a model came with one, so that zero-shot classification can be asked."""
    file = _trained_file(source)
    return str(source).startswith("open_clip:") or (file.name == "text.safetensors" and file.is_file())


def load_text_encoder(
    source: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> OpenClipText | TrainedText:
    """The text tower that belongs to a model.

    Args:
        source: as of `vitreg.load`: `open_clip:ARCH/PRETRAINED`, whose whole state dict may be in the folder that
            `VITREG_CHECKPOINTS` names (`open_clip--ARCH--PRETRAINED.safetensors` or `.bin`, `.pt`), or the folder of a
            run of the clip recipe, or the `text.safetensors` in it.
        device: where it goes; the CPU by default.

    Raises:
        CheckpointError: there is none, or it cannot be downloaded.
        ValueError: open_clip is not installed.
    """
    if str(source).startswith("open_clip:"):
        return _open_clip_text(str(source), device)
    file = _trained_file(source)
    if not file.is_file():
        raise CheckpointError(
            f"{source} has no text tower; zero-shot classification takes open_clip:ARCH/PRETRAINED or the folder of a "
            f"run of the clip recipe"
        )
    return TrainedText(load_text_tower(file, device=device))


def _trained_file(source: str | os.PathLike[str]) -> Path:
    """Where the text tower of a run is, if it has one: in its folder, beside its weights, or the source itself."""
    path = Path(source).expanduser()
    if path.is_file() and path.name != "text.safetensors" and (path.parent / "text.safetensors").is_file():
        path = path.parent
    return path / "text.safetensors" if path.is_dir() else path


def _open_clip_text(source: str, device: torch.device | str | None) -> OpenClipText:
    open_clip = import_open_clip()
    model = open_clip_model(source)
    architecture = source.removeprefix("open_clip:").partition("/")[0]
    with downloading(source, "the tokenizer's files"):
        tokenizer = open_clip.get_tokenizer(architecture)
    del model.visual
    return OpenClipText(model.to(device).eval(), tokenizer)
