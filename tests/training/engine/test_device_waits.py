"""A training step enqueues work and never asks the device for a number, which would leave it idle meanwhile."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training.contrastive_ranks import Noise
from training.small import small_config
from vitreg.training import clip, dinov2, distill
from vitreg.training.data.samples import SampleStream
from vitreg.training.engine.distributed import Distributed
from vitreg.training.engine.train_state import TrainState

ATEN = torch.ops.aten
# What hands a value, or a shape that depends on values, to Python; and what makes a tensor of Python's numbers, which a
# GPU has to be waited for to copy.
WAITS = (
    *(ATEN._local_scalar_dense, ATEN.is_nonzero, ATEN.equal, ATEN.nonzero, ATEN.masked_select, ATEN._unique2),
    ATEN.lift_fresh,
)


class NoWaiting(TorchDispatchMode):
    """Refuses them, but for tensors that are on the CPU by design.

    Args:
        on_cpu: these.
    """

    def __init__(self, on_cpu: set[int]) -> None:
        super().__init__()
        self.on_cpu = on_cpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pinned = func.overloadpacket is ATEN.lift_fresh and args[0].ndim  # the indices of stochastic depth
        if func.overloadpacket in WAITS and not pinned:
            assert args[0].data_ptr() in self.on_cpu, f"{func} waits for the device"
        if func.overloadpacket in (ATEN.index, ATEN.index_put, ATEN.index_put_):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{func} by a mask waits"
        return func(*args, **(kwargs or {}))


class Labeled(Noise):
    classes = ("even", "odd")
    labels = (0, 1) * 4


@pytest.mark.parametrize("recipe", ["deit3", "dinov2", "dinov2-mean", "clip", "distill"])
def test_no_step_of_any_recipe_waits_for_the_device(recipe):
    """`patches[mask]` did in every step of dinov2."""
    sizes: dict[str, Any] = dict(num_images=8, size="micro", image_size=32, patch_size=8, batch_size=8)
    if recipe == "deit3":
        config = small_config(model=dataclasses.replace(small_config().model, num_classes=2))
    elif recipe == "clip":
        config = clip(**sizes)
    elif recipe == "distill":
        config = distill(teacher="vitreg_tiny_reg4", smoke=True, **{**sizes, "patch_size": 16})
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, levels=2))
    else:
        config = dinov2(**sizes, smoke=True)
        centering = "mean" if "mean" in recipe else "sinkhorn"
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, centering=centering))
    ema = 0.9 if recipe == "deit3" else 0.0
    drop_path = 0.0 if recipe == "distill" else 0.3
    config = dataclasses.replace(config, drop_path=drop_path, num_steps=4, ema_decay=ema)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=2))
    train_state = TrainState(config, Distributed(0, 1, torch.device("cpu")))
    images = Labeled()
    batch, _ = SampleStream(images, config.method.augmentation(config.model, images), 0)[range(8)]
    train_state.advance([batch])  # the optimizer's state is there
    # LAMB counts steps on the CPU.
    steps = {group["step"].data_ptr() for group in train_state.optimizer.param_groups if "step" in group}
    with NoWaiting(steps):
        logged = train_state.advance([batch])
    assert float(logged["loss"]) > 0


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x.new_tensor(3.0),
        lambda x: torch.tensor(3.0, device=x.device),
    ],
)
def test_waiting_is_noticed(waiting):
    with pytest.raises(AssertionError, match="waits"), NoWaiting(set()):
        waiting(torch.ones(3))
