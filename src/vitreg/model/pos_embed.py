"""Learned position embeddings at any grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.model.config import PositionInterpolation


def resize_positions(
    table: Float[Tensor, "1 M D"], old: tuple[int, int], new: tuple[int, int], rule: PositionInterpolation
) -> Float[Tensor, "1 N D"]:
    """The position table of a grid `old` on a grid `new`, by the checkpoint's own rule, in float32 inside.

    Sources of the rules: `timm.layers.resample_abs_pos_embed` (bicubic, antialias);
    `interpolate_pos_encoding` of `dinov2/models/vision_transformer.py` and DINO v1 (`offset=0.1`: a scale
    factor a little above the exact one, which also shifts the samples); transformers (exact size, no
    antialias, except for DINOv2 with registers and SigLIP 2); `Idefics2VisionEmbeddings` (buckets);
    timm's `NaFlexEmbeds` (corners and squares); `Aimv2VisionEmbeddings` (sincos).
    """
    if old == new:
        return table
    if rule.mode == "sincos":
        return sincos_positions(new, table.shape[-1]).to(table)
    if rule.mode == "bucket":
        rows, columns = (_buckets(*sides, table.device) for sides in zip(old, new, strict=True))
        return table.unflatten(1, old)[:, rows][:, :, columns].flatten(1, 2)
    image = table.float().unflatten(1, old).permute(0, 3, 1, 2)
    if rule.offset:
        scale = [(side + rule.offset) / before for side, before in zip(new, old, strict=True)]
        image = F.interpolate(image, scale_factor=scale, mode=rule.mode, antialias=rule.antialias)
    else:
        size = (max(new), max(new)) if rule.square else new
        options = {"antialias": rule.antialias, "align_corners": rule.align_corners}
        image = F.interpolate(image, size=size, mode=rule.mode, **options)[..., : new[0], : new[1]]
    if tuple(image.shape[-2:]) != new:
        raise ValueError(f"position offset {rule.offset} turned a {new} grid into {tuple(image.shape[-2:])}")
    return image.flatten(2).transpose(1, 2).to(table.dtype)


def sincos_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "1 N {dim}"]:
    """Sines and cosines of the column, then of the row (AIMv2, like MAE)."""
    omega = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    axes = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    y, x = (axis.flatten()[:, None] * omega for axis in axes)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).unsqueeze(0).float()


def _buckets(old: int, new: int, device: torch.device) -> Int[Tensor, " N"]:
    """Which of `old` equal cells of a side each of `new` patches begins in, rounded as transformers rounds it."""
    boundaries = torch.arange(1 / old, 1.0, 1 / old, device=device)
    begin = torch.arange(new, dtype=torch.float32, device=device) * (1 / new)
    return torch.bucketize(begin.clamp(max=1 - 1e-6), boundaries, right=True)
