"""A test-time fix as plain weights: ordinary registers on which the register neurons fire by themselves."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.artifacts import REMOVED
from vitreg.checkpoints.state import build
from vitreg.common.devices import precise
from vitreg.common.modes import evaluating
from vitreg.common.progress import OnProgress
from vitreg.common.words import counted, percent
from vitreg.images import Batches, Images
from vitreg.model import Block, VisionTransformer
from vitreg.model.block import Mlp
from vitreg.registers.detectors import teach
from vitreg.registers.held_back import HELD_BACK_EVERY
from vitreg.registers.training_free import MIN_IMAGES

MOST_IMAGES = 200
"""They are kept in memory, and so is what enters the MLPs of a block."""

TOKENS_KEPT = 256
"""Of an image, about so many at most are told from the registers."""

SHIFTS = (0.0, 0.25)
"""Lengths, in median norms, of what is added to the registers in a direction that other tokens do not have. The second
is for registers that cannot be told from other tokens as they are; it changes what these read from registers."""

SIMILAR = 0.99
"""From this cosine with the fixed model on, and without new outliers, no other shift is tried."""

MOST_OUTLIERS, LEAST_SIMILARITY = 0.005, 0.9
"""With more new outliers, or farther from the fixed model, the model is not returned."""

AS_IT_IS = "vitreg.install_registers and vitreg.export take the fix as it is"


def bake_registers(
    fixed: VisionTransformer,
    images: Images,
    *,
    count: int | None = None,
    batch_size: int = 16,
    on_progress: OnProgress | None = None,
) -> VisionTransformer:
    """A test-time fix as an ordinary register model, which timm and transformers run without vitreg.

    The registers are copies of the test-time one. What the register neurons' rows of `fc1` have to do is then linear in
    what enters them: to be on registers what the fix moves there, image by image, and below zero on every other token.
    Ridge regression with a hinge finds these rows (`teach`), block after block, so that later ones read registers that
    earlier ones have filled. Where registers cannot be told from other tokens so, they are moved in the direction
    that other tokens have least of. All other weights stay as they are; no labels are used.

    There are as many as attention counts in the fixed model, so that all is as there up to the first register neuron.
    With another `count` the registers have another share of the attention.

    Args:
        fixed: what `add_test_time_registers` returned; it is left untouched.
        images: at least 8, better 100, as for `diagnose`; of more than 200, so many at equal distances are used. Every
            fifth judges the result.
        count: registers in place of the test-time ones; by default the number of these times
            `ViTConfig.register_weight`.
        batch_size: images at a time. `torch.autocast` around the call is obeyed.
        on_progress: called with the number of blocks whose rows are fitted.

    Returns:
        The model without `register_neurons`. `config.changes` says how close it is.

    Raises:
        ValueError: `count` below 1, a model without register neurons, or whose MLPs have a norm or no biases, fewer
            than 8 images, or a model whose registers no rows can tell from its other tokens.
    """
    count = fixed.config.num_test_time_registers * fixed.config.register_weight if count is None else count
    _check(fixed, count)
    device = fixed.patch_embed.weight.device
    batches = Batches(images, fixed.preprocess, batch_size=batch_size, device=device, limit=MOST_IMAGES)
    taught, held_back = _divided([image for batch, _ in batches for image in batch], batch_size)
    neurons = {
        number: block.mlp.register_neurons
        for number, block in enumerate(fixed.blocks)
        if isinstance(block, Block) and block.mlp.register_neurons is not None
    }
    done = itertools.count(1)
    found: list[tuple[_Judged, VisionTransformer]] = []
    with evaluating(fixed), torch.no_grad():
        moved = _moved(fixed, neurons, taught)
        for shift in SHIFTS:
            baked = _with_ordinary_registers(fixed, count)
            if shift:
                assert baked.registers is not None
                baked.registers[:, -count:] += shift * _unused_direction(baked, min(neurons), count, taught)
            for block, units in neurons.items():
                mlp = _mlp(baked, block)
                on, off = _entering(baked, block, mlp, count, taught)
                teach(mlp, units, on, off, moved[block].repeat_interleave(count, 0))
                if on_progress is not None:
                    on_progress(next(done), None)
            judged = _judge(baked, fixed, held_back)
            found.append((judged, baked))
            if judged.outliers == 0 and judged.similarity >= SIMILAR:
                break
    judged, baked = min(found, key=lambda one: (one[0].outliers > REMOVED, -one[0].similarity))
    return _finished(baked, fixed, count, judged, sum(map(len, taught)), sum(map(len, held_back)))


def _check(fixed: VisionTransformer, count: int) -> None:
    config = fixed.config
    if not config.register_neurons:
        raise ValueError(
            f"{_name(fixed)} has no register neurons to bake; give a model that add_test_time_registers moved "
            f"artifacts of"
        )
    if count < 1:
        raise ValueError(f"count is {count}; bake at least 1 register")
    if config.mlp_norm or not config.mlp_bias:
        has = "a norm in its MLPs" if config.mlp_norm else "no biases in its MLPs"
        raise ValueError(f"{_name(fixed)} has {has}, so it cannot be baked; {AS_IT_IS}")


def _name(vit: VisionTransformer) -> str:
    return vit.config.name or vit.config.architecture or "the model"


def _divided(images: list[Tensor], batch_size: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Batches to teach with, and batches that are held back."""
    if len(images) < MIN_IMAGES:
        raise ValueError(
            f"{counted(len(images), 'image')} cannot teach the register neurons; give at least {MIN_IMAGES}, better 100"
        )
    held_back = images[HELD_BACK_EVERY - 1 :: HELD_BACK_EVERY]
    del images[HELD_BACK_EVERY - 1 :: HELD_BACK_EVERY]
    return torch.stack(images).split(batch_size), torch.stack(held_back).split(batch_size)


