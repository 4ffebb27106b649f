"""The moving average of the weights, against a literal one."""

from __future__ import annotations

import torch

from training.small import small_config
from vitreg.training.engine.distributed import Distributed, ema_update
from vitreg.training.engine.train_state import TrainState


def test_average_is_the_literal_one():
    train_state = TrainState(small_config(14, ema_decay=0.5), Distributed(0, 1, torch.device("cpu")))
    vit, average = train_state.method.vit, train_state.average
    expected = {name: parameter.detach().double() for name, parameter in vit.named_parameters()}
    for step in range(1, 15):
        train_state.advance([{"image": torch.randn(8, 3, 32, 32), "target": torch.rand(8, 4)}])
        decay = min(0.5, (1 + step) / (10 + step))  # reaches 0.5 at step 8
        for name, parameter in vit.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    assert average.keys() == expected.keys()
    for name, tensor in average.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(average["registers"], vit.registers)
    assert not average["registers"].requires_grad


def test_momentum_of_one_stays_and_of_zero_jumps():
    here, there = torch.zeros(3), torch.ones(3)
    ema_update([here], [there], 1.0)
    assert torch.equal(here, torch.zeros(3))
    ema_update([here], [there], 0.0)
    assert torch.equal(here, torch.ones(3))
