"""`add_registers`: what it adds, and that it leaves everything else alone."""

from __future__ import annotations

import pytest
import timm
import torch

import vitreg
from peers import error, perturb, random_images, timm_model
from registers.planting import random_vit


def test_they_are_small_distinct_and_seeded(tiny_vit):
    vit = vitreg.add_registers(tiny_vit, 4)
    assert vit.num_registers == 4
    assert 0.015 < vit.registers.std() < 0.025
    assert torch.pdist(vit.registers[0]).min() > 0.1
    assert torch.equal(vit.registers, vitreg.add_registers(tiny_vit, 4).registers)
    assert not torch.equal(vit.registers, vitreg.add_registers(tiny_vit, 4, seed=1).registers)
    assert tiny_vit.registers is None
    assert "4 trainable registers added to the 0 it had" in vit.config.changes[0]


def test_the_copy_shares_no_memory_and_keeps_what_was_set(tiny_vit):
    source = vitreg.add_registers(tiny_vit, 1).train()
    source.gradient_checkpointing = True
    source.patch_embed.weight.requires_grad_(False)
    vit = vitreg.add_registers(source.to(torch.bfloat16), 2)
    assert vit.training
    assert vit.gradient_checkpointing
    assert not vit.patch_embed.weight.requires_grad
    assert vit.registers.requires_grad
    assert vit.registers.dtype is torch.bfloat16
    assert torch.equal(vit.registers[:, :1], source.registers)
    pointers = {p.data_ptr() for p in source.parameters()}
    assert not any(p.data_ptr() in pointers for p in vit.parameters())


def test_equals_timm_with_the_same_registers():
    theirs = timm_model("vit_small_patch16_224", reg_tokens=3, no_embed_class=True)
    plain = timm.create_model(
        "vit_small_patch16_224",
        dynamic_img_size=True,
        no_embed_class=True,
        depth=2,
        embed_dim=96,
        num_heads=3,
        num_classes=7,
    )
    state = theirs.state_dict()
    registers = state.pop("reg_token")
    perturb(plain).load_state_dict(state)
    ours = vitreg.add_registers(vitreg.from_timm(plain), 3)
    with torch.no_grad():
        ours.registers.copy_(registers)
        assert error(ours.classify(random_images(224)), theirs(random_images(224))) < 1e-5


def test_every_parameter_learns():
    vit = vitreg.add_registers(random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3), 2).train()
    vit.classify(random_images(112)).square().sum().backward()
    assert vit.registers.grad.abs().amax(-1).min() > 0
    assert not torch.equal(vit.registers.grad[0, 0], vit.registers.grad[0, 1])


def test_trainable_ones_go_before_test_time_registers(tiny_vit):
    fixed = vitreg.add_test_time_registers(tiny_vit, neurons=[(7, 417)])
    both = vitreg.add_registers(fixed, 2)
    assert torch.equal(both.registers[:, 2:], fixed.registers)
    assert both.config.test_time_registers == slice(3, 4)
    assert both.trace(random_images(224)).register_norms[-1, :, 2].min() > 200


@pytest.mark.parametrize("format", ["timm", "transformers"])
def test_the_copy_saves_in_other_formats(tiny_vit, tmp_path, format):
    vit = vitreg.add_registers(tiny_vit, 2)
    path = tmp_path / ("model" if format == "transformers" else "model.safetensors")
    vitreg.save(vit, path, format=format)
    with torch.no_grad():
        assert error(vitreg.load(str(path)).classify(random_images(224)), vit.classify(random_images(224))) < 1e-5


def test_none_are_refused(tiny_vit):
    with pytest.raises(ValueError, match="count is 0; add at least 1 register"):
        vitreg.add_registers(tiny_vit, 0)
