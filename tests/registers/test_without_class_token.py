"""SigLIP and others without a class token: patch 0 is the first of the sequence, and nothing takes it for one."""

from __future__ import annotations

import pytest
import torch

import vitreg
from registers.planting import MAGENTA, photos, plant, random_vit

FIRST, SECOND = (7, 30), (11, 12)


@pytest.fixture(scope="module")
def planted(photographs):
    """A model whose block 1 writes artifacts to patch 0, and block 2 where block 1 does not; images; marks."""
    vit = random_vit("vit_base_patch16_siglip_224", embed_dim=96, num_heads=3, depth=3)
    images = photos(photographs, vit)
    images[:, :, :16, :16] = MAGENTA[:, None, None]
    marks = torch.zeros(len(images), 49, dtype=torch.bool)
    marks[:, 0] = True
    plant(vit, 1, FIRST, images, marks)
    clean = vitreg.add_test_time_registers(vit, neurons=[(1, unit) for unit in FIRST])
    plant(clean, 2, SECOND, images, marks)
    vit.blocks[2].load_state_dict(clean.blocks[2].state_dict())
    return vit, images


def activations(vit, images):
    """Of the second wave's units on the patches, `[B, N, units]`."""
    return vit.trace(images, blocks=[2], activations=True).activations.patches[0][..., list(SECOND)]


@torch.no_grad()
def test_an_outlier_on_patch_0_is_seen_moved_and_judged(planted):
    """Published code for models with a class token never cleans it: `target[:, 1:-R]` (DSR, arXiv 2605.05206)."""
    vit, images = planted
    diagnosis = vitreg.diagnose(vit, images)
    assert diagnosis.onset_block == 1
    assert diagnosis.position_frequency[0, 0] == 1
    assert diagnosis.position_frequency.sum() == 1
    assert {(n.block, n.unit) for n in vitreg.find_register_neurons(vit, images)[:2]} == {(1, u) for u in FIRST}
    fixed = vitreg.add_test_time_registers(vit, neurons=[(1, unit) for unit in FIRST])
    before, after = (model.trace(images, activations=True) for model in (vit, fixed))
    assert before.activations.patches[1, :, 0, list(FIRST)].min() > 1
    assert (after.activations.patches[1, :, 0, list(FIRST)] == 0).all()
    assert after.patch_norms[1, :, 0, 0].max() < 0.2 * before.patch_norms[1, :, 0, 0].min()


@torch.no_grad()
def test_artifacts_that_a_later_block_writes_once_the_first_are_gone_are_moved_too(planted):
    vit, images = planted
    once = vitreg.add_test_time_registers(vit, neurons=[(1, unit) for unit in FIRST])
    assert activations(vit, images).max() < 0.1  # the first wave hides the patch from them
    assert activations(once, images)[:, 0].min() > 1
    assert vitreg.diagnose(once, images).onset_block == 2
    fixed = vitreg.add_test_time_registers(vit, images)
    assert {*fixed.config.register_neurons} == {*((1, u) for u in FIRST), *((2, u) for u in SECOND)}
    assert vitreg.compare(vit, fixed, images).outcome == "removed"
    assert not vitreg.diagnose(fixed, images).has_artifacts
