"""Models of other libraries where a model of ours is expected: every public function converts by itself."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import vitreg
from peers import perturb, random_images
from vitreg.checkpoints import CheckpointError, from_module


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return perturb(
        timm.create_model("vit_small_patch16_224", img_size=64, depth=2, embed_dim=96, num_heads=3, num_classes=5)
    )


def test_every_public_function_takes_a_timm_model(theirs):
    ours, images = vitreg.from_timm(theirs), random_images(64, batch=8)
    assert vitreg.diagnose(theirs, images).blocks == vitreg.diagnose(ours, images).blocks
    assert vitreg.compare(theirs, ours, images).patch_similarity == pytest.approx(1, abs=1e-6)
    assert vitreg.add_registers(theirs, 2).num_registers == 2
    assert vitreg.add_test_time_registers(theirs, neurons=[(1, 7)]).config.register_neurons == ((1, 7),)
    assert vitreg.find_register_neurons(theirs, images) == []
    assert vitreg.discover_objects(theirs, images)[0].box == vitreg.discover_objects(ours, images)[0].box


def test_transformers_and_open_clip_models_are_taken():
    transformers = pytest.importorskip("transformers")
    open_clip = pytest.importorskip("open_clip")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96
    )
    clip = open_clip.CLIP(
        embed_dim=16,
        vision_cfg=dict(image_size=32, patch_size=8, layers=2, width=64, head_width=32),
        text_cfg=dict(context_length=8, vocab_size=32, width=32, heads=2, layers=1),
    )
    for model in (transformers.ViTModel(config), clip, clip.visual):
        assert vitreg.diagnose(model, random_images(32)).num_patches == 32


def test_ours_is_taken_as_it_is_compiled_or_not(tiny_vit):
    assert from_module(tiny_vit) is tiny_vit
    assert from_module(torch.compile(tiny_vit)) is tiny_vit


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), r"a Linear is no model that vitreg reads; .*vitreg.load\(NAME\), or vitreg.from_state_dict"),
        ("dinov2_vitb14", r"a str is no model that vitreg reads; .*vitreg.load\('dinov2_vitb14'\)"),
        (timm.create_model("resnet18"), "ResNet is not a timm VisionTransformer or Eva model"),
    ],
)
def test_other_models_are_refused_with_what_to_give(model, message):
    with pytest.raises(CheckpointError, match=message):
        from_module(model)
