"""Any module with a residual stream of patch tokens, looked at by hooks in its own code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitreg.checkpoints.observed.blocks import Blocks, find_blocks
from vitreg.checkpoints.observed.inputs import guess_preprocess, how_to_call, image_tower, input_dtype
from vitreg.checkpoints.observed.layout import Layout, measure
from vitreg.checkpoints.observed.observed_vit import ObservedViT, UnseenAttention, looking
from vitreg.checkpoints.state import CheckpointError
from vitreg.common.words import counted
from vitreg.model import ObservedConfig, Preprocess

_ORDER = {
    "measured": "the order of the patches was measured",
    "told": "the order of the patches is what its `reroll` says",
    "axes": "rows and columns are axes of its tokens",
    "assumed": "the order of the patches is assumed to be row by row",
}


def observe(
    module: nn.Module,
    *,
    blocks: str | Iterable[nn.Module] | None = None,
    grid: Sequence[int] | None = None,
    prefix: int | None = None,
    preprocess: Preprocess | None = None,
) -> ObservedViT:
    """Look at any module with a residual stream of patch tokens, by hooks in its own code, without converting it.

    What is not given is found by running the module on noise: the longest run of blocks that hand on tokens of one
    shape; the tokens that do not depend on the image; and, by switching patches between two textures, the grid and the
    order of the others, whatever windows or strides the module sorts them by. What was found and what had to be assumed
    is said in `config.assumed`, and in the diagnosis.

    Args:
        module: takes normalized images `[B, 3, H, W]`, or is a model of transformers for images, videos or
            both and text (of which the image tower is taken).
        blocks: path of the container of the blocks, as `"encoder.layers"`, or the blocks themselves.
        grid: (rows, columns) of patches, or (time steps, rows, columns).
        prefix: how many tokens precede the patches; the first of them is taken for a class token.
        preprocess: how images become its input; by default what timm or transformers say, else ImageNet's mean and
            deviation at 224 x 224 pixels.

    Raises:
        CheckpointError: it has no patch tokens, or something cannot be found out; the message says what to give.
    """
    tower = find_tower_blocks(module, blocks=blocks, preprocess=preprocess)
    taken, images, found, preprocess = tower.module, tower.images, tower.blocks, tower.preprocess
    if images.is_meta:
        raise CheckpointError(f"this {type(taken).__name__} holds no weights (device 'meta'); load them to observe it")
    with looking(taken):
        call, video = how_to_call(taken)
        layout = measure(taken, call, found, images, grid, prefix, video=video)
    class_token = layout.num_prefix > 0 and _has_class_token(taken)
    config = ObservedConfig(
        depth=len(found.modules),
        embed_dim=found.width,
        num_heads=_num_heads(found.modules[0]),
        patch_size=max(1, round(images.shape[-1] / layout.grid[1])),
        class_token=class_token,
        num_registers=layout.num_prefix - class_token,
        preprocess=preprocess,
        name=_name(module) + (f" ({tower.path})" if tower.path else ""),
        architecture=type(taken).__name__,
        time_steps=layout.time_steps,
    )
    observed = ObservedViT(taken, found, grid=grid, prefix=prefix, config=config)
    observed.training = taken.training
    observed.layouts[images.shape[-2], images.shape[-1]] = layout
    observed.config = dataclasses.replace(
        config, assumed=_assumed(found, layout, config, tower.source), no_attention=_no_attention(observed, images)
    )
    return observed


@dataclass(frozen=True)
class _Tower:
    """The part of a model that takes images, with its blocks.

    Attributes:
        path: of the part in the model, "" for the model itself.
        module: the part.
        blocks: that hand on its tokens.
        images: noise of the size, dtype and device that it takes.
        preprocess: how images become its input.
        source: where that is from, in words.
    """

    path: str
    module: nn.Module
    blocks: Blocks
    images: Tensor
    preprocess: Preprocess
    source: str


def find_tower_blocks(
    module: nn.Module,
    *,
    blocks: str | Iterable[nn.Module] | None = None,
    preprocess: Preprocess | None = None,
) -> _Tower:
    """The first step of `observe`, which needs no weights: a module on the device "meta" will do.

    Raises:
        CheckpointError: as of `find_blocks`.
    """
    module = getattr(module, "_orig_mod", module)
    path, tower = image_tower(module)
    source = ""
    if preprocess is None:
        preprocess, source = guess_preprocess(tower, module)
    height, width = (side - side % preprocess.multiple_of for side in preprocess.size)
    images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    device = next((parameter.device for parameter in tower.parameters()), "cpu")
    images = images.to(device, input_dtype(tower))
    with looking(tower):
        chosen = blocks if blocks is None or isinstance(blocks, str) else list(blocks)
        found = find_blocks(tower, how_to_call(tower)[0], images, chosen)
    return _Tower(path, tower, found, images, preprocess, source)


def _no_attention(observed: ObservedViT, images: Tensor) -> str:
    """Why attention cannot be recorded, tried on images; empty where it can."""
    if not observed.config.num_prefix_tokens:
        return "its stream has no class token or register whose attention there could be"
    try:
        observed.trace(images[:1], attention_from="cls" if observed.config.class_token else "registers")
    except UnseenAttention as reason:
        return str(reason)
    return ""


def _has_class_token(module: nn.Module) -> bool:
    """Whether the first of the prefix tokens is a class token, by the names of weights."""
    names = [name.rpartition(".")[2].lower() for name, _ in module.named_parameters()]
    named = any("cls" in name or name.startswith("class") for name in names)
    return named or not any("reg" in name for name in names)


def _num_heads(block: nn.Module) -> int | None:
    for part in block.modules():
        for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"):
            if isinstance(number := getattr(part, name, None), int):
                return number
    return None


def _name(module: nn.Module) -> str:
    """What timm or transformers call the weights, else the class."""
    cfg: Any = getattr(module, "pretrained_cfg", None) or {}
    timm = ".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part)
    return timm or Path(getattr(getattr(module, "config", None), "_name_or_path", "")).name or type(module).__name__


def _assumed(blocks: Blocks, layout: Layout, config: ObservedConfig, source: str) -> str:
    """What was found and taken for granted, in a sentence."""
    rows = layout.grid[0] // layout.time_steps
    of = f" of {blocks.out_of}" if len(blocks.paths) < blocks.out_of else ""
    parts = [
        f"{len(blocks.paths)}{of} blocks, the first is {blocks.paths[0]}",
        f"{rows} x {layout.grid[1]} patches of {config.patch_size} pixels"
        + (f" at {layout.time_steps} time steps, one below the other" if layout.time_steps > 1 else ""),
        _ORDER[layout.known],
        ("a class token" if config.class_token else "no class token")
        + (f" and {counted(config.num_registers, 'register')}" if config.num_registers else ""),
    ]
    if layout.embedding is None:
        parts.append("redundancy is that of what enters the first block")
    return f"Observed by hooks in {config.architecture}: {'; '.join(part for part in (*parts, source) if part)}."
