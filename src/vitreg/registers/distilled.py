"""Registers by self-distillation: a model learns its own features, with what moves with the image kept."""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.artifacts import diagnose
from vitreg.checkpoints import from_module
from vitreg.common.progress import OnProgress
from vitreg.common.words import counted, percent
from vitreg.images import Batches, Images
from vitreg.model import Tokens, VisionTransformer
from vitreg.registers.held_back import HeldBack, hold_back
from vitreg.registers.insertion import unchanged
from vitreg.registers.trainable import add_registers

SHIFT = 0.15
"""Of the grid's sides, the farthest that a view is shifted."""

RATE, LAST_RATE, DECAY = 1e-4, 5e-6, 1e-2
"""The paper's AdamW: learning rate at the start and at the end, weight decay."""

TRAINED = ("registers", "pos_embed", "patch_embed.")
"""What is trained besides the last block."""


def distill_registers(
    vit: VisionTransformer | nn.Module,
    images: Images,
    *,
    count: int = 4,
    num_views: int = 10,
    num_steps: int = 1000,
    batch_size: int = 8,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> VisionTransformer:
    """A copy of a model with registers, trained to give the model's own features but what does not follow the image.

    PH-Reg (arXiv 2505.21501): targets are means over views that are shifted by whole patches and flipped, moved back to
    where their patches were, where they are valid (C-RADIOv4, arXiv 2601.17237: artifacts stay in place or move with
    neither). Registers, position and patch embedding and the last block are trained, by one minus the cosine and the
    squared error of the patches after the final norm. Here the class token is held to the model's own in the same way.

    Views are run one after the other, so that memory does not grow with their number. A step costs about as much as
    `batch_size * (num_views + 4)` images.

    Args:
        vit: the model, as for `diagnose`.
        images: at least 10, better thousands, as for `diagnose`; gone through as often as needed.
        count: registers to add; 0 to train without, on the same targets.
        num_views: of an image; 1 to train registers on the model's features as they are.
        num_steps: of gradient descent, a batch each.
        batch_size: images at a time.
        seed: of registers and views.
        on_progress: called with the number of steps done and their total.

    Returns:
        The trained model. A model without artifacts is returned as a copy, whose last of `config.changes` says so.

    Raises:
        ValueError: a number below its least, images that can be gone through only once, or as of `diagnose`.
    """
    for name, value, least in (("count", count, 0), ("num_views", num_views, 1), ("num_steps", num_steps, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; give at least {least}")
    vit = from_module(vit)

    batches, rest = hold_back(vit, images, batch_size)
    diagnosis = diagnose(vit, batches, max_examples=0)
    if not diagnosis.has_artifacts:
        return unchanged(vit, f"Nothing was distilled. {diagnosis.verdict[0]}")
    held_back = HeldBack(vit, diagnosis, rest)
    teacher = copy.deepcopy(vit).eval().requires_grad_(False)
    student = add_registers(vit, count, seed=seed) if count else copy.deepcopy(vit)
    _train(student.float(), teacher.float(), batches, num_views, num_steps, seed, on_progress)
    student = student.to(vit.patch_embed.weight.dtype)
    effect = held_back.effect(student)
    said = (
        f"{counted(count, 'register')} added, and trained with embeddings and the last block in "
        f"{counted(num_steps, 'step')} on the model's own features, means of {counted(num_views, 'shifted view')}. In "
        f"{counted(held_back.num_images, 'image')} that were held back {percent(effect.outliers)} of outliers are left "
        f"({percent(held_back.original)} before); mean cosine of the pooled features {effect.similarity:.3f}."
    )
    name = f"{vit.config.name or vit.config.architecture} + {counted(count, 'distilled register')}"
    student.config = dataclasses.replace(student.config, name=name, changes=(*vit.config.changes, said))
    return student


def _train(
    student: VisionTransformer,
    teacher: VisionTransformer,
    batches: Batches,
    num_views: int,
    num_steps: int,
    seed: int,
    on_progress: OnProgress | None,
) -> None:
    """Change the student in place."""
    generator = torch.Generator().manual_seed(seed)
    trained = (*TRAINED, f"blocks.{student.config.depth - 1}.")
    frozen = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (LAST_RATE / RATE) ** (1 / num_steps))
    step = 0
    while step < num_steps:
        for batch, _ in batches:
            target = mean_of_views(teacher, batch, num_views, generator)
            tokens = student(batch)
            loss = _distance(tokens.patches, target.patches)
            if tokens.cls is not None and target.cls is not None:
                loss = loss + _distance(tokens.cls, target.cls)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if on_progress is not None:
                on_progress(step, num_steps)
            if step == num_steps:
                break
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(frozen[name])


@torch.no_grad()
def mean_of_views(
    vit: VisionTransformer, images: Float[Tensor, "B 3 H W"], num_views: int, generator: torch.Generator
) -> Tokens:
    """A model's tokens, of which the patches are means over the image itself and shifted and flipped views of it.

    A view is shifted by whole patches; what comes in from outside of the image is of its mean color, and is left out.
    """
    tokens, patch = vit(images), vit.config.patch_size
    total = tokens.patch_map()
    valid = torch.ones_like(total[:1, :1])
    reach = torch.tensor([max(1, round(SHIFT * side)) for side in tokens.grid])
    for _ in range(num_views - 1):
        rows, columns = ((2 * torch.rand(2, generator=generator) - 1) * reach).round().int().tolist()
        flipped = bool(torch.rand((), generator=generator) < 0.5)
        view = F.pad(images, (patch * columns, -patch * columns, patch * rows, -patch * rows))
        seen = vit(view.flip(-1) if flipped else view).patch_map()
        seen = seen.flip(-1) if flipped else seen
        back = (-columns, columns, -rows, rows)
        total = total + F.pad(seen, back)
        valid = valid + F.pad(torch.ones_like(valid), back)
    return dataclasses.replace(tokens, patches=(total / valid).flatten(2).mT)


def _distance(found: Float[Tensor, "*B D"], wanted: Float[Tensor, "*B D"]) -> Float[Tensor, ""]:
    """One minus the cosine, and the squared error in that of the wanted."""
    return 1 - F.cosine_similarity(found, wanted, dim=-1).mean() + F.mse_loss(found, wanted) / wanted.square().mean()
