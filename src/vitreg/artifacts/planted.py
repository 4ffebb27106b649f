"""Artifacts whose author is known: a model to show what they do, and what removes them, where none has any."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.checkpoints.state import build
from vitreg.common.words import number
from vitreg.model import Block, Tokens, VisionTransformer
from vitreg.model.pos_embed import resize_positions

RATIO = 20.0
"""Norm of what is written, in median patch norms."""

MARKS = (0.3, 0.5, 1.0, 1.5)
"""Lengths of what is added to the corners' positions, in median patch norms: the first that suffices is taken. All are
too short to be outliers; a longer one stays visible in the features after a fix."""

CLEARANCE = 0.35
"""Between the other token and the corner that are nearest to each other on the detector's axis, as a part of the
distance of their means; less would not hold for other images."""

RIDGE = 0.01
"""Added to the variances of the discriminant, in mean variances: with few images it would fit these only."""

STEEPNESS = 40.0
"""Between the unit's inputs for the other token and the corner that are nearest to each other; zero is halfway."""


@torch.no_grad()
def plant_artifacts(vit: VisionTransformer, images: Float[Tensor, "B 3 H W"]) -> VisionTransformer:
    """A copy of a model in which one hidden unit of a middle block writes a massive vector to the four corner patches.

    Corners, as in timm's supervised ViT-Ti/16. Their positions are marked by a short vector; the unit's input is the
    linear discriminant between corners and all other tokens of the images, so it fires on no other. What it writes
    points to where the keys of later blocks meet their queries, so that the corners soak up attention as artifacts do.

    Args:
        vit: a model with learned positions and a plain MLP; it is left untouched.
        images: some images, normalized, on the model's device. The corners are those of their size, to which the
            position table of the copy is resized.

    Returns:
        The copy; `config.changes` says what was planted.

    Raises:
        ValueError: a model of another kind, or too few images to tell its corners from the other tokens.
    """
    config = vit.config
    name = config.name or config.architecture
    unfit = config.signed_units or config.parallel or config.post_norm or config.rel_pos or config.depth < 2
    if vit.pos_embed is None or not config.mlp_bias or unfit:
        raise ValueError(
            f"artifacts cannot be planted in {name or 'this model'}: that needs learned positions, a plain MLP with "
            f"biases, and two blocks one after the other whose norms come before their branches"
        )
    height, width = images.shape[-2:]
    grid = (height // config.patch_size, width // config.patch_size)
    corners = torch.zeros(grid, dtype=torch.bool)
    corners[[0, 0, -1, -1], [0, -1, 0, -1]] = True
    index = (config.depth - 1) // 2

    generator = torch.Generator().manual_seed(0)
    mark = F.normalize(torch.randn(config.embed_dim, generator=generator), dim=0).to(vit.pos_embed)
    positions = resize_positions(vit.pos_embed, config.grid, grid, config.position_interpolation)
    median = vit.trace(images).patch_norms[index].median()
    for length in MARKS:
        table = positions + corners.flatten()[:, None].to(mark) * length * median * mark
        resized = dataclasses.replace(config, image_size=(height, width))
        planted = build(resized, {**vit.state_dict(), "pos_embed": table}, name).to(images.device)
        entering, queries = _look(planted, images, index)
        marked = torch.cat([torch.zeros(config.num_prefix_tokens, dtype=torch.bool), corners.flatten()])
        detector = _detector(entering.cpu().double(), marked)
        if detector is not None:
            break
    else:
        raise ValueError(
            f"corners cannot be told from the other tokens of these {len(images)} images; give more images"
        )

    block = planted.blocks[index]
    assert isinstance(block, Block)
    mlp = block.mlp
    unit = int(mlp.fc2.weight.norm(dim=0).argmin())  # the one that is missed least
    weight, bias, fired = detector
    mlp.fc1.weight[unit], mlp.fc1.bias[unit] = weight.to(mlp.fc1.weight), bias.to(mlp.fc1.bias)
    written = _sought(planted, queries, index) * (RATIO * median / fired.to(median))
    mlp.fc2.weight[:, unit] = written if block.ls2 is None else written / block.ls2

    said = (
        f"Outliers were planted: unit {unit} of block {index} fires on the four corners of the {grid[0]} x {grid[1]} "
        f"patches, whose positions were marked, and writes a vector of norm {number(float(RATIO * median))} there, "
        f"{RATIO:g} times the median patch."
    )
    planted.config = dataclasses.replace(
        planted.config, name=f"{name} + planted outliers", changes=(*config.changes, said)
    )
    return planted


def _look(
    vit: VisionTransformer, images: Float[Tensor, "B 3 H W"], index: int
) -> tuple[Float[Tensor, "B T D"], Tokens]:
    """What enters the MLP of a block, and the queries of all blocks."""
    entering: list[Tensor] = []
    block = vit.blocks[index]
    assert isinstance(block, Block)
    hook = block.mlp.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    queries = vit.trace(images, facets=("queries",)).queries
    hook.remove()
    assert queries is not None
    return entering[0], queries


def _detector(
    tokens: Float[Tensor, "B T D"], marked: Bool[Tensor, " T"]
) -> tuple[Float[Tensor, " D"], Float[Tensor, ""], Float[Tensor, ""]] | None:
    """Weight and bias of a unit that fires on the marked tokens only (Fisher's discriminant), and its mean there.

    None where the marked tokens are not far enough from the others.
    """
    on, off = tokens[:, marked].flatten(0, 1), tokens[:, ~marked].flatten(0, 1)
    within = on.T.cov() + off.T.cov()
    within.diagonal().add_(RIDGE * within.diagonal().mean())
    direction = torch.linalg.solve(within, on.mean(0) - off.mean(0))
    inside, outside = on @ direction, off @ direction
    lowest, highest = inside.min(), outside.max()
    if lowest - highest < CLEARANCE * (inside.mean() - outside.mean()):
        return None
    weight = direction * STEEPNESS / (lowest - highest)
    bias = -STEEPNESS * (lowest + highest) / (lowest - highest) / 2
    return weight, bias, inside.mean() * STEEPNESS / (lowest - highest) + bias


def _sought(vit: VisionTransformer, queries: Tokens, index: int) -> Float[Tensor, " D"]:
    """The direction, of length 1, whose keys in the blocks after `index` are nearest to the mean query.

    The query is the class token's, or where there is none the patches'.
    """
    asking = queries.patches if queries.cls is None else queries.cls.unsqueeze(-2)
    total = queries.patches.new_zeros(vit.config.embed_dim)
    for block, query in zip(vit.blocks[index + 1 :], asking.mean((1, 2))[index + 1 :], strict=True):
        assert isinstance(block, Block)
        sought = query @ block.attn.qkv.weight.chunk(3)[1] * block.norm1.weight
        total += F.normalize(sought - sought.mean(), dim=0)  # the norm before attention takes the mean away
    return F.normalize(total, dim=0)
