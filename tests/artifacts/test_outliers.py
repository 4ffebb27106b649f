"""Outliers from kept norms are those of the diagnosis."""

from __future__ import annotations

import pytest
import torch

import vitreg
from vitreg.artifacts import find_outliers, plant_artifacts
from vitreg.artifacts.outliers import onset, reported_block


def norms_of(vit: vitreg.VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return vit.trace(images).patch_norms


@pytest.mark.parametrize("model", ["pretrained", "planted", "random"])
def test_as_diagnosed(model, tiny_vit, photograph_batch):
    vit = tiny_vit
    if model == "planted":
        vit = plant_artifacts(tiny_vit, photograph_batch)
    if model == "random":
        vit = vitreg.VisionTransformer(tiny_vit.config)
    diagnosis = vitreg.diagnose(vit, photograph_batch[:16])
    found = find_outliers(norms_of(vit, photograph_batch[:16]).split(5, dim=1))
    assert (found.threshold, found.block, found.onset_block) == (
        diagnosis.threshold,
        diagnosis.block,
        diagnosis.onset_block,
    )
    assert (found.threshold is None) == (model == "random")


def test_inner_blocks_are_reported_where_the_last_has_none():
    norms = torch.rand(4, 8, 10, 10, generator=torch.Generator().manual_seed(0)) + 1
    norms[1:3, :, 0, 0] *= 40
    norms[2, :, 0, 0] *= 2
    found = find_outliers([norms])
    assert (found.block, found.onset_block) == (2, 1)
    assert found.threshold is not None
    assert 2 < found.threshold <= 80


def test_the_run_of_blocks_is_unbroken():
    assert onset([3, 0, 2, 2], 3) == 2
    assert onset([3, 1, 2, 0], 3) is None
    assert reported_block([3, 0, 2, 0], [5.0, 90.0, 9.0, 1.0]) == 2
