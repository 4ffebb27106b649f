"""Registers without training: the activations that write artifacts are moved to a token of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import nn

from vitreg.artifacts import REMOVED, Diagnosis, diagnose
from vitreg.checkpoints import from_module
from vitreg.common.progress import OnProgress
from vitreg.common.words import counted, percent
from vitreg.images import Batches, Images
from vitreg.model import VisionTransformer
from vitreg.registers.held_back import HELD_BACK_EVERY, Effect, HeldBack, hold_back
from vitreg.registers.insertion import unchanged, with_registers
from vitreg.registers.neurons import RegisterNeuron, find_register_neurons

Unit = tuple[int, int]

MIN_IMAGES = 8
"""Fewer tell neither which units write the artifacts nor whether moving them helps."""

MARGIN = 0.1
"""Features must come so much closer, as a part of the distance, for more units to be moved than the fewest."""

MAX_ROUNDS = 4
"""Moved artifacts may uncover others, written by later blocks; each round looks for the units of one more onset."""


def add_test_time_registers(
    vit: VisionTransformer | nn.Module,
    images: Images | None = None,
    *,
    count: int = 1,
    neurons: Iterable[RegisterNeuron | Unit] | None = None,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> VisionTransformer:
    """A copy of a model whose artifacts are moved into registers; nothing is trained, the original is left untouched.

    "Vision Transformers Don't Need Trained Registers" (Jiang et al., arXiv 2506.08010): a few hidden units of the MLPs
    write the artifacts. In every image, the strongest activation of each such unit over all tokens goes to the new
    registers, and zero to every other token (Algorithm 2, here per image and per unit). The registers start from zero
    and have no position; they need not differ, as they are not trained.

    Registers in all blocks, as published, draw attention before they hold anything. Those that are found here enter
    before the first block that has such a unit (`ViTConfig.register_start`): up to there the model is the original.

    Without `neurons`, units are ranked on four fifths of the images (`find_register_neurons`) and the smallest
    number of the first of them is taken that leaves at most 0.01 % of outliers, after any block, in the fifth that
    was held back; or up to twice as many, where the pooled features stay more than a tenth closer to the
    original's; or more, until those that ranked have none left either, as a fifth of few images cannot tell so
    little. If no number removes them, the best is kept and the search repeated on the changed model. Then attention
    counts the registers 1, 2, 3, 4, 6, 9, ... times (`ViTConfig.register_weight`), as long as that brings the
    pooled features closer: one register replaces several artifacts, each of which had its share in the softmax.
    `config.changes` says what was chosen.

    Args:
        vit: the model, with or without registers of its own, as for `diagnose`.
        images: at least 8, as for `diagnose`; not needed with `neurons`. An iterable must give the same images each
            time.
        count: registers to add.
        neurons: the units to move, as (block, unit) or `RegisterNeuron`; found in the images by default. With these,
            the model is exactly that of the paper: registers count once, and in all blocks.
        batch_size: images at a time.
        on_progress: called while units are looked for, with the number of images done and their total.

    Returns:
        The model with `count` more registers. Where there is nothing to remove, or no units remove any of it, a copy
        with as many as before, whose last of `config.changes` says why.

    Raises:
        ValueError: `count` below 1, fewer than 8 images or too few to tell whether there are artifacts, images that can
            be gone through only once, units that the model does not have.
    """
    vit = from_module(vit)
    if count < 1:
        raise ValueError(f"count is {count}; add at least 1 register")
    if neurons is not None:
        units = [(n.block, n.unit) if isinstance(n, RegisterNeuron) else (int(n[0]), int(n[1])) for n in neurons]
        units = list(dict.fromkeys(units))
        if not units:
            raise ValueError("neurons is empty; leave it out to have them found in the images")
        return _moved(vit, units, count, start=0, said="They were given, not chosen.")
    if images is None:
        raise ValueError("images are needed to find the units that write the artifacts; or give neurons")
    return _search(vit, images, count, batch_size, on_progress)


def _search(
    vit: VisionTransformer, images: Images, count: int, batch_size: int, on_progress: OnProgress | None
) -> VisionTransformer:
    """Choose units and weight by the images, and move."""
    finding, rest = hold_back(vit, images, batch_size)
    diagnosis = diagnose(vit, finding, max_examples=0, on_progress=on_progress)
    if diagnosis.num_images < MIN_IMAGES - MIN_IMAGES // HELD_BACK_EVERY:
        num_images = diagnosis.num_images + sum(len(names) for _, names in rest)
        raise ValueError(
            f"{counted(num_images, 'image')} cannot tell which units write artifacts; give at least {MIN_IMAGES}, "
            f"better 100"
        )
    if diagnosis.undecided is not None:
        needed = math.ceil(diagnosis.undecided.num_images_needed * HELD_BACK_EVERY / (HELD_BACK_EVERY - 1))
        raise ValueError(
            f"{diagnosis.verdict[0].partition('; give')[0]}; give at least {needed}, one in {HELD_BACK_EVERY} of which "
            f"is held back"
        )
    if not diagnosis.has_artifacts:
        return unchanged(vit, f"No register was added. {diagnosis.verdict[0]}")
    held_back = HeldBack(vit, diagnosis, rest)
    units, num_ranked = _choose_units(vit, finding, diagnosis, held_back, count, on_progress)
    if not units:
        return unchanged(
            vit,
            f"No register was added. Moving up to {num_ranked} MLP units of blocks 0 to {diagnosis.onset_block} "
            f"removes no outliers, so something else writes them. Use a checkpoint trained with registers.",
        )
    weight, effect = _choose_weight(vit, units, count, held_back, diagnosis)
    they_are, leave = ("It is", "leaves") if len(units) == 1 else ("They are", "leave")
    said = (
        f"{they_are} the first of {num_ranked}, ranked on {diagnosis.num_images} images by what they add to outliers, "
        f"and {leave} {percent(effect.outliers)} of outliers in {counted(held_back.num_images, 'other')} "
        f"({percent(held_back.original)} before)."
    )
    if weight > 1:
        said += (
            f" In attention a register counts {weight} times, which keeps the pooled feature closest to the original "
            f"(mean cosine {effect.similarity:.3f})."
        )
    return _moved(vit, units, count, weight, said=said)


def _choose_units(
    vit: VisionTransformer,
    finding: Batches,
    diagnosis: Diagnosis,
    held_back: HeldBack,
    count: int,
    on_progress: OnProgress | None,
) -> tuple[list[Unit], int]:
    """The units to move, and how many were ranked to choose from."""
    chosen: list[Unit] = []
    original = diagnosis
    worst, left = held_back.original, held_back.mean_original
    current, num_ranked = vit, 0
    for _ in range(MAX_ROUNDS):
        found = find_register_neurons(current, finding, diagnosis=diagnosis, on_progress=on_progress)
        ranked = chosen + [(n.block, n.unit) for n in found if (n.block, n.unit) not in chosen]
        num_ranked += len(ranked) - len(chosen)

        @cache
        def effect(k: int, ranked: tuple[Unit, ...] = tuple(ranked)) -> Effect:
            return held_back.effect(_moved(vit, list(ranked[:k]), count) if k else vit)

        k = _fewest(effect, len(chosen), len(ranked))
        if effect(k).mean_outliers >= left:
            break  # these units write nothing of what is left
        if effect(k).outliers <= REMOVED:
            k, seen = _closest(effect, k, len(ranked)), HeldBack(vit, original, finding)
            # A fifth of few images cannot tell 0.01 % from none: those that ranked must have none left either.
            more = (
                k + extra for extra in (0, *(2**i for i in range(len(ranked).bit_length()))) if k + extra <= len(ranked)
            )
            clean = (n for n in more if seen.effect(_moved(vit, ranked[:n], count)).outliers <= REMOVED)
            return ranked[: next(clean, k)], num_ranked
        chosen, worst, left = ranked[:k], effect(k).outliers, effect(k).mean_outliers
        current = _moved(vit, chosen, count)
        diagnosis = diagnose(current, finding, max_examples=0, on_progress=on_progress)
    return (chosen if worst < held_back.original else []), num_ranked


def _fewest(effect: Callable[[int], Effect], low: int, most: int) -> int:
    """The smallest number above `low` that removes the outliers; where none does, the one that leaves the fewest."""
    sizes = [low + 2**i for i in range((most - low).bit_length()) if low + 2**i < most] + [most]
    for high in sizes:
        if effect(high).outliers <= REMOVED:
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if effect(middle).outliers <= REMOVED else (middle, high)
            return high
        low = high
    return min(sizes, key=lambda k: (effect(k).mean_outliers, k))


def _closest(effect: Callable[[int], Effect], fewest: int, most: int) -> int:
    """From the smallest number that removes the outliers to about twice that, the one that changes the model least.

    A unit that prepares artifacts in an earlier block leaves something behind when only those that complete them move.
    More than `MARGIN` must be gained over a smaller number.
    """
    sizes = [fewest] + [fewest + 2**i for i in range(fewest.bit_length() + 1)]
    sizes = [k for k in sizes if k <= most and effect(k).outliers <= REMOVED]
    distances = [max(0.0, 1 - effect(k).similarity) for k in sizes]  # rounding may leave a cosine above 1
    return next(k for k, d in zip(sizes, distances, strict=True) if d <= (1 + MARGIN) * min(distances))


def _choose_weight(
    vit: VisionTransformer, units: list[Unit], count: int, held_back: HeldBack, diagnosis: Diagnosis
) -> tuple[int, Effect]:
    """How often attention should count a register, raised while the pooled features come closer, and the effect."""
    weight = vit.config.register_weight
    outliers_per_image = diagnosis.outlier_fraction * diagnosis.num_patches / diagnosis.num_images
    best = held_back.effect(_moved(vit, units, count, weight))
    while weight * count < outliers_per_image:
        more = weight + max(1, weight // 2)
        effect = held_back.effect(_moved(vit, units, count, more))
        if effect.similarity <= best.similarity or effect.outliers > max(best.outliers, REMOVED):
            break
        weight, best = more, effect
    return weight, best


def _moved(
    vit: VisionTransformer,
    units: list[Unit],
    count: int,
    weight: int | None = None,
    *,
    start: int | None = None,
    said: str = "",
) -> VisionTransformer:
    """The model with so many more test-time registers that receive what these units do, from their first block on."""
    config = vit.config
    neurons = tuple(dict.fromkeys((*config.register_neurons, *units)))
    if start is None:
        start = min(block for block, _ in neurons)
    if config.num_test_time_registers:  # it has some that must not enter later than they do
        start = min(start, config.register_start)
    them = "it" if count == 1 else "each of them"
    text = f"{counted(count, 'test-time register')} added"
    if vit.num_registers:
        text += f" beside the {vit.num_registers} that the model had"
    text += f"; the activations of {_listed(units)} are moved to {them}. {said}"
    return with_registers(
        vit,
        torch.zeros(count, config.embed_dim),
        vit.num_registers,
        num_test_time_registers=config.num_test_time_registers + count,
        register_neurons=neurons,
        register_weight=weight or config.register_weight,
        register_start=start,
        name=f"{config.name or config.architecture} + {counted(count, 'test-time register')}",
        changes=(*config.changes, text.strip()),
    )


def _listed(units: list[Unit]) -> str:
    """The units in words, block by block."""
    blocks = sorted({block for block, _ in units})
    in_blocks = [f"block {block}: " + ", ".join(str(unit) for b, unit in units if b == block) for block in blocks]
    noun = "MLP unit" if len(units) == 1 else "MLP units"
    return f"{len(units)} {noun} ({'; '.join(in_blocks)})"
