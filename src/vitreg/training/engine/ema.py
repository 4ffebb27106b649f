"""Weights that follow those of a model in training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vitreg.model import VisionTransformer
from vitreg.training.engine.distributed import local_tensor


@torch.no_grad()
def ema_update(followers: Iterable[Tensor], leaders: Iterable[Tensor], momentum: float) -> None:
    """`follower = momentum * follower + (1 - momentum) * leader`, each process on its own parts."""
    get_ema_multi_avg_fn(momentum)([local_tensor(t) for t in followers], [local_tensor(t) for t in leaders], 0)


class WeightEma:
    """An exponential moving average of a model's weights.

    In the first steps the average forgets faster, `(1 + step) / (10 + step)`, so that the initial weights do not linger
    (as `tf.train.ExponentialMovingAverage`).

    Attributes:
        tensors: the averaged weights by name, sharded as the model's are.
    """

    def __init__(self, vit: VisionTransformer, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in vit.named_parameters()}

    def update(self, vit: VisionTransformer, step: int) -> None:
        """After optimizer step `step`, counted from 1."""
        ema_update(self.tensors.values(), vit.parameters(), min(self.decay, (1 + step) / (10 + step)))
