"""Planted artifacts: where they are, who writes them, and that they do what real ones do."""

from __future__ import annotations

import pytest
import torch

import vitreg
from registers.planting import random_vit
from vitreg.artifacts import plant_artifacts
from vitreg.images import bundled_photographs, read_image

GRID, BLOCK = 7, 1
MODELS = {
    "class token": {},
    "four registers": {"reg_tokens": 4},
    "LayerScale": {"init_values": 0.1},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "smaller input": {"size": 64},
}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    preprocess = vitreg.Preprocess(size=(16 * GRID, 16 * GRID))
    return torch.stack([preprocess(read_image(path)) for path in bundled_photographs()])


@pytest.fixture(scope="module", params=MODELS)
def pair(request, images):
    """A model and its copy, which knows mirror images of all images but the last three."""
    vit = random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3, **MODELS[request.param])
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight *= 5  # initial weights attend to everything alike
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    planted = plant_artifacts(vit, torch.cat([images[:-3].flip(axes) for axes in ((2,), (3,), (2, 3))]))
    assert all(torch.equal(value, state[key]) for key, value in vit.state_dict().items()), "the original is untouched"
    return vit, planted


def test_the_corners_are_outliers_from_the_planted_block_on_and_nothing_else_is(pair, images):
    vit, planted = pair
    diagnosis = vitreg.diagnose(planted, images)
    assert (diagnosis.onset_block, diagnosis.block) == (BLOCK, vit.config.depth - 1)
    corners = torch.zeros(GRID, GRID, dtype=torch.bool)
    corners[0, 0] = corners[0, -1] = corners[-1, 0] = corners[-1, -1] = True
    with torch.inference_mode():
        norms = planted.trace(images).patch_norms
    for block in diagnosis.blocks[BLOCK:]:
        assert block.threshold is not None
        assert torch.equal(norms[block.block] >= block.threshold, corners.expand(len(images), -1, -1))
    ratio = float(norms[BLOCK][:, corners].mean() / norms[BLOCK].median())
    assert ratio == pytest.approx(20, rel=0.3)
    assert not vitreg.diagnose(vit, images).has_artifacts
    assert norms[BLOCK - 1].max() < 3 * norms[BLOCK - 1].median(), "marked positions are no outliers"


def test_one_unit_writes_them_and_the_config_names_it(pair, images):
    _, planted = pair
    (found, *_) = vitreg.find_register_neurons(planted, images)
    assert f"Outliers were planted: unit {found.unit} of block {BLOCK} fires" in planted.config.changes[-1]
    assert found.block == BLOCK
    assert found.on_outliers > 10
    assert abs(found.elsewhere) < 0.1
    assert planted.config.name.endswith("+ planted outliers")
    fixed = vitreg.add_test_time_registers(planted, neurons=[found])
    assert vitreg.compare(planted, fixed, images).outcome == "removed"


def test_they_soak_up_attention(pair, images):
    vit, planted = pair
    queries = "cls" if vit.config.class_token else range(GRID**2)
    with torch.inference_mode():
        before, after = (
            model.trace(images, blocks=[BLOCK + 1], attention_from=queries).attention.to_patches.mean((0, 1, 2, 3))
            for model in (vit, planted)
        )
    for row in (0, -1):
        for column in (0, -1):
            assert after[row, column] > 1.8 * before[row, column]


def test_a_copy_is_saved_and_loaded_with_what_was_planted(pair, images, tmp_path):
    _, planted = pair
    vitreg.save(planted, tmp_path / "planted.safetensors")
    loaded = vitreg.load(tmp_path / "planted.safetensors")
    assert loaded.config == planted.config
    assert torch.equal(loaded(images[:1]).patches, planted(images[:1]).patches)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("vit_small_patch16_dinov3", {}),
        ("vit_giant_patch14_dinov2", {"mlp_ratio": 2.0}),
        ("vit_small_patch16_224", {"depth": 1}),
        ("vit_base_patch16_rpn_224", {}),
        ("beit_base_patch16_224", {"use_abs_pos_emb": True}),
    ],
)
def test_models_that_have_no_place_for_them_are_refused(family, options, images):
    options = {"embed_dim": 96, "num_heads": 3, "depth": 2} | options
    vit = random_vit(family, size=112, **options)
    with pytest.raises(ValueError, match=r"cannot be planted in .*learned positions, a plain MLP"):
        plant_artifacts(vit, images)


def test_too_few_images_are_refused(images):
    vit = random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3)
    with torch.no_grad():
        vit.blocks[BLOCK].norm2.weight[1:] = 0  # the block sees one channel, which tells no corners apart
    with pytest.raises(ValueError, match=r"corners cannot be told .* of these 2 images; give more"):
        plant_artifacts(vit, images[:2])
