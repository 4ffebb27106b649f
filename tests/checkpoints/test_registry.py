"""Checkpoints by the names that people use, against timm's own list of released weights."""

from __future__ import annotations

import pytest
import timm
import torch

from vitreg import from_timm, list_models
from vitreg.checkpoints import registry
from vitreg.model import PositionInterpolation

MODELS = {model.name: model for model in registry.MODELS if not model.bundled}


def test_names_are_unique_and_every_one_has_released_weights():
    assert len({model.name for model in registry.MODELS}) == len(registry.MODELS)
    released = set(timm.list_pretrained())
    assert {model.timm for model in MODELS.values()} <= released
    assert not set(MODELS) & released


@pytest.mark.parametrize("name", MODELS)
def test_what_the_table_says_is_what_timm_builds(name):
    row = MODELS[name]
    with torch.device("meta"):
        model = timm.create_model(row.timm)
    config = from_timm(model).config
    assert (config.patch_size, config.num_registers - config.num_summary_tokens) == (row.patch_size, row.num_registers)
    assert model.pretrained_cfg["license"] == row.licence
    million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert million == pytest.approx(row.million_parameters, abs=0.06)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dino_vits8", PositionInterpolation("bicubic", antialias=False, offset=0.1)),
        ("dinov2_vitb14", PositionInterpolation("bicubic", antialias=False, offset=0.1)),
        ("dinov2_vitb14_reg", None),
        ("dinov3_vits16", None),
        ("deit3_small_patch16_224", None),
    ],
)
def test_position_rules_of_the_official_repositories(name, expected):
    assert registry.find(name).interpolation == expected


def test_find_knowsshort_names_only():
    assert registry.find("dinov2_vitl14_reg").timm == "vit_large_patch14_reg4_dinov2.lvd142m"
    assert registry.find("vit_large_patch14_reg4_dinov2.lvd142m") is None
    assert registry.find("") is None


@pytest.mark.parametrize(
    ("filter", "names"),
    [
        ("", {model.name for model in registry.MODELS}),
        ("dinov2_", {name for name in MODELS if name.startswith("dinov2_")}),
        ("DINOv2_vitS", {"dinov2_vits14", "dinov2_vits14_reg"}),
        ("*_reg", {name for name in MODELS if name.endswith("_reg")}),
        ("deit_*[yle]_patch16*", {"deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"}),
        ("deit_*_distilled_*", {f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")}),
        ("lvd142m", {name for name in MODELS if name.startswith("dinov2_")}),
        ("no such model", set()),
    ],
)
def test_list_models_filters_by_either_name(filter, names):
    assert {model.name for model in list_models(filter)} == names
