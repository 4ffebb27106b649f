"""Which token is which patch, measured: patches are switched between two textures, one bit of their place at a time.

A module may lay its tokens out as it likes: windows first (Qwen2.5-VL), prefix tokens at the end (Llama 4). What enters
the first block still depends on the image patch by patch, so the place of a token can be read off what it answers to,
and tokens that answer to nothing are class tokens and registers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitreg.checkpoints.observed.blocks import Blocks, Call, Stop, entering, first_tensor, hooked, run
from vitreg.checkpoints.state import CheckpointError

NUM_TRIED = 4
"""Grids that are tried before the user is asked."""

ENOUGH = 0.65
"""Row by row is believed where so many tokens answer to each bit as expected; in another order half of them do.
A stem of several convolutions mixes neighbors, so that not all do."""


@dataclass(frozen=True)
class Layout:
    """The order of a module's tokens for images of one size.

    Attributes:
        grid: (rows, columns) of patches; the grids of all time steps, one below the other.
        time_steps: how many grids these are.
        order: which token of the stream is the first, second, ... of `[prefix, patches row by row]`; None for the
            module's own order.
        num_prefix: tokens that do not depend on the image.
        known: how the order is known: measured, told by the module, from axes of rows and columns, or it is assumed to
            be row by row.
        embedding: the layer that embeds patches, None where there is none to be found.
        embedding_order: the same as `order` for its patches.
    """

    grid: tuple[int, int]
    time_steps: int
    order: Int[Tensor, " T"] | None
    num_prefix: int
    known: Literal["measured", "told", "axes", "assumed"]
    embedding: nn.Module | None = None
    embedding_order: Int[Tensor, " N"] | None = None

    def arranged(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Tokens of the stream as `[prefix, patches row by row]`."""
        return tokens if self.order is None else tokens.index_select(1, self.order.to(tokens.device))

    def embedded(self, output: Tensor, batch: int) -> Float[Tensor, "B N D"]:
        """What the layer that embeds patches returns, row by row."""
        patches = as_patches(output, batch)
        return patches if self.embedding_order is None else patches[:, self.embedding_order.to(patches.device)]


def measure(
    module: nn.Module,
    call: Call,
    blocks: Blocks,
    images: Float[Tensor, "_ 3 H W"],
    grid: Sequence[int] | None,
    prefix: int | None,
    *,
    video: bool,
) -> Layout:
    """Find prefix tokens, grid and order for images of this size.

    Args:
        module: that the blocks are of.
        call: runs it.
        blocks: that hand on the tokens.
        images: any, for their size, dtype and device.
        grid: (rows, columns), or (time steps, rows, columns), where it is known.
        prefix: how many tokens precede the patches, where it is known.
        video: whether `call` makes videos of images, whose patches have several time steps.

    Raises:
        CheckpointError: the grid cannot be found out.
    """
    height, width = images.shape[-2:]
    if blocks.spatial and not blocks.first and grid is None:  # what is before them would run for every bit
        rows, columns = blocks.spatial[-2:]
        steps = blocks.spatial[0] if len(blocks.spatial) > 2 else 1
        return Layout((steps * rows, columns), steps, None, 0, "axes")
    if grid is None and (told := _rerolled(module, blocks, images, call)) is not None:
        return told
    off, on = torch.randn(2, *images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)

    def entry(batch: Tensor) -> Tensor:
        return _captured(module, call, blocks, batch)

    tokens = entry(torch.stack([off, on, on]))
    depends = _changes(tokens)
    if prefix is not None and not 0 <= prefix < tokens.shape[1]:
        raise CheckpointError(f"prefix is {prefix}; {type(module).__name__} has {tokens.shape[1]} tokens, give fewer")
    if prefix is None:
        prefix = int((~depends).sum())
        patches = depends.nonzero().flatten()
        rest = (~depends).nonzero().flatten()
    else:
        rest, patches = torch.arange(tokens.shape[1]).split([prefix, tokens.shape[1] - prefix])
    candidates = list(_grids(len(patches), (height, width), grid or blocks.spatial, video=video))
    # The stride of a convolution with padding begins at the middle of what it sees, so patches may lie half one off.
    for (steps, rows, columns), shift in itertools.product(candidates, (0.0, 0.5)):
        probes = switched(off, on, rows, columns, shift)
        found = places(entry(probes)[:, patches], rows, columns)
        if found is not None:
            order = _unless_sorted(torch.cat([rest, patches[found]]))
            layout = Layout((steps * rows, columns), steps, order, prefix, "measured")
            return _with_embedding(layout, module, call, blocks, probes, (rows, columns))
    if candidates and (grid is not None or blocks.spatial):
        steps, rows, columns = candidates[0]
        order = _unless_sorted(torch.cat([rest, patches]))
        return Layout((steps * rows, columns), steps, order, prefix, "axes" if grid is None else "assumed")
    trouble = "their places cannot be measured" if grid is None else f"grid={tuple(grid)} is not of these"
    raise CheckpointError(
        f"{type(module).__name__} cannot be observed: for images of {height} x {width} pixels it has {len(patches)} "
        f"patch tokens besides {prefix} that do not depend on the image, and {trouble}; give grid=(rows, columns), and "
        f"prefix=NUMBER if other tokens precede the patches",
        part="places of patches that cannot be measured",
    )


