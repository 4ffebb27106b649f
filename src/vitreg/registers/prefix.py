"""Fixed keys and values in place of artifacts: what these gave to attention, without the tokens that gave it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.artifacts import REMOVED, Diagnosis, diagnose
from vitreg.checkpoints import from_module
from vitreg.checkpoints.state import build
from vitreg.common.progress import OnProgress
from vitreg.common.words import counted, percent
from vitreg.images import Batches, Images
from vitreg.model import VisionTransformer
from vitreg.registers.held_back import Effect, HeldBack, hold_back
from vitreg.registers.insertion import MIN_SIMILARITY, destroyed, unchanged
from vitreg.registers.neurons import RegisterNeuron
from vitreg.registers.training_free import Unit, add_test_time_registers

MAX_ROWS = 16
"""In a block; the paper has 1 to 15."""


@torch.no_grad()
def add_prefix(
    vit: VisionTransformer | nn.Module,
    images: Images,
    *,
    neurons: Iterable[RegisterNeuron | Unit] | None = None,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> VisionTransformer:
    """A copy of a model without its artifacts, whose attention has their mean keys and values as fixed rows instead.

    RegCache (arXiv 2510.04547) gives middle blocks the keys and values of attention sinks as a prefix; as artifacts are
    written by MLPs, that alone leaves them where they are. So the units that write them are silenced: their columns of
    `fc2` are zero, as in the attention bias of Jiang et al. (arXiv 2506.08010). Every block after the first of these
    units has the same 1, 2, 4, ... rows, as many as bring the pooled features of held-back images closest to the
    original's. No token is added, and no activation moved.

    Args:
        vit: the model, as for `diagnose`, with or without registers.
        images: at least 8, as for `add_test_time_registers`.
        neurons: the units to silence; those that `add_test_time_registers` chooses by default. None of them is the
            published prefix.
        batch_size: images at a time.
        on_progress: called with the number of images done and their total, pass by pass.

    Returns:
        The model with `ViTConfig.prefix_rows`. Where there is nothing to remove, no units write it, outliers stay
        or the pooled features would be changed, a copy, whose last of `config.changes` says why.

    Raises:
        ValueError: a model that has a prefix, or as `add_test_time_registers`.
    """
    vit = from_module(vit)
    if vit.config.prefix_rows:
        raise ValueError(f"{vit.config.name or 'the model'} has a prefix already; give the model it was made from")
    if neurons is None:
        found = add_test_time_registers(vit, images, batch_size=batch_size, on_progress=on_progress)
        if found.num_registers == vit.num_registers:
            return found
        units = [unit for unit in found.config.register_neurons if unit not in vit.config.register_neurons]
    else:
        units = [(n.block, n.unit) if isinstance(n, RegisterNeuron) else (int(n[0]), int(n[1])) for n in neurons]

    finding, rest = hold_back(vit, images, batch_size)
    diagnosis = diagnose(vit, finding, max_examples=0, on_progress=on_progress)
    if diagnosis.onset_block is None:
        return unchanged(vit, f"No prefix was added. {diagnosis.verdict[0]}")
    sinks = _mean_sink(vit, diagnosis, finding, on_progress)
    held_back = HeldBack(vit, diagnosis, rest)
    first = min((block for block, _ in units), default=diagnosis.onset_block) + 1
    silent = _silenced(vit, units)
    best, effect = silent, held_back.effect(silent)
    rows, chosen = 1, 0
    while rows <= MAX_ROWS and first < vit.config.depth:
        changed = _with_prefix(silent, sinks, first, rows)
        now = held_back.effect(changed)
        if chosen and now.similarity <= effect.similarity:
            break
        best, effect, chosen, rows = changed, now, rows, 2 * rows
    if reason := _refusal(effect, units):
        return unchanged(vit, f"No prefix was added. {reason}")
    blocks = ", ".join(f"{unit} of block {block}" for block, unit in sorted(units))
    said = (
        f"{counted(len(units), 'MLP unit')} silenced ({blocks}); the attention of blocks {first} to "
        f"{vit.config.depth - 1} sees the mean key and value of the outliers, {counted(chosen, 'time')}. Chosen by "
        f"{counted(held_back.num_images, 'image')} that were held back: {percent(effect.outliers)} of outliers "
        f"({percent(held_back.original)} before), mean cosine of the pooled features {effect.similarity:.3f}."
    )
    name = f"{vit.config.name or vit.config.architecture} + prefix"
    best.config = dataclasses.replace(best.config, name=name, changes=(*vit.config.changes, said))
    return best


def _mean_sink(
    vit: VisionTransformer, diagnosis: Diagnosis, batches: Batches, on_progress: OnProgress | None
) -> Float[Tensor, "L 2 H d"]:
    """Mean key and value of the outliers in every block."""
    assert diagnosis.threshold is not None
    total = torch.zeros(vit.config.depth, 2, vit.config.embed_dim, dtype=torch.float64)
    num_outliers = num_images = 0
    for batch, names in batches:
        trace = vit.trace(batch, facets=("keys", "values"))
        assert trace.keys is not None
        assert trace.values is not None
        outliers = (trace.patch_norms[diagnosis.block] >= diagnosis.threshold).flatten(1)
        for i, facet in enumerate((trace.keys, trace.values)):
            total[:, i] += facet.patches[:, outliers].sum(1, dtype=torch.float32).cpu()
        num_outliers, num_images = num_outliers + int(outliers.sum()), num_images + len(names)
        if on_progress is not None:
            on_progress(num_images, batches.total)
    return (total / num_outliers).unflatten(-1, (vit.config.num_heads, -1)).float()


def _silenced(vit: VisionTransformer, units: list[Unit]) -> VisionTransformer:
    """A copy in which these units write nothing."""
    silent = copy.deepcopy(vit)
    for block, unit in units:
        silent.get_parameter(f"blocks.{block}.mlp.fc2.weight")[:, unit] = 0
    return silent


def _with_prefix(vit: VisionTransformer, sinks: Float[Tensor, "L 2 H d"], first: int, rows: int) -> VisionTransformer:
    """A copy whose blocks from `first` on see so many equal rows."""
    blocks = range(first, vit.config.depth)
    state, like = vit.state_dict(), vit.patch_embed.weight
    state |= {f"blocks.{b}.attn.prefix": sinks[b].unsqueeze(2).repeat(1, 1, rows, 1).to(like) for b in blocks}
    config = dataclasses.replace(vit.config, prefix_rows=tuple((block, rows) for block in blocks))
    return build(config, state, "the model with a prefix").to(like.device)


def _refusal(effect: Effect, units: list[Unit]) -> str:
    """Why a prefix is not worth having; empty where it is."""
    if effect.outliers > REMOVED:
        leaves = f"With {counted(len(units), 'unit')} silenced it leaves" if units else "The published prefix leaves"
        return (
            f"{leaves} {percent(effect.outliers)} of outliers, which something else writes (mean cosine of the pooled "
            f"features {effect.similarity:.3f})."
        )
    if effect.similarity < MIN_SIMILARITY:
        return destroyed(effect.similarity)
    return ""
