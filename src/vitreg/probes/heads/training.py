"""The one loop that heads are trained in, and what their trainings share: order of the rows, rate, gradient step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from vitreg.common.progress import OnProgress

Batch = TypeVar("Batch")


def fit(
    epochs: Iterable[Iterable[Batch]],
    step: Callable[[Batch], None],
    num_epochs: int,
    *,
    done: int = 0,
    ends: Callable[[int], bool] = lambda epoch: False,
    on_progress: OnProgress | None = None,
) -> None:
    """Take a step on every batch of every epoch; where training is counted in steps, an epoch is one batch.

    Args:
        epochs: those that are left.
        step: changes the heads.
        num_epochs: in all.
        done: epochs of an earlier run.
        ends: called after every epoch with its number, from 1; keeps what must be kept, and says whether to stop early.
        on_progress: called after that with epochs done and their total; an interruption in it loses nothing.
    """
    for epoch, batches in enumerate(epochs, done + 1):
        for batch in batches:
            step(batch)
        ended = ends(epoch)
        if on_progress is not None:
            on_progress(epoch, num_epochs)
        if ended:
            break


def shuffled(
    order: Callable[[int], Int[Tensor, " N"]], num_rows: int, batch_size: int, num_batches: int, done: int = 0
) -> Iterator[Int[Tensor, " B"]]:
    """Rows of the batches that are left: one pass over all rows after another, each in an order of its own.

    The order of a pass is asked for once, by its number from 0. A batch may begin in one pass and end in the next. Of
    the `num_batches` so many are `done`.
    """
    number, position = divmod(done * batch_size, num_rows)
    waiting = order(number)[position:]
    for _ in range(done, num_batches):
        while len(waiting) < batch_size:
            number += 1
            waiting = torch.cat([waiting, order(number)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def cosine(done: int, total: int) -> float:
    """What is left of the learning rate after so much of a training: it falls to 0 along a cosine."""
    return 0.5 * (1 + math.cos(math.pi * done / total))


def descend(
    loss: Float[Tensor, ""], optimizer: torch.optim.Optimizer, schedule: LRScheduler, clip: float | None = None
) -> None:
    """One step of an optimizer and its schedule; `clip` is the largest norm of the gradient."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    schedule.step()
