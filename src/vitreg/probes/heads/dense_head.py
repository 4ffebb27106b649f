"""A linear head on patch tokens, and its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from vitreg.common.progress import OnProgress
from vitreg.images import map_ahead
from vitreg.probes.store.dense_features import DenseFeatures

_BATCHES_AHEAD = 4
AT_ONCE = 2**22
"""Numbers that upsampled logits may have at a time: what stays in the cache is computed twice as fast."""

UPSAMPLING = 4
"""Heads are trained on maps of so many times the patch grid; on CamVid, 2, 4 and 8 give the same mIoU within 0.2."""

MIN_STEPS = 2000
"""Of small sets, which a head needs to converge."""

PerPixel = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, int], Tensor]


class LinearHead(nn.Module):
    """A 1 x 1 convolution on patch tokens; with batch normalization before it, DINOv2's `BNHead`."""

    def __init__(self, channels: int, outputs: int, *, batch_norm: bool, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels) if batch_norm else nn.Identity()
        self.linear = nn.Linear(channels, outputs)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Float[Tensor, "n P C"]) -> Float[Tensor, "n P K"]:
        return self.linear(self.norm(tokens.flatten(0, 1))).unflatten(0, tokens.shape[:2])


class Upsampling:
    """Bilinear, as `interpolate(align_corners=False)`, of maps whose channels are last.

    Two matrix products: they, unlike the gradient of `interpolate`, are the same every time on a GPU, too.
    """

    def __init__(self, grid: tuple[int, int], size: tuple[int, int], device: torch.device | str) -> None:
        self._grid = grid
        self._rows, self._columns = (
            functional.interpolate(torch.eye(old)[None], new, mode="linear")[0].T.to(device)
            for old, new in zip(grid, size, strict=True)
        )

    def __call__(self, maps: Float[Tensor, "n P K"], rows: slice = slice(None)) -> Float[Tensor, "n H W K"]:
        """The larger maps, or some of their rows."""
        maps = maps.unflatten(1, self._grid)
        tall = (self._rows[rows] @ maps.flatten(2)).unflatten(2, maps.shape[2:])
        return self._columns @ tall


@dataclass(frozen=True)
class HeadSchedule:
    """How long a head is trained, on what.

    Attributes:
        steps: of the optimizer.
        batch_size: images in each.
        seed: of their order.
        device: that trains.
        clip: largest norm of the gradient; None for any.
    """

    steps: int
    batch_size: int
    seed: int
    device: torch.device | str
    clip: float | None = None


def num_steps(given: int | None, num_images: int, batch_size: int, epochs: int) -> int:
    """As given; by default the paper's epochs, but on small sets no fewer steps than a head needs to converge."""
    if given is not None and given < 1:
        raise ValueError(f"steps is {given}; it must be at least 1, or None for {epochs} epochs")
    return given or max(MIN_STEPS, epochs * num_images // batch_size)


def train_head(
    head: LinearHead,
    features: DenseFeatures,
    targets: Shaped[np.ndarray, "N H W"],
    per_pixel: PerPixel,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    plan: HeadSchedule,
    on_progress: OnProgress | None = None,
) -> None:
    """Train it on features that are as they are: computed once, so images are not augmented.

    Args:
        head: trained in place, and in evaluation mode afterwards.
        features: of all images.
        targets: of the same.
        per_pixel: what is made of upsampled logits `[n, H, W, K]` and targets `[n, H, W]`: one number a pixel.
        loss: of these numbers, targets, and the step, from 0.
        optimizer: of the head's parameters.
        schedule: of its learning rate, a step each.
        plan: how long.
        on_progress: called with steps done and their total.

    Raises:
        ValueError: it has diverged: the largest of logits that are no numbers would be some class all the same.
    """
    upsampling = Upsampling(features.grid, targets.shape[1:], plan.device)

    def load(rows: list[int]) -> tuple[Tensor, Tensor]:
        return features.read(rows), torch.from_numpy(targets[rows])

    def numbers(tokens: Tensor, truth: Tensor) -> Tensor:
        logits = head(tokens)
        at_once = max(1, AT_ONCE // (truth[0].numel() * logits.shape[-1]))
        parts = zip(logits.split(at_once), truth.split(at_once), strict=True)
        return torch.cat([per_pixel(upsampling(part), of_part) for part, of_part in parts])

    batches = _batches(len(features), plan)
    head.train()
    with closing(map_ahead(load, batches, ahead=_BATCHES_AHEAD, num_threads=1)) as loaded:
        for step, (tokens, truth) in enumerate(loaded):
            truth = truth.to(plan.device)
            found = loss(numbers(tokens.to(plan.device), truth), truth, step)
            optimizer.zero_grad(set_to_none=True)
            found.backward()
            if plan.clip is not None:
                nn.utils.clip_grad_norm_(head.parameters(), plan.clip)
            optimizer.step()
            schedule.step()
            if on_progress is not None:
                on_progress(step + 1, plan.steps)
    if not all(parameter.isfinite().all() for parameter in head.parameters()):
        raise ValueError(f"the head is not finite after {plan.steps} steps; train it with a lower lr")
    head.eval()


def _batches(num_images: int, plan: HeadSchedule) -> Iterator[list[int]]:
    """Rows for every step: one epoch after another, each in an order of its own."""
    rng = np.random.default_rng(plan.seed)
    waiting: list[int] = []
    for _ in range(plan.steps):
        while len(waiting) < plan.batch_size:
            waiting += rng.permutation(num_images).tolist()
        yield waiting[: plan.batch_size]
        waiting = waiting[plan.batch_size :]
