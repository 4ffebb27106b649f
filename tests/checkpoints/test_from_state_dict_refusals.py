"""State dicts inside what training scripts save, and those that fit nothing: every message says what is wrong."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from checkpoints.narrow import check, small
from peers import random_images
from vitreg import CheckpointError, from_state_dict, from_timm

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"module.backbone.{k}": v for k, v in s.items()} | {"module.head.weight": torch.zeros(3, 3)},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"teacher": {f"backbone.{k}": v for k, v in s.items()}, "student": {}},
        lambda s: {"model_ema": s, "model": {k: v + 1 for k, v in s.items()}},
    ],
    ids=["model", "state_dict", "backbone", "compiled", "ddp_compiled", "teacher", "ema"],
)
def test_wrappers_of_training_scripts_are_removed(wrap):
    model = small("vit_tiny_patch16_224")
    check(from_state_dict(wrap(model.state_dict()), "vit_tiny_patch16_224"), model, random_images(224, batch=1))


def test_a_state_dict_of_timm_round_trips():
    model = small("vit_tiny_patch16_224", num_classes=11)
    given = model.state_dict()
    kept = {key: tensor.clone() for key, tensor in given.items()}
    vit = from_state_dict(given, "vit_tiny_patch16_224")
    assert vit.config.num_classes == 11
    for key, tensor in from_timm(model).state_dict().items():
        assert torch.equal(tensor, vit.state_dict()[key])
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    assert given.keys() == kept.keys()
    assert all(torch.equal(given[key], kept[key]) for key in kept)


def test_missing_and_unexpected_keys_are_named_five_at_most():
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    few = {key: tensor for key, tensor in state.items() if key not in ("norm.weight", "blocks.1.mlp.fc1.bias")}
    with pytest.raises(CheckpointError, match=r"2 missing keys: blocks\.1\.mlp\.fc1\.bias, norm\.weight;"):
        from_state_dict(few, "vit_tiny_patch16_224")
    with pytest.raises(CheckpointError, match=r"1 unexpected keys: extra\.weight;"):
        from_state_dict({**state, "extra.weight": torch.zeros(1)}, "vit_tiny_patch16_224")
    half = {key: tensor for key, tensor in state.items() if not key.startswith("blocks.1.")}
    with pytest.raises(CheckpointError, match="12 missing keys") as caught:
        from_state_dict(half, "vit_tiny_patch16_224", source="my.pth")
    message = str(caught.value)
    assert len(re.findall(r"blocks\.1\.", message)) == 5
    assert "my.pth" in message


def test_a_wrong_shape_is_named_with_both_sizes():
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    state["blocks.0.mlp.fc1.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.fc1\.bias.*\[5\].*\[384\]"):
        from_state_dict(state, "vit_tiny_patch16_224")


def test_another_width_is_refused():
    state = timm.create_model("vit_tiny_patch16_224", embed_dim=48).state_dict()
    with pytest.raises(CheckpointError, match="is not a vit_tiny_patch16_224") as caught:
        from_state_dict(state, "vit_tiny_patch16_224")
    assert str(caught.value).count("size mismatch") == 5


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("dinov2_vitl14_rag", "dinov2_vitl14_reg"),
        ("vit_tiny_patch16_24", "vit_tiny_patch16_224"),
        ("deit3_smal_patch16_224", "deit3_small_patch16_224"),
    ],
)
def test_the_nearest_names_are_offered(typed, meant):
    with pytest.raises(CheckpointError, match=f"{typed}.*did you mean.*{meant}"):
        from_state_dict({"cls_token": torch.zeros(1, 1, 8)}, typed)


def test_transformers_names_are_sent_to_from_transformers():
    state = {"embeddings.cls_token": torch.zeros(1, 1, 8), "encoder.layer.0.norm1.weight": torch.zeros(8)}
    with pytest.raises(CheckpointError, match="from_transformers"):
        from_state_dict(state, "vit_small_patch14_dinov2")


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, {"cls_token": [1.0]}])
def test_no_weights_at_all(content):
    with pytest.raises(CheckpointError, match="holds no state dict"):
        from_state_dict(content, "vit_tiny_patch16_224")
