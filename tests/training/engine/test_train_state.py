"""The state of a run: the moving average of the weights, against a literal one; and what a run starts from."""

from __future__ import annotations

import dataclasses

import torch

from training.small import small_config
from vitreg.model import VisionTransformer, ViTConfig
from vitreg.training import dinov2
from vitreg.training.engine.distributed import Distributed, ema_update
from vitreg.training.engine.train_state import TrainState
from vitreg.training.recipes.configs import DeiT3Config
from vitreg.training.recipes.deit3 import DeiT3

ALONE = Distributed(0, 1, torch.device("cpu"))


def test_average_is_the_literal_one():
    train_state = TrainState(small_config(14, ema_decay=0.5), ALONE)
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


class Taught(DeiT3):
    """With a teacher that was trained before."""

    def __init__(self, model: ViTConfig, config: DeiT3Config) -> None:
        super().__init__(model, config)
        self.teacher = VisionTransformer(model).requires_grad_(False)
        torch.nn.init.constant_(self.teacher.blocks[0].ls1, 0.7)


class TaughtConfig(DeiT3Config):
    def build(self, model: ViTConfig) -> Taught:
        return Taught(model, self)


def test_layer_scale_starts_anew_but_not_in_a_teacher_that_was_trained():
    method = TrainState(dataclasses.replace(small_config(), method=TaughtConfig(), layer_scale=0.3), ALONE).method
    assert (method.vit.blocks[0].ls1 == 0.3).all()
    assert (method.teacher.blocks[0].ls1 == 0.7).all()
    method = TrainState(dinov2(num_images=100, smoke=True, image_size=16, batch_size=4), ALONE).method
    for vit in (method.vit, method.export_model):
        assert all((block.ls2 == 0.1).all() for block in vit.blocks)
    assert method.vit is not method.export_model