def switched(off: Tensor, on: Tensor, rows: int, columns: int, shift: float) -> Float[Tensor, "_ 3 H W"]:
    """The two textures, and for every bit of a patch's row and column an image of `on` where it is set, else `off`.

    Args:
        off: the first texture.
        on: the second.
        rows: of patches.
        columns: of patches.
        shift: by how many patches they lie higher and further left.
    """
    height, width = off.shape[-2:]
    images = [off, on]
    for side, num, shape in ((height, rows, (-1, 1)), (width, columns, (1, -1))):
        stride = max(side // num, 1)
        place = ((torch.arange(side, device=off.device) + int(shift * stride)) // stride).clamp_max(num - 1)
        for bit in range((num - 1).bit_length()):
            images.append(torch.where((place >> bit & 1).bool().view(shape), on, off))
    return torch.stack(images)


def places(tokens: Float[Tensor, "_ N D"], rows: int, columns: int) -> Int[Tensor, " N"] | None:
    """The order of tokens that puts patches row by row, grid after grid; None unless every place has as many.

    Args:
        tokens: of the images that `switched` made.
        rows: of the grid.
        columns: of the grid.
    """
    off, on, switched = tokens[0].float(), tokens[1].float(), tokens[2:].float()
    bits = ((switched - on).norm(dim=-1) < (switched - off).norm(dim=-1)).long().cpu()
    num, split = tokens.shape[1], (rows - 1).bit_length()
    shifts = torch.arange(len(bits))[:, None]
    shifts[split:] -= split
    row, column = ((bits << shifts)[part].sum(0) for part in (slice(split), slice(split, None)))
    cell = row * columns + column
    inside = int(row.max()) < rows and int(column.max()) < columns
    if inside and (torch.bincount(cell, minlength=rows * columns) == num // (rows * columns)).all():
        return cell.argsort(stable=True).view(rows * columns, -1).T.flatten()
    place = torch.arange(num) % (rows * columns)
    expected = torch.cat([place // columns >> shifts[:split], place % columns >> shifts[split:]]) & 1
    return torch.arange(num) if (bits == expected).float().mean(1).min() >= ENOUGH else None


def as_patches(output: Tensor, batch: int) -> Float[Tensor, "B N D"]:
    """What a convolution (`[B, D, h, w]`, `[B N, D, 1, 1]`) or a linear layer (`[..., D]`) makes of patches."""
    if output.ndim > 3:
        output = output.flatten(2).transpose(1, 2)
    return output.reshape(batch, -1, output.shape[-1])


def _changes(tokens: Tensor) -> Tensor:
    """Which tokens differ between the first image and the second, more than between two that are the same."""
    off, on, again = tokens.float()
    noise = (on - again).abs().amax(-1)
    return ((on - off).abs().amax(-1) > 1e-6 * on.abs().amax(-1) + 2 * noise).cpu()


def _unless_sorted(order: Tensor) -> Tensor | None:
    return None if torch.equal(order, torch.arange(len(order))) else order


def _grids(
    num: int, size: tuple[int, int], given: Sequence[int] | None, *, video: bool
) -> Iterator[tuple[int, int, int]]:
    """(time steps, rows, columns) of so many square patches, the likeliest first."""
    if given:
        rows, columns = given[-2:]
        steps, left = divmod(num, rows * columns)
        if steps and not left and (steps == 1 or video or len(given) == 3) and tuple(given[:-2]) in ((), (steps,)):
            yield steps, rows, columns
        return
    found: dict[tuple[int, int, int], int] = {}
    for stride in range(1, min(size) // 2 + 1):
        rows, columns = size[0] // stride, size[1] // stride
        steps, left = divmod(num, rows * columns)
        if not left and (steps == 1 or video):
            unused = size[0] % stride + size[1] % stride
            found[steps, rows, columns] = min(unused, found.get((steps, rows, columns), unused))
    yield from sorted(found, key=lambda key: (key[0], found[key]))[:NUM_TRIED]


def _rerolled(module: nn.Module, blocks: Blocks, images: Tensor, call: Call) -> Layout | None:
    """What Hiera says itself: its tokens are sorted by strides, and mixed within windows before the stage looked at."""
    reroll: Any = next((part.reroll for part in module.modules() if hasattr(part, "reroll")), None)
    number = re.search(r"\d+", blocks.paths[0])  # of the block in timm, of the stage in transformers
    if reroll is None or number is None:
        return None
    num = _captured(module, call, blocks, images[:1]).shape[1]
    laid: Tensor = reroll(torch.arange(num, dtype=torch.float32).view(1, num, 1), int(number[0]))
    return Layout((laid.shape[1], laid.shape[2]), 1, _unless_sorted(laid.flatten().long()), 0, "told")


def _captured(module: nn.Module, call: Call, blocks: Blocks, images: Tensor) -> Float[Tensor, "B T D"]:
    """The tokens that enter the first block."""
    captured: list[Tensor] = []

    def watch(_: nn.Module, args: tuple, kwargs: dict) -> None:
        x = entering(args, kwargs)
        assert x is not None
        captured.append(blocks.stream(x, len(images)))
        raise Stop

    with hooked(blocks.modules[0].register_forward_pre_hook(watch, with_kwargs=True)):
        run(call, images, type(module).__name__)
    return captured[0]


def _with_embedding(
    layout: Layout, module: nn.Module, call: Call, blocks: Blocks, probes: Tensor, grid: tuple[int, int]
) -> Layout:
    """Find the layer that embeds patches: the first whose outputs can be placed on the same grid."""
    if not blocks.first:
        return layout
    inside = {inner for block in blocks.modules for inner in block.modules()}
    outputs: dict[nn.Module, Tensor] = {}
    num_patches = layout.grid[0] * layout.grid[1]

    def watch(layer: nn.Module, args: tuple, output: object) -> None:
        out = first_tensor(output)
        if out is not None and out.ndim > 1:
            patches = as_patches(out, len(probes)) if out.shape[0] % len(probes) == 0 else out.new_empty(0, 0, 0)
            if patches.shape[1] == num_patches and layer not in outputs:
                outputs[layer] = patches

    def stop(*_: object) -> None:
        raise Stop

    layers = [m for m in module.modules() if m not in inside and isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear)]
    handles = [layer.register_forward_hook(watch) for layer in layers]
    with hooked(*handles, blocks.modules[0].register_forward_pre_hook(stop)):
        run(call, probes, type(module).__name__)
    for layer, patches in outputs.items():
        order = places(patches, *grid)
        if order is not None:
            return replace(layout, embedding=layer, embedding_order=_unless_sorted(order))
    return layout
