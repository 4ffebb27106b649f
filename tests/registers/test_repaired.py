"""Singular defects: the direction that weights give artifacts, and weights that write them no more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vitreg
from peers import error, perturb, random_images
from registers.planting import photos, plant, random_vit, with_patches
from vitreg.registers import singular_defects

FAMILIES = {
    "plain": ("vit_base_patch16_224", {}),
    "LayerScale": ("deit3_small_patch16_224", {}),
    "gated": ("vit_giant_patch14_dinov2", {}),
    "registers": ("vit_giant_patch14_reg4_dinov2", {}),
    "no class token": ("vit_base_patch16_siglip_224", {}),
    "parallel": ("vit_base_patch16_xp_224", {}),
}


def test_the_weights_of_the_real_vit_tell_the_block_and_the_direction(tiny_vit, photograph_batch):
    """Without an image: block 7 writes in one direction, and that is the corners'."""
    defects = singular_defects(tiny_vit)
    assert max(range(12), key=lambda block: defects[block].ratio) == 7
    assert defects[7].ratio > 5
    trace = tiny_vit.trace(photograph_batch[:4], patches=True)
    corners = trace.patches[7][trace.patch_norms[7].flatten(1) > 100]
    assert F.cosine_similarity(corners, defects[7].direction, dim=-1).abs().min() > 0.99
    late = trace.patches[9][trace.patch_norms[9].flatten(1) > 100]
    assert F.cosine_similarity(late, defects[9].accumulated, dim=-1).abs().min() > 0.8


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit_base_patch16_224", "vit_giant_patch14_dinov2"])
def test_a_linear_block_is_its_matrix(family):
    """Where the MLP writes nothing, a block is what attention does to tokens that are all alike but for their sign."""
    vit = perturb(random_vit(family, embed_dim=96, num_heads=3, depth=1))
    block = vit.blocks[0]
    for parameter in (*block.mlp.fc2.parameters(), block.norm1.bias, block.attn.qkv.bias, block.attn.proj.bias):
        parameter.zero_()
    x = torch.randn(96)
    x = (x - x.mean()) / x.std(correction=0)
    scale = 1.0 if block.ls1 is None else block.ls1
    expected = x + scale * block.attn(block.norm1(x).expand(1, 3, 96))[0, 0]
    from vitreg.registers.repaired import _linear

    assert error(_linear(block, torch.randn(768, 96), centered=True) @ x, expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_artifacts_are_repaired(family, photographs):
    architecture, options = FAMILIES[family]
    vit = random_vit(architecture, embed_dim=96, num_heads=3, **options)
    images, marks = with_patches(photos(photographs, vit), vit.config.patch_size)
    plant(vit, 1, (7, 30), images, marks)
    fixed = vitreg.repair_singular_defects(vit, images, min_similarity=0.5)
    after = vitreg.compare(vit, fixed, images)
    assert max(block.outlier_fraction_before for block in after.blocks) > 0.01
    assert max(block.outlier_fraction_after for block in after.blocks) <= 1e-4
    assert fixed.num_registers == vit.num_registers
    assert "Singular values of 2 blocks were changed" in fixed.config.changes[-1]
    assert torch.equal(fixed.blocks[3].mlp.fc2.weight, vit.blocks[3].mlp.fc2.weight)
    assert torch.equal(fixed.blocks[1].attn.qkv.weight[:192], vit.blocks[1].attn.qkv.weight[:192])
    assert all(parameter.requires_grad for parameter in fixed.parameters())


def test_what_it_cannot_do_is_said(tiny_vit, photographs):
    same = vitreg.repair_singular_defects(tiny_vit, photographs[:16], max_steps=1)
    assert "Nothing was repaired. After 1 step 2.0 % of outliers are left" in same.config.changes[-1]
    assert torch.equal(same.blocks[7].mlp.fc2.weight, tiny_vit.blocks[7].mlp.fc2.weight)
    refused = vitreg.repair_singular_defects(tiny_vit, photographs[:16], max_steps=20)
    assert "destroy what the model is used for" in refused.config.changes[-1]
    clean = random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3)
    assert "No artifacts in" in vitreg.repair_singular_defects(clean, photos(photographs, clean)).config.changes[-1]
    fixed = vitreg.add_test_time_registers(tiny_vit, neurons=[(7, 417)])
    with pytest.raises(ValueError, match="has test-time registers"):
        singular_defects(fixed)
    with pytest.raises(ValueError, match="only once, but are needed again"):
        vitreg.repair_singular_defects(tiny_vit, (p for p in random_images(224, batch=8)[:, None]))
