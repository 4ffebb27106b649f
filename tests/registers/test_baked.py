"""A fix as plain weights: the register neurons fire on ordinary registers, here and in timm and transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open

import vitreg
from checkpoints import transformers_models
from peers import TOLERANCE, error
from registers.planting import plant, random_vit, with_patches
from vitreg.artifacts import plant_artifacts
from vitreg.images import bundled_photographs, read_image

BLOCK = 1
MODELS = {
    "class token": {},
    "four registers": {"reg_tokens": 4},
    "LayerScale": {"init_values": 0.1},
    "no class token": {"class_token": False, "global_pool": "avg"},
}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Photographs and their mirror images; the last of every five is held back."""
    preprocess = vitreg.Preprocess(size=(112, 112))
    photos = torch.stack([preprocess(read_image(path)) for path in bundled_photographs()])
    return torch.cat([photos, *(photos.flip(axes) for axes in ((2,), (3,), (2, 3)))])


def attentive(vit: vitreg.VisionTransformer) -> vitreg.VisionTransformer:
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight *= 5  # initial weights attend to everything alike
    return vit


def planted_and_fixed(images, **options) -> tuple[vitreg.VisionTransformer, vitreg.VisionTransformer]:
    vit = attentive(random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3, **options))
    planted = plant_artifacts(vit, images)
    (unit,) = (planted.blocks[BLOCK].mlp.fc1.weight != vit.blocks[BLOCK].mlp.fc1.weight).any(1).nonzero().flatten()
    return planted, vitreg.add_test_time_registers(planted, count=2, neurons=[(BLOCK, int(unit))])


@pytest.fixture(scope="module", params=MODELS)
def models(request, images):
    planted, fixed = planted_and_fixed(images, **MODELS[request.param])
    state = {name: value.clone() for name, value in fixed.state_dict().items()}
    baked = vitreg.bake_registers(fixed, images)
    assert all(torch.equal(value, state[name]) for name, value in fixed.state_dict().items()), "it is left untouched"
    return planted, fixed, baked


@torch.no_grad()
def test_the_registers_hold_the_artifacts_and_the_features_are_the_fixed_models(models, images):
    planted, fixed, baked = models
    ours, theirs, before = (vit.trace(images) for vit in (baked, fixed, planted))
    assert before.patch_norms[BLOCK].max() > 10 * before.patch_norms[BLOCK].median()
    assert (ours.patch_norms.flatten(1).amax(1) < 1.5 * theirs.patch_norms.flatten(1).amax(1)).all()
    added = ours.register_norms[BLOCK, :, -2:]
    assert added.mean() == pytest.approx(float(theirs.register_norms[BLOCK, :, -1].mean()), rel=0.2)
    similarity = F.cosine_similarity(ours.tokens.patches, theirs.tokens.patches, dim=-1)
    assert similarity.mean() > 0.98
    pooled = F.cosine_similarity(baked.pool(ours.tokens), fixed.pool(theirs.tokens), dim=-1)
    assert pooled.mean() > 0.98


def test_only_rows_of_register_neurons_and_new_registers_changed(models):
    _, fixed, baked = models
    config = baked.config
    assert (config.register_neurons, config.num_test_time_registers, config.register_weight) == ((), 0, 1)
    assert "became 2 ordinary ones" in config.changes[-1]
    assert config.changes[:-1] == fixed.config.changes
    changed = {n for n, value in baked.state_dict().items() if not torch.equal(value, fixed.state_dict()[n])}
    ((block, unit),) = fixed.config.register_neurons
    assert changed == {"registers", f"blocks.{block}.mlp.fc1.weight", f"blocks.{block}.mlp.fc1.bias"}
    rows = (baked.blocks[block].mlp.fc1.weight != fixed.blocks[block].mlp.fc1.weight).any(1)
    assert rows.nonzero().flatten().tolist() == [unit]
    trained = fixed.num_registers - 2
    assert torch.equal(baked.registers[:, :trained], fixed.registers[:, :trained])
    assert baked.registers.shape[1] == trained + 2
    assert all(p.requires_grad for p in baked.parameters())
    assert not any(module._forward_hooks for module in baked.modules())


