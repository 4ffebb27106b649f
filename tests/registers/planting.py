"""Artifacts whose author is known: hidden units that fire on patches of one color and write a massive vector."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from torch import Tensor

import vitreg
from vitreg.images import read_image

MAGENTA, GREEN = torch.tensor([2.0, -2.0, 2.0]), torch.tensor([-2.0, 2.0, -2.0])


def random_vit(family: str, *, size: int = 112, depth: int = 4, seed: int = 0, **options) -> vitreg.VisionTransformer:
    torch.manual_seed(seed)
    return vitreg.from_timm(timm.create_model(family, img_size=size, depth=depth, num_classes=5, **options)).eval()


def photos(paths: Sequence, vit: vitreg.VisionTransformer) -> Tensor:
    height, width = vit.config.image_size
    preprocess = vitreg.Preprocess(size=(height, width))
    return torch.stack([preprocess(read_image(path)) for path in paths])


def with_patches(images: Tensor, patch: int, color: Tensor = MAGENTA, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Photographs with one patch of a color, each at a place of its own, and where these are, `[B, N]`."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
    marks = torch.zeros(len(images), rows * columns, dtype=torch.bool)
    for image in marks:
        image[torch.randint(len(image), (), generator=generator)] = True
    mask = marks.unflatten(1, (rows, columns)).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return torch.where(mask[:, None], color[:, None, None], images), marks


@torch.no_grad()
def plant(vit: vitreg.VisionTransformer, block: int, units: Sequence[int], images: Tensor, marks: Tensor) -> None:
    """Make hidden units of a block write vectors of 30 times the median norm where `marks` are, and nowhere else.

    In a gated MLP their activation is negative.
    """
    seen: list[Tensor] = []
    mlp = vit.blocks[block].mlp
    hook = mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trace = vit.trace(images)
    hook.remove()
    entering = vitreg.Tokens.split(seen[0], class_token=vit.config.class_token, grid=trace.tokens.grid).patches
    direction = entering[marks].mean(0) - entering[~marks].mean(0)
    on, off = (entering[marks] @ direction).min(), (entering[~marks] @ direction).max()
    assert on > off, "the planted patches cannot be told from the others"
    steepness = 40 / (on - off)
    offset = -steepness * (on + off) / 2
    scale = vit.blocks[block].ls1 if vit.config.parallel else vit.blocks[block].ls2
    massive = 30 * trace.patch_norms[block].median() / len(units)
    generator = torch.Generator().manual_seed(block)
    for unit in units:
        mlp.fc1.weight[unit] = steepness * direction
        mlp.fc1.bias[unit] = offset
        if vit.config.gated_mlp:  # the value's rows follow the gate's
            mlp.fc1.weight[vit.config.mlp_dim + unit] = 0
            mlp.fc1.bias[vit.config.mlp_dim + unit] = -1
        column = torch.randn(vit.config.embed_dim, generator=generator)
        column *= massive / column.norm() / 20
        mlp.fc2.weight[:, unit] = column if scale is None else column / scale