def _with_ordinary_registers(fixed: VisionTransformer, count: int) -> VisionTransformer:
    """The model with copies of its test-time registers in their place, to which nothing is moved."""
    config = fixed.config
    trained = config.num_registers - config.num_test_time_registers
    state = fixed.state_dict()
    number = torch.arange(count, device=state["registers"].device) % config.num_test_time_registers
    state["registers"] = torch.cat([state["registers"][:, :trained], state["registers"][:, trained:][:, number]], dim=1)
    plain = dataclasses.replace(
        config,
        num_registers=trained + count,
        num_test_time_registers=0,
        register_neurons=(),
        register_weight=1,
        register_start=0,
    )
    return build(plain, state, "the model with ordinary registers")


def _mlp(vit: VisionTransformer, block: int) -> Mlp:
    found = vit.blocks[block]
    assert isinstance(found, Block)
    return found.mlp


def _inputs(
    vit: VisionTransformer, depth: int, parts: Sequence[nn.Module], batches: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """What enters parts of the first blocks, which alone are run, batch by batch."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(part: nn.Module, args: tuple[Any, ...]) -> None:
        seen[part] = args[0]

    with ExitStack() as undo:
        for part in parts:
            undo.callback(part.register_forward_pre_hook(keep).remove)
        undo.callback(setattr, vit, "blocks", vit.blocks)
        vit.blocks = vit.blocks[:depth]
        for batch in batches:
            vit(batch)
            yield [seen[part] for part in parts]


def _moved(
    fixed: VisionTransformer, neurons: Mapping[int, Tensor], batches: Sequence[Tensor]
) -> dict[int, Float[Tensor, "images _"]]:
    """What the fix moves to its registers in each image, for the register neurons of each block."""
    register = fixed.config.test_time_registers.start
    found: dict[int, list[Tensor]] = {block: [] for block in neurons}
    for inputs in _inputs(fixed, max(neurons) + 1, [_mlp(fixed, block).fc2 for block in neurons], batches):
        for (block, units), hidden in zip(neurons.items(), inputs, strict=True):
            found[block].append(hidden[:, register, units].float())
    return {block: torch.cat(of_block) for block, of_block in found.items()}


def _entering(
    baked: VisionTransformer, block: int, part: nn.Module, count: int, batches: Sequence[Tensor]
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "M D"]]:
    """The new registers, image by image, and other tokens, as they enter a part of a block."""
    last = baked.config.num_prefix_tokens
    registers: list[Tensor] = []
    others: list[Tensor] = []
    for (tokens,) in _inputs(baked, block + 1, [part], batches):
        tokens = tokens.float()
        registers.append(tokens[:, last - count : last].flatten(0, 1))
        rest = torch.cat([tokens[:, : last - count], tokens[:, last:]], dim=1)
        step = math.ceil(rest.shape[1] / TOKENS_KEPT)
        # Not everywhere the same places: artifacts may have theirs.
        others += [of_image[number % step :: step] for number, of_image in enumerate(rest)]
    return torch.cat(registers), torch.cat(others)


def _unused_direction(
    baked: VisionTransformer, block: int, count: int, batches: Sequence[Tensor]
) -> Float[Tensor, " D"]:
    """The direction in which tokens entering a block are shortest for their norm; its length is their median norm."""
    _, tokens = _entering(baked, block, baked.blocks[block], count, batches)
    centered = (tokens - tokens.mean(1, keepdim=True)).to(precise(tokens.device))
    products = F.normalize(centered, dim=1)
    products = products.T @ products
    products += products.trace() / len(products)  # not the mean of the channels, which the norm before the MLP removes
    shortest = torch.linalg.eigh(products).eigenvectors[:, 0]
    return (shortest * centered.norm(dim=1).median()).to(tokens)


@dataclass(frozen=True)
class _Judged:
    """How far a model is from the fixed one, on images that it was not taught with.

    Attributes:
        cls, patches: mean cosine of class tokens and of patches, as the model returns them.
        outliers: share of the patches whose norm after some block is above all of the fixed model's there and above
            twice their 99th percentile.
    """

    cls: float | None
    patches: float
    outliers: float

    @property
    def similarity(self) -> float:
        """The lower cosine."""
        return self.patches if self.cls is None else min(self.cls, self.patches)


def _judge(baked: VisionTransformer, fixed: VisionTransformer, held_back: Sequence[Tensor]) -> _Judged:
    cosines: dict[str, list[Tensor]] = {"cls": [], "patches": []}
    norms: list[Tensor] = []
    for images in held_back:
        ours, theirs = baked.trace(images), fixed.trace(images)
        for name, of_kind in cosines.items():
            x, y = getattr(ours.tokens, name), getattr(theirs.tokens, name)
            if x is not None:
                of_kind.append(F.cosine_similarity(x.float(), y.float(), dim=-1).flatten())
        norms.append(torch.stack([ours.patch_norms.flatten(1), theirs.patch_norms.flatten(1)]).float())
    new, old = torch.cat(norms, dim=2)
    p99 = old.kthvalue(math.ceil(0.99 * old.shape[1]), dim=1).values
    above = new > torch.maximum(2 * p99, old.amax(1))[:, None]
    cls, patches = (float(torch.cat(of_kind).mean()) if of_kind else None for of_kind in cosines.values())
    assert patches is not None
    return _Judged(cls, patches, float(above.float().mean(1).max()))


def _finished(
    baked: VisionTransformer, fixed: VisionTransformer, count: int, judged: _Judged, num_images: int, num_held_back: int
) -> VisionTransformer:
    """The model with a sentence of what was done, trainable where the fixed one is."""
    config = fixed.config
    fitted = (
        f"the rows of {counted(len(config.register_neurons), 'MLP unit')} were fitted on {counted(num_images, 'image')}"
    )
    similar = f"patches {judged.patches:.3f}" + ("" if judged.cls is None else f", class token {judged.cls:.3f}")
    result = (
        f"on {counted(num_held_back, 'other')} the mean cosine with the model before is: {similar}; "
        f"{percent(judged.outliers)} of the patches are new outliers."
    )
    if judged.outliers > MOST_OUTLIERS or not judged.similarity >= LEAST_SIMILARITY:
        raise ValueError(
            f"the register neurons of {_name(fixed)} cannot be taught to fire on registers alone: {fitted}, and "
            f"{result} Give more images; {AS_IT_IS}"
        )
    said = (
        f"The {counted(config.num_test_time_registers, 'test-time register')} became {counted(count, 'ordinary one')}; "
        f"{fitted} to fire on registers alone. O{result[1:]}"
    )
    base = config.name.partition(" + ")[0] or config.architecture
    baked.config = dataclasses.replace(
        baked.config, name=f"{base} + {counted(count, 'baked register')}", changes=(*config.changes, said)
    )
    for name, parameter in fixed.named_parameters():
        baked.get_parameter(name).requires_grad_(parameter.requires_grad)
    return baked