def in_timm(baked: vitreg.VisionTransformer, folder: Path) -> torch.nn.Module:
    """What timm alone makes of the file."""
    vitreg.save(baked, folder / "baked.safetensors", format="timm")
    with safe_open(folder / "baked.safetensors", "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kwargs = json.loads(metadata["kwargs"])
    assert kwargs["reg_tokens"] == baked.num_registers
    model = timm.create_model(metadata["architecture"], **kwargs).eval()
    model.load_state_dict(state, strict=True)
    return model


@torch.no_grad()
def test_timm_runs_it(models, images, tmp_path):
    baked = models[-1]
    model = in_timm(baked, tmp_path)
    assert error(model.forward_features(images[:4]), baked(images[:4]).sequence()) <= TOLERANCE
    assert error(model(images[:4]), baked.classify(images[:4])) <= TOLERANCE
    again = vitreg.from_timm(model)
    assert error(again(images[:4]).patches, baked(images[:4]).patches) <= TOLERANCE


@torch.no_grad()
def test_the_real_vit_is_baked_in_timm(tiny_vit, photograph_batch, tmp_path):
    fixed = vitreg.add_test_time_registers(tiny_vit, count=4, neurons=[(7, 417), (6, 189)])
    baked = vitreg.bake_registers(fixed, photograph_batch)
    model = in_timm(baked, tmp_path)
    assert error(model(photograph_batch), baked.classify(photograph_batch)) <= TOLERANCE
    patches = torch.stack(model.forward_intermediates(photograph_batch, intermediates_only=True))
    assert patches.norm(dim=2).amax() < 150 < tiny_vit.trace(photograph_batch).patch_norms.amax()
    assert (
        F.cosine_similarity(model.forward_features(photograph_batch)[:, 0], fixed(photograph_batch).cls).mean() > 0.99
    )


@torch.no_grad()
def test_transformers_runs_it(images, tmp_path):
    hf = transformers_models.hf
    vit = vitreg.from_transformers(hf.Dinov2Model(transformers_models.dinov2_config(False)))
    fixed = vitreg.add_test_time_registers(vit, neurons=[(1, 7)])
    side = vit.config.patch_size * 7
    resized = F.interpolate(images[:10], (side, side), mode="bilinear")
    with torch.enable_grad():
        baked = vitreg.bake_registers(fixed, resized, count=1)
    vitreg.save(baked, tmp_path, format="transformers")
    model = hf.AutoModel.from_pretrained(tmp_path).eval()
    assert type(model) is hf.Dinov2WithRegistersModel
    native = F.interpolate(images[:2], vit.config.image_size, mode="bilinear")
    assert error(model(native).last_hidden_state, baked(native).sequence()) <= TOLERANCE


@torch.no_grad()
def test_gated_units_of_negative_activation(images):
    vit = random_vit("vit_small_patch14_reg4_dinov2", embed_dim=96, num_heads=3, mlp_layer=timm.layers.SwiGLUPacked)
    marked, marks = with_patches(images, 14)
    plant(vit, BLOCK, [3, 8], marked, marks)
    fixed = vitreg.add_test_time_registers(vit, neurons=[(BLOCK, 3), (BLOCK, 8)])
    with torch.enable_grad():
        baked = vitreg.bake_registers(fixed, marked, count=1)
    ours, theirs = baked.trace(marked), fixed.trace(marked)
    assert vit.trace(marked).patch_norms[BLOCK].max() > 2 * theirs.patch_norms[BLOCK].max()
    assert (ours.patch_norms.flatten(1).amax(1) < 1.5 * theirs.patch_norms.flatten(1).amax(1)).all()
    assert F.cosine_similarity(ours.tokens.cls, theirs.tokens.cls, dim=-1).mean() > 0.98


@torch.no_grad()
def test_another_count_has_the_same_values_on_registers(images):
    _, fixed = planted_and_fixed(images)
    baked = vitreg.bake_registers(fixed, images, count=3)
    assert baked.config.num_registers == 3
    ours, theirs = baked.trace(images), fixed.trace(images)
    assert (ours.patch_norms.flatten(1).amax(1) < 1.5 * theirs.patch_norms.flatten(1).amax(1)).all()
    assert ours.register_norms[BLOCK].mean() == pytest.approx(float(theirs.register_norms[BLOCK].mean()), rel=0.1)


def test_what_cannot_be_baked_says_why(images, monkeypatch):
    planted, fixed = planted_and_fixed(images)
    with pytest.raises(ValueError, match="5 images cannot teach the register neurons; give at least 8"):
        vitreg.bake_registers(fixed, images[:5])
    with pytest.raises(ValueError, match="has no register neurons to bake; give a model that add_test_time_registers"):
        vitreg.bake_registers(planted, images)
    with pytest.raises(ValueError, match="count is 0; bake at least 1 register"):
        vitreg.bake_registers(fixed, images, count=0)
    normed = vitreg.VisionTransformer(dataclasses.replace(fixed.config, mlp_norm=True))
    with pytest.raises(ValueError, match=r"a norm in its MLPs.*vitreg\.install_registers"):
        vitreg.bake_registers(normed, images)
    monkeypatch.setattr("vitreg.registers.baked.LEAST_SIMILARITY", 1.01)
    with pytest.raises(
        ValueError, match=r"cannot be taught to fire on registers alone.*Give more images; vitreg\.inst"
    ):
        vitreg.bake_registers(fixed, images)
