"""Stochastic depth: what timm's `DropPath` does, drawn for the batch of all processes together."""

from __future__ import annotations

import pytest
import torch
from timm.layers.drop import DropPath

from peers import perturb, pictures
from training.small import small_config
from vitreg.model import VisionTransformer
from vitreg.training.processes import Processes
from vitreg.training.stochastic_depth import StochasticDepth, add_stochastic_depth

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


def test_branches_are_dropped_whole_and_their_mean_is_kept():
    branch = torch.ones(20000, 2, 3)
    torch.manual_seed(0)
    ours = StochasticDepth(0.3, ALONE)(branch)
    theirs = DropPath(0.3).train()(branch)
    for dropped in (ours, theirs):
        assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
        assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(ours, ours[:, :1, :1].expand(-1, 2, 3))


def test_processes_take_their_parts_of_one_draw():
    branch = torch.randn(12, 5, 4)
    torch.manual_seed(7)
    together = StochasticDepth(0.5, ALONE)(branch)
    parts = []
    for rank in range(3):
        torch.manual_seed(7)
        parts.append(StochasticDepth(0.5, Processes(rank, 3, CPU))(branch.chunk(3)[rank]))
    assert torch.equal(torch.cat(parts), together)
    assert 0 < (together == 0).float().mean() < 1


def test_all_blocks_drop_in_training_and_none_in_evaluation():
    vit = perturb(VisionTransformer(small_config().model))
    images = pictures(32, batch=8)
    before = vit.classify(images)
    add_stochastic_depth(vit, 0.5, ALONE)
    assert torch.equal(vit.eval().classify(images), before)
    vit.train()
    assert not torch.allclose(vit.classify(images), before)
    assert all(block.drop_path.rate == 0.5 for block in vit.blocks)
