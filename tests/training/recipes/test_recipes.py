"""The recipes' configs, sizes and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import get_args

import pytest
import timm

from vitreg.model import VisionTransformer
from vitreg.training import RECIPES, clip, deit3, dinov2
from vitreg.training.engine.config import TrainingConfig
from vitreg.training.recipes.catalogue import config_from_dict
from vitreg.training.recipes.sizes import SIZES, Size, sized


def recipe_of(name, **options) -> TrainingConfig:
    return RECIPES[name](**({"teacher": "vitreg_tiny"} if name == "distill" else {}), **options)


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("smoke", [False, True])
def test_configs_survive_json(recipe, smoke):
    config = recipe_of(recipe, num_images=5000, num_classes=10, smoke=smoke)
    stored = json.loads(json.dumps(config.to_dict()))
    assert config_from_dict({**stored, "data": "beside it"}) == config
    assert config.model.num_registers == 4
    assert recipe_of(recipe, num_images=5000, num_classes=10, smoke=smoke, num_registers=0).model.num_registers == 0


@pytest.mark.parametrize(
    ("size", "architecture", "options"),
    [
        ("tiny", "vit_tiny_patch16_224", {}),
        ("small", "vit_small_patch16_224", {}),
        ("base", "vit_base_patch16_224", {}),
        ("large", "vit_large_patch16_224", {}),
        ("huge", "vit_huge_patch14_224", {}),
        ("giant", "vit_giant_patch14_reg4_dinov2", {"img_size": 224}),
    ],
)
def test_sizes_are_timms(size, architecture, options):
    import torch

    with torch.device("meta"):
        peer = timm.create_model(architecture, num_classes=7, **options)
        patch = peer.patch_embed.patch_size[0]
        registers = peer.num_reg_tokens
        model = sized(
            size, patch_size=patch, image_size=224, num_registers=registers, num_classes=7, layer_scale=size == "giant"
        )
        ours = sum(parameter.numel() for parameter in VisionTransformer(model).parameters())
    theirs = sum(parameter.numel() for parameter in peer.parameters())
    # timm's DINOv2 has a position of the class token.
    assert ours == theirs - (model.embed_dim * (peer.pos_embed.shape[1] - (224 // patch) ** 2))


def test_sizes_are_all_named():
    assert set(get_args(Size)) == set(SIZES)


def test_steps_follow_from_epochs():
    config = deit3(num_images=1000, num_classes=5, batch_size=64, epochs=3)
    assert config.num_steps == math.ceil(3 * 1000 / 64)
    assert config.optimizer.lr == pytest.approx(3e-3 * math.sqrt(64 / 2048))
    assert dinov2(num_images=10**6).num_steps == 625_000
    assert clip(num_images=4096 * 3).num_steps == 32 * 3


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", ["epochs", "batch_size", "image_size", "patch_size"])
@pytest.mark.parametrize("smoke", [False, True])
def test_zero_is_not_taken_for_the_default(recipe, name, smoke):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be above 0"):
        recipe_of(recipe, num_images=100, num_classes=5, smoke=smoke, **{name: 0})


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_what_no_recipe_lets_one_choose_is_not_ignored(recipe):
    with pytest.raises(TypeError, match="takes no 'num_steps'; choose among size, image_size"):
        recipe_of(recipe, num_images=100, num_classes=5, num_steps=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"drop_path": -0.1}, "drop_path is -0.1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"diagnose_every": -5}, "diagnose_every is -5"),
        ({"log_every": 0}, "log_every is 0"),
    ],
)
def test_settings_out_of_range(changes, message):
    config = deit3(num_images=1000, num_classes=5)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_clip_takes_no_micro_batches():
    with pytest.raises(ValueError, match="leave accumulation at 1"):
        dataclasses.replace(clip(num_images=1000), accumulation=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, "not a multiple"),
        ({"num_registers": -1}, "0 or more"),
    ],
)
def test_models_that_cannot_be(options, message):
    values = {"size": "tiny", "patch_size": 16, "image_size": 224, "num_registers": 4, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        sized(**values)


def test_an_unknown_recipe():
    stored = deit3(num_images=1000, num_classes=5).to_dict()
    with pytest.raises(ValueError, match="recipe 'moco' is unknown; choose one of deit3, dinov2, clip, distill"):
        config_from_dict({**stored, "recipe": "moco"})
    assert isinstance(config_from_dict(stored), TrainingConfig)
