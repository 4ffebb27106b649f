"""CLIP's other half: open_clip's text Transformer, with the scale of its logits, in and out of files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitreg.checkpoints.files import read_weights
from vitreg.checkpoints.hub import import_optional
from vitreg.checkpoints.state import CheckpointError, check_keys

FORMAT = "vitreg-text"


class TextTower(nn.Module):
    """Captions to the space of a CLIP model's image embeddings.

    Weights have the names that open_clip's `CustomTextCLIP` gives them.

    Args:
        embed_dim: width of that space, `num_classes` of the Vision Transformer.
        width: of a token.
        layers: number of blocks.
        heads: attention heads per block.
        context_length: tokens of a caption, its two marks included; what is longer is cut off.

    Attributes:
        text: `open_clip.transformer.TextTransformer`.
        logit_scale: natural logarithm of the factor of the cosines; one number, but in a vector, because FSDP2 takes
            no scalars.
        options: the arguments.

    Raises:
        ValueError: open_clip is not installed.
    """

    def __init__(self, *, embed_dim: int, width: int, layers: int, heads: int, context_length: int) -> None:
        super().__init__()
        sizes = {"width": width, "layers": layers, "heads": heads, "context_length": context_length}
        self.options = {"embed_dim": embed_dim, **sizes}
        self.text: Any = _open_clip().transformer.TextTransformer(output_dim=embed_dim, **sizes)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))

    @classmethod
    def from_state(cls, options: Mapping[str, int], state: Mapping[str, Tensor]) -> TextTower:
        """A tower that holds these very tensors."""
        with torch.device("meta"):
            tower = cls(**options)
        tower.load_state_dict(state, assign=True)
        tower.text.attn_mask = tower.text.build_causal_mask().to(tower.logit_scale.device)  # no part of the state
        return tower

    @property
    def metadata(self) -> dict[str, str]:
        """What a safetensors file has to say for `load_text_tower` to read it."""
        return {"format": FORMAT, "config": json.dumps(self.options)}

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B E"]:
        """Embeddings of tokenised captions, not normalized."""
        return self.text(tokens)

    def tokenize(self, captions: Sequence[str]) -> Int[Tensor, "B L"]:
        """What `forward` takes, on the CPU."""
        return tokenize(captions, self.options["context_length"])


def tokenize(captions: Sequence[str], context_length: int) -> Int[Tensor, "B L"]:
    """CLIP's byte pairs in lower case, between the marks of start and end; zeros after that.

    Raises:
        ValueError: open_clip is not installed.
    """
    return _open_clip().tokenize(list(captions), context_length)


def load_text_tower(path: str | os.PathLike[str], *, device: str | torch.device | None = None) -> TextTower:
    """The text tower that a CLIP run saved beside its model, in evaluation mode.

    Args:
        path: `text.safetensors`.
        device: where it goes; the CPU by default.

    Raises:
        CheckpointError: the file is missing, damaged or something else.
        ValueError: open_clip is not installed.
    """
    state, metadata = read_weights(Path(path))
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no text tower; give the text.safetensors of a run of the clip recipe")
    try:
        options = json.loads(metadata["config"])
        with torch.device("meta"):
            expected = TextTower(**options).state_dict()
        check_keys(state, expected, str(path))
        tower = TextTower.from_state(options, state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or from a newer vitreg: {error}") from error
    return tower.to(device).eval()


def _open_clip() -> Any:
    return import_optional("open_clip", "text", "clip")
