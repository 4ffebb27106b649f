"""The blocks of any module that hand on a residual stream of patch tokens, found by running it once."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitreg.checkpoints.state import CheckpointError, one_line

Call = Callable[[Tensor], Any]
"""Runs a module on normalized images."""


class Stop(Exception):
    """Raised by a hook, where what follows is not needed."""


@dataclass(frozen=True)
class Blocks:
    """Modules that run one after the other on tokens of one shape.

    Attributes:
        paths: of the blocks in the module.
        modules: the blocks.
        width: channels of a token.
        out_of: how many modules their container has.
        sequence_first: whether the batch is the second axis (`[tokens, batch, width]`).
        spatial: whether tokens have axes of their own (`[batch, rows, columns, width]`), and how long these are.
        first: whether no other blocks with tokens run before them.
    """

    paths: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    width: int
    out_of: int
    sequence_first: bool = False
    spatial: tuple[int, ...] = ()
    first: bool = True

    def stream(self, x: Tensor, batch: int) -> Tensor:
        """Tokens as `[B, T, D]`, whatever axes the module gives them: windows, packed sequences, rows and columns."""
        if self.sequence_first:
            x = x.transpose(0, 1)
        return x.reshape(batch, -1, x.shape[-1])


@dataclass
class _Seen:
    """What hooks saw of one module."""

    calls: int = 0
    entered: tuple[tuple[int, ...], ...] = ()
    left: tuple[int, ...] = ()
    order: int = 0


def first_tensor(value: Any) -> Tensor | None:
    """What a block returns, without what comes along (attention weights, caches)."""
    if isinstance(value, Tensor):
        return value
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((one for one in values if isinstance(one, Tensor)), None)


def entering(args: Sequence[Any], kwargs: dict[str, Any], shape: Sequence[int] | None = None) -> Tensor | None:
    """The tokens that a block is called with: the first floating tensor, of this shape where one is given."""
    for one in (*args, *kwargs.values()):
        if isinstance(one, Tensor) and one.is_floating_point() and (shape is None or one.shape == shape):
            return one
    return None


@contextlib.contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Removes hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(call: Call, images: Tensor, subject: str) -> None:
    """Call a module on images, to the end or to a `Stop`.

    Raises:
        CheckpointError: it cannot be called so.
    """
    try:
        call(images)
    except Stop:
        pass
    except (
        AssertionError,
        AttributeError,
        IndexError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        size = " x ".join(map(str, images.shape[-2:]))
        raise CheckpointError(
            f"{subject} does not run on images of {size} pixels ({one_line(error)[:200]}); what is observed takes "
            f"images [B, 3, H, W], and `preprocess=` says of which size",
            part=f"does not run on images alone: {one_line(error)[:120]}",
        ) from error


def find_blocks(module: nn.Module, call: Call, images: Tensor, blocks: str | Sequence[nn.Module] | None) -> Blocks:
    """The longest run of modules of one class that enter and leave with tokens of the same shape.

    Args:
        module: to look into.
        call: runs it.
        images: three of them, a number that is unlikely to be one of tokens.
        blocks: the container to take them from, by its path, or the modules themselves; by default any.

    Raises:
        CheckpointError: there is no such run.
    """
    subject = type(module).__name__
    containers = _containers(module, blocks)
    seen = {child: _Seen() for _, children in containers for _, child in children}
    clock = itertools.count(1)

    def enter(child: nn.Module, _: object) -> None:
        seen[child].order = next(clock)

    def leave(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found, out = seen[child], first_tensor(output)
        found.calls += 1
        found.left = () if out is None else tuple(out.shape)
        found.entered = tuple(tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor))

    begins = [child.register_forward_pre_hook(enter) for child in seen]
    with hooked(*begins, *(child.register_forward_hook(leave, with_kwargs=True) for child in seen)):
        run(call, images, subject)
    of_tokens = {child: found for child, found in seen.items() if _hands_on_tokens(child, found, len(images))}
    earliest = min(of_tokens, key=lambda child: of_tokens[child].order, default=None)
    runs = [
        dataclasses.replace(one, first=earliest in one.modules)
        for _, children in containers
        for one in _runs(children, of_tokens, len(images), named=blocks is not None)
        if len(one.modules) > 1 or blocks is not None
    ]
    if not runs:
        where = f"blocks={blocks!r}" if isinstance(blocks, str) else "the blocks given" if blocks else "it"
        raise CheckpointError(
            f"{subject} cannot be observed: {where} has no blocks that hand on patch tokens ([B, tokens, width] or "
            f"[B, rows, columns, width]) of one shape; if it has, name their ModuleList, as in blocks='encoder.layers'",
            part="no blocks that hand on patch tokens of one shape",
        )
    return max(runs, key=lambda one: len(one.modules))


def _containers(
    module: nn.Module, blocks: str | Sequence[nn.Module] | None
) -> list[tuple[str, list[tuple[str, nn.Module]]]]:
    paths = {child: path for path, child in module.named_modules()}
    if isinstance(blocks, str):
        try:
            container = module.get_submodule(blocks)
        except AttributeError:
            raise CheckpointError(f"{type(module).__name__} has no module {blocks!r} to take blocks from") from None
        return [(blocks, [(f"{blocks}.{name}", child) for name, child in container.named_children()])]
    if blocks is not None:
        if missing := [one for one in blocks if one not in paths]:
            kind = type(module).__name__
            raise CheckpointError(f"{len(missing)} of the {len(blocks)} blocks given are no modules of this {kind}")
        return [("", [(paths[one], one) for one in blocks])]
    return [
        (path, [(f"{path}.{name}".lstrip("."), child) for name, child in container.named_children()])
        for path, container in module.named_modules()
        if isinstance(container, nn.ModuleList | nn.Sequential) and len(container) > 1
    ]


def _runs(
    children: list[tuple[str, nn.Module]], of_tokens: dict[nn.Module, _Seen], batch: int, *, named: bool
) -> Iterator[Blocks]:
    """Neighbors in a container that run in this order with tokens of one shape."""
    groups: list[list[tuple[str, nn.Module]]] = []
    last: tuple[Any, ...] | None = None
    for name, child in children:
        if (found := of_tokens.get(child)) is None:
            last = None
            continue
        kind = (None if named else type(child), found.left)
        if kind != last or found.order < of_tokens[groups[-1][-1][1]].order:
            groups.append([])
        groups[-1].append((name, child))
        last = kind
    for group in groups:
        shape = of_tokens[group[0][1]].left
        yield Blocks(
            tuple(name for name, _ in group),
            tuple(child for _, child in group),
            shape[-1],
            len(children),
            sequence_first=len(shape) == 3 and shape[1] == batch != shape[0],
            spatial=shape[1:-1] if len(shape) > 3 and shape[0] == batch else (),
        )


def _hands_on_tokens(block: nn.Module, found: _Seen, batch: int) -> bool:
    """Whether a module of parts ran once, and left the shape of its tokens as it was.

    The last axis of tokens is the width of layers, which that of images of features is not.
    """
    shape = found.left
    if found.calls != 1 or shape not in found.entered or not any(block.children()) or len(shape) < 2:
        return False
    num_tokens = torch.Size(shape[:-1]).numel()
    if num_tokens <= batch or num_tokens % batch:
        return False
    linear = any(getattr(layer, "in_features", None) == shape[-1] for layer in block.modules())
    return linear or any(p.ndim == 1 and p.shape[0] == shape[-1] for p in block.parameters())
