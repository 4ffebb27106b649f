"""The moving average of the weights, against a literal one."""

from __future__ import annotations

import torch

from training.small import small_config
from vitreg.model import VisionTransformer
from vitreg.training.engine.ema import WeightEma, ema_update


def test_average_is_the_literal_one():
    vit = VisionTransformer(small_config().model)
    average = WeightEma(vit, 0.5)
    expected = {name: parameter.detach().double() for name, parameter in vit.named_parameters()}
    for step in range(1, 15):
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(vit, step)
        decay = min(0.5, (1 + step) / (10 + step))  # reaches 0.5 at step 8
        for name, parameter in vit.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    for name, tensor in average.tensors.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not average.tensors["registers"].requires_grad


def test_momentum_of_one_stays_and_of_zero_jumps():
    here, there = torch.zeros(3), torch.ones(3)
    ema_update([here], [there], 1.0)
    assert torch.equal(here, torch.zeros(3))
    ema_update([here], [there], 0.0)
    assert torch.equal(here, torch.ones(3))
