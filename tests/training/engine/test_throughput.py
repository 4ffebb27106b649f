"""How much work a step is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.contrastive_ranks import random_batch as captioned
from training.distillation_steps import random_batch as crops
from training.distillation_steps import small_method
from training.small import small_config
from vitreg.model import VisionTransformer
from vitreg.training import clip
from vitreg.training.engine.throughput import forward_flops, matrix_rate
from vitreg.training.recipes.multi_crop import locate_hidden


def counted(config, model, batch) -> float:
    """By PyTorch's counter, for one image."""
    method = config.build(model).train()
    # The counter does not know the CPU's fused attention; the plain one has the same operations.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        method(batch, 0.5)["loss"].backward()
    return counter.get_total_flops() / 8


def test_the_work_of_a_step_is_that_of_its_matrix_products():
    """The formulas, for which nothing is built, against PyTorch's count.

    In deep models, where it hardly counts that pixels have no gradient.
    """
    config = dataclasses.replace(small_config(), model=dataclasses.replace(small_config().model, depth=16))
    batch = {"image": torch.randn(8, 3, 32, 32), "target": torch.rand(8, 4)}
    assert config.method.flops(config.model, 1.0) == pytest.approx(
        counted(config.method, config.model, batch), rel=0.05
    )

    contrastive = clip(num_images=8, size="micro", image_size=64)
    assert contrastive.method.flops(contrastive.model, 1.0) == pytest.approx(
        counted(contrastive.method, contrastive.model, captioned(8) | {"text": torch.ones(8, 32, dtype=torch.int64)}),
        rel=0.05,
    )

    method = small_method()
    masks = torch.zeros(8, 2, 16, dtype=torch.bool)
    masks[:, 0, :4] = True  # as many as are to be expected: half of the crops, 10 to 50 per cent; here 25
    batch = crops() | {"mask": masks} | locate_hidden(masks)
    crops_config = dataclasses.replace(method.config.crops, mask_ratio=(0.1, 0.4))
    distillation = dataclasses.replace(method.config, crops=crops_config)
    model = dataclasses.replace(method.vit.config, depth=16)
    assert distillation.flops(model, 1.0) == pytest.approx(counted(distillation, model, batch), rel=0.05)


@pytest.mark.parametrize("gated", [False, True])
def test_a_forward_pass_is_counted_by_its_shapes(gated):
    model = dataclasses.replace(small_config().model, gated_mlp=gated, num_classes=0)
    vit = VisionTransformer(model)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        vit(torch.randn(1, 3, 64, 32))
    assert forward_flops(model, (4, 2)) == counter.get_total_flops()
    embedding = forward_flops(model, (4, 2), 0.0)
    assert forward_flops(model, (4, 2), 0.5) - embedding == (forward_flops(model, (4, 2)) - embedding) / 2


def test_the_matrix_rate_is_a_rate():
    rate = matrix_rate(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e14
