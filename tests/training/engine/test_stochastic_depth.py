"""Stochastic depth: what timm's `DropPath` does, computed for a subset that is drawn for all processes together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peers import error, perturb, random_images
from training.small import small_config
from vitreg.model import VisionTransformer
from vitreg.training.engine.distributed import Distributed
from vitreg.training.engine.stochastic_depth import StochasticDepth

CPU = torch.device("cpu")
ALONE = Distributed(0, 1, CPU)
MODEL = small_config().model


def depth(rate: float) -> StochasticDepth:
    return StochasticDepth(rate, MODEL.depth, ALONE)


def drawn(rate: float, batch: int, rank: int = 0, world: int = 1, depth: int = 3) -> list[tuple[list[int], float]]:
    """Of every branch."""
    np.random.seed(7)
    blocks = StochasticDepth(rate, depth, Distributed(rank, world, CPU))(batch, CPU)
    return [(images.tolist(), factor) for block in blocks for images, factor in block]


@pytest.mark.parametrize(("rate", "batch"), [(0.05, 8), (0.3, 2), (0.4, 64), (0.9, 4)])
def test_a_image_takes_a_branch_as_often_as_is_asked_for(rate, batch):
    draws = drawn(rate, batch, depth=4000)
    added = np.zeros(batch)
    for images, factor in draws:
        assert images == sorted(set(images))
        assert len(images) in (1, int(batch * (1 - rate)), int(batch * (1 - rate)) + 1)
        added[images] += factor
    assert added / len(draws) == pytest.approx(1, abs=0.15 if rate > 0.5 else 0.03)


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_take_their_parts_of_one_draw(world):
    expected = drawn(0.5, 12, depth=20)
    parts = [drawn(0.5, 12 // world, rank, world, depth=20) for rank in range(world)]
    empty = 0
    for branch, (images, factor) in enumerate(expected):
        found = []
        for rank, part in enumerate(parts):
            mine, weight = part[branch]
            assert weight in (factor, 0.0)
            found += [rank * 12 // world + image for image in mine] if weight else []
            empty += not weight
        assert found == images
    assert empty or world < 6


@pytest.mark.parametrize("parallel", [False, True])
def test_subsets_are_branches_that_are_dropped_and_scaled(parallel):
    """Output and gradients, against the literal rule: compute all, then multiply by zero or by what makes up for it."""
    model = dataclasses.replace(MODEL, parallel=parallel)
    block = perturb(VisionTransformer(model)).blocks[0]
    x = torch.randn(6, 5, model.embed_dim, requires_grad=True)
    subsets = (torch.tensor([0, 2, 5]), 2.0), (torch.tensor([1, 2]), 3.0)

    def dropped(branch: torch.Tensor, number: int) -> torch.Tensor:
        images, factor = subsets[number]
        return branch * torch.zeros(6, 1, 1).index_fill(0, images, factor)

    if parallel:
        normed = block.norm1(x)
        expected = x + dropped((block.attn(normed) + block.mlp(normed)) * block.ls1, 0)
    else:
        expected = x + dropped(block.attn(block.norm1(x)) * block.ls1, 0)
        expected = expected + dropped(block.mlp(block.norm2(expected)) * block.ls2, 1)
    output = block(x, None, None, subsets)
    assert error(output, expected) < 1e-6
    wanted = torch.randn_like(output)
    learning = [x, *block.parameters()]
    theirs = torch.autograd.grad(expected, learning, wanted)
    for ours, other in zip(torch.autograd.grad(output, learning, wanted), theirs, strict=True):
        assert error(ours, other) < 1e-5


def test_what_is_dropped_is_not_computed():
    vit, images = VisionTransformer(MODEL).train(), random_images(32, batch=20)
    counts = []
    for rate in (0.0, 0.4):
        vit.stochastic_depth = depth(rate) if rate else None
        with FlopCounterMode(display=False) as counter:
            vit(images).patches.sum().backward()
        blocks = counter.get_flop_counts()["Global"]
        counts.append(sum(blocks[op] for op in blocks if "convolution" not in str(op)))
    assert counts[1] == pytest.approx(0.6 * counts[0], rel=0.01)


def test_a_process_that_keeps_no_image_still_has_gradients():
    """DDP waits for those of all parameters."""
    vit = perturb(VisionTransformer(MODEL)).train()
    vit.stochastic_depth = depth(0.99)
    images = random_images(32, batch=2)
    vit.classify(images).sum().backward()
    assert [name for name, p in vit.named_parameters() if p.grad is None] == []
    assert not vit.blocks[0].mlp.fc1.weight.grad.any()


def test_all_blocks_drop_in_training_and_none_in_evaluation():
    vit = perturb(VisionTransformer(MODEL))
    images = random_images(32, batch=8)
    before = vit.classify(images)
    vit.stochastic_depth = depth(0.5)
    assert torch.equal(vit.eval().classify(images), before)
    vit.train()
    assert not torch.allclose(vit.classify(images), before)


def test_recomputed_blocks_drop_the_same_images():
    """Gradients under checkpointing are those without, whose subsets are drawn once."""
    gradients = []
    vit = perturb(VisionTransformer(MODEL)).train()
    vit.stochastic_depth = depth(0.5)
    for recompute in (False, True):
        vit.zero_grad()
        vit.gradient_checkpointing = recompute
        np.random.seed(3)
        sum(vit.classify(random_images(32, batch=8)).sum() for _ in range(2)).backward()
        gradients.append([p.grad for p in vit.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
