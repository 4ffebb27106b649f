"""A model of any library that is read, as ours."""

from __future__ import annotations

from torch import nn

from vitreg.checkpoints.from_open_clip import from_open_clip
from vitreg.checkpoints.from_timm import from_timm
from vitreg.checkpoints.from_transformers import from_transformers
from vitreg.checkpoints.state import CheckpointError
from vitreg.model import VisionTransformer

_CONVERTERS = {"timm": from_timm, "transformers": from_transformers, "open_clip": from_open_clip}


def from_module(model: object) -> VisionTransformer:
    """The model itself where it is ours, compiled or not; a conversion of one of timm, transformers or open_clip.

    Raises:
        CheckpointError: the model is of another kind, or has a part that vitreg does not implement.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, VisionTransformer):
        return model
    convert = _CONVERTERS.get(type(model).__module__.partition(".")[0])
    if convert is None or not isinstance(model, nn.Module):
        what = f"vitreg.load({model!r})" if isinstance(model, str) else "vitreg.load(NAME), or vitreg.from_state_dict"
        raise CheckpointError(
            f"a {type(model).__name__} is no model that vitreg reads; give one of timm, transformers or open_clip, or "
            f"{what}"
        )
    return convert(model)
