"""Learned position embeddings at any grid."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitreg.model.config import PositionInterpolation


def resize_positions(
    table: Float[Tensor, "1 M D"], old: tuple[int, int], new: tuple[int, int], rule: PositionInterpolation
) -> Float[Tensor, "1 N D"]:
    """The position table of a grid `old` on a grid `new`, by the checkpoint's own rule, in float32 inside.

    Sources of the rules: `timm.layers.resample_abs_pos_embed` (bicubic, antialias);
    `interpolate_pos_encoding` of `dinov2/models/vision_transformer.py` and DINO v1 (`offset=0.1`: a scale
    factor a little above the exact one, which also shifts the samples); transformers (exact size, no
    antialias, except for DINOv2 with registers and SigLIP 2).
    """
    if old == new:
        return table
    image = table.float().unflatten(1, old).permute(0, 3, 1, 2)
    if rule.offset:
        scale = [(side + rule.offset) / before for side, before in zip(new, old, strict=True)]
        image = F.interpolate(image, scale_factor=scale, mode=rule.mode, antialias=rule.antialias)
    else:
        image = F.interpolate(image, size=new, mode=rule.mode, antialias=rule.antialias, align_corners=False)
    if tuple(image.shape[-2:]) != new:
        raise ValueError(f"position offset {rule.offset} turned a {new} grid into {tuple(image.shape[-2:])}")
    return image.flatten(2).transpose(1, 2).to(table.dtype)
