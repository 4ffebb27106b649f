"""`ViTConfig`: what it refuses, and its way through JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from peers import timm_model
from vitreg import ViTConfig, from_timm
from vitreg.model import PositionInterpolation, Preprocess, RopeConfig

SMALL = dict(embed_dim=24, depth=2, num_heads=2, mlp_dim=48, patch_size=8, image_size=(32, 40))


def test_what_follows_from_the_fields():
    config = ViTConfig(**SMALL, num_registers=3)
    assert (config.head_dim, config.grid, config.num_prefix_tokens) == (12, (4, 5), 4)
    assert ViTConfig(**SMALL, class_token=False, pool="mean").num_prefix_tokens == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(embed_dim=0), "embed_dim is 0"),
        (dict(depth=0), "depth is 0; it must be at least 1"),
        (dict(num_heads=-1), "num_heads is -1"),
        (dict(mlp_dim=0), "mlp_dim is 0"),
        (dict(patch_size=0), "patch_size is 0"),
        (dict(num_heads=5), "embed_dim 24 is not a multiple of num_heads 5"),
        (dict(num_registers=-1), "num_registers is -1"),
        (dict(num_summary_tokens=1), "num_summary_tokens is 1: it counts the first of the 0 registers"),
        (dict(num_summary_tokens=1, num_registers=1, pool="mean"), "and pool is 'mean'"),
        (dict(class_token=False), "pool 'token' needs a class token; use 'mean' or 'attention'"),
        (dict(class_token=False, pool="token+mean"), "needs a class token"),
        (dict(image_size=(32, 7)), r"image_size \(32, 7\) is smaller than one patch of 8 pixels"),
        (dict(differential=True, num_heads=8), "differential attention needs heads of an even number of channels"),
        (dict(differential=True, rope=RopeConfig((1.0, 2.0, 3.0))), "and has no RoPE"),
        (dict(pool_dim=8), "pool_dim is 8, but pool 'token' is no attention pool"),
        (dict(rel_pos="table", mixed_rope=True), "rel_pos biases plain attention without RoPE"),
        (dict(rel_pos="mlp"), "rel_pos is 'mlp' and rel_pos_dim 0: an MLP has 1 unit or more"),
        (dict(rope=RopeConfig((1.0,))), "RoPE needs head_dim / 4 = 3 frequencies, got 1"),
    ],
)
def test_what_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**{**SMALL, **change})


@pytest.mark.parametrize(
    "architecture",
    ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb", "eva02_small_patch14_224",
     "vit_base_patch16_siglip_224", "vit_pwee_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256"],
)  # fmt: skip
def test_json_and_back(architecture):
    config = from_timm(timm_model(architecture, img_size=112)).config
    config = dataclasses.replace(config, position_interpolation=PositionInterpolation("bilinear", False, 0.1))
    again = ViTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)  # and so no list is left inside


def test_a_key_of_a_newer_vitreg_is_refused():
    values = ViTConfig(**SMALL).to_dict() | {"novelty": 1}
    with pytest.raises(ValueError, match=r"unknown ViTConfig keys \['novelty'\].*upgrade"):
        ViTConfig.from_dict(values)


def test_a_config_of_an_older_vitreg_gets_defaults():
    values = ViTConfig(**SMALL).to_dict()
    del values["attention_norm"]
    assert ViTConfig.from_dict(values) == ViTConfig(**SMALL)


def test_names_of_0_1_are_taken_for_one_version():
    with pytest.warns(DeprecationWarning, match="pre_norm is called norm_pre now"):
        old = ViTConfig(**SMALL, pre_norm=True)
    assert old == ViTConfig(**SMALL, norm_pre=True)
    with pytest.warns(DeprecationWarning, match="pool_norm is called fc_norm now"):
        assert dataclasses.replace(old, pool_norm=True).fc_norm
    with pytest.warns(DeprecationWarning, match="crop_fraction is called crop_pct now"):
        assert Preprocess(crop_fraction=0.9) == Preprocess(crop_pct=0.9)
    with pytest.raises(TypeError, match="colour_jitter"):
        Preprocess(colour_jitter=0.4)
