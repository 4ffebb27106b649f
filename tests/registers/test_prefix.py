"""Fixed keys and values in place of artifacts: against attention written out, on planted units, on the real ViT-Ti."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vitreg
from peers import error, perturb, random_images
from registers.planting import photos, plant, random_vit, with_patches
from vitreg.checkpoints.state import build

FAMILIES = [
    "vit_base_patch16_224",
    "vit_giant_patch14_dinov2",
    "beit_base_patch16_224",
    "vit_dpwee_patch16_reg1_gap_256",
]


def with_rows(vit: vitreg.VisionTransformer, *rows: tuple[int, int]) -> vitreg.VisionTransformer:
    """With random ones."""
    config = dataclasses.replace(vit.config, prefix_rows=rows)
    state = vit.state_dict()
    for block, count in rows:
        state[f"blocks.{block}.attn.prefix"] = torch.randn(2, config.num_heads, count, config.head_dim)
    return build(config, state, "a model with a prefix")


@torch.no_grad()
def test_the_rows_are_keys_and_values_of_every_image():
    vit = with_rows(random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3), (1, 2))
    images, attn = random_images(112), vit.blocks[1].attn
    trace = vit.trace(images, facets=("queries", "keys", "values"), attention_from=["cls", 3])
    q, k, v = (
        facet.sequence()[1].unflatten(-1, (3, -1)).transpose(1, 2)
        for facet in (trace.queries, trace.keys, trace.values)
    )
    keys, values = (
        torch.cat((fixed.expand(len(k), -1, -1, -1), own), 2) for fixed, own in zip(attn.prefix, (k, v), strict=True)
    )
    weights = (q @ keys.mT / 32**0.5).softmax(-1)
    seen: list[torch.Tensor] = []
    hook = attn.register_forward_hook(lambda module, args, output: seen.append(output))
    vit(images)
    hook.remove()
    assert error(attn.proj((weights @ values).transpose(1, 2).flatten(2)), seen[0]) < 1e-5
    assert error(trace.attention.to_cls[1], weights[:, :, [0, 4], 2]) < 1e-5
    assert error(trace.attention.to_patches[1].flatten(-2), weights[:, :, [0, 4], 3:]) < 1e-5
    assert trace.attention.to_patches[0].flatten(-2).sum(-1).add(trace.attention.to_cls[0]).sub(1).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_any_attention_takes_them(family, tmp_path):
    vit = perturb(random_vit(family, embed_dim=96, num_heads=3))
    prefixed, images = with_rows(vit, (1, 3), (3, 1)), random_images(112)
    assert error(prefixed(images).patches, vit(images).patches) > 1e-3
    assert error(prefixed.trace(images, attention_from=[0]).tokens.patches, prefixed(images).patches) < 1e-6
    vitreg.save(prefixed, tmp_path / "prefixed.safetensors")
    loaded = vitreg.load(tmp_path / "prefixed.safetensors")
    assert loaded.config == prefixed.config
    assert torch.equal(loaded(images).patches, prefixed(images).patches)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(prefixed(images).patches.float(), loaded(images).patches.float()) == 0
    with pytest.raises(vitreg.CheckpointError, match="prefix"):
        vitreg.save(prefixed, tmp_path / "timm.safetensors", format="timm")


def test_the_rows_are_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    vit = with_rows(random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3, depth=2), (1, 2))
    assert max(vitreg.export(vit, tmp_path / "prefixed.onnx").errors.values()) < 1e-5


@pytest.mark.parametrize("family", ["vit_base_patch16_224", "vit_giant_patch14_dinov2"])
def test_planted_units_are_silenced(family, photographs):
    vit = random_vit(family, embed_dim=96, num_heads=3)
    images, marks = with_patches(photos(photographs, vit), vit.config.patch_size)
    plant(vit, 1, (7, 30), images, marks)
    fixed = vitreg.add_prefix(vit, images)
    assert vitreg.compare(vit, fixed, images).outcome == "removed"
    assert [block for block, _ in fixed.config.prefix_rows] == [2, 3]
    assert not fixed.blocks[1].mlp.fc2.weight[:, [7, 30]].any()
    assert vit.blocks[1].mlp.fc2.weight[:, [7, 30]].any()
    assert fixed.num_registers == vit.num_registers
    assert "2 MLP units silenced (7 of block 1, 30 of block 1)" in fixed.config.changes[-1]
    assert all(parameter.requires_grad for parameter in fixed.parameters())
    with pytest.raises(ValueError, match="has a prefix already"):
        vitreg.add_prefix(fixed, images)


def test_the_real_vit_keeps_its_features(tiny_vit, photographs, photograph_batch):
    fixed = vitreg.add_prefix(tiny_vit, photographs, neurons=[(7, 417), (6, 189)])
    comparison = vitreg.compare(tiny_vit, fixed, photograph_batch)
    assert comparison.outcome == "removed"
    assert comparison.cls_similarity > 0.995
    assert comparison.head_agreement > 0.9


def test_what_it_cannot_do_is_said(tiny_vit, photographs):
    """The published prefix silences nothing; with a unit of block 0 the artifacts stay, too."""
    for neurons, said in (
        ([], "The published prefix leaves 2.0 %"),
        ([(0, 0)], "With 1 unit silenced it leaves 2.0 %"),
    ):
        same = vitreg.add_prefix(tiny_vit, photographs, neurons=neurons)
        assert said in same.config.changes[-1]
        assert not same.config.prefix_rows


def test_a_clean_model_is_left_alone(photographs):
    vit = random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3)
    assert "No artifacts in" in vitreg.add_prefix(vit, photos(photographs, vit)).config.changes[-1]
