"""Classes of transformers with a part of their own: parity at any size, the peer run in the same test."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from checkpoints.transformers_models import BASE, MLP, SIZES, SQUARE, close, hf, images, perturb, same_tokens
from vitreg import CheckpointError
from vitreg.checkpoints.from_transformers import from_transformers

TOWER = {**BASE, **MLP, **SQUARE}
LLAMA4 = {"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32}  # 4 x 32 to its adapter


def build(name: str, module: str, **options: Any) -> Any:
    """A small model with all parameters perturbed."""
    try:
        found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        kind = getattr(hf, name, None) or getattr(found, name)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {name}")
    config = kind.config_class(**{**TOWER, **options})
    config._attn_implementation = "eager"
    return perturb(kind(config))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_distilled_deit(size):
    x = images(*size)
    theirs = build("DeiTModel", "deit")
    vit = from_transformers(theirs)
    expected = theirs(x, interpolate_pos_encoding=True).last_hidden_state
    same_tokens(vit, x, expected)
    close(vit.pool(vit(x)), expected[:, :2].flatten(1))
    for kind in ("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"):
        theirs = build(kind, "deit", num_labels=7)
        close(from_transformers(theirs).classify(x), theirs(x, interpolate_pos_encoding=True).logits)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options", [{}, {"attention_bias": True, "use_mean_pooling": False}, {"norm_type": "rms_norm"}]
)
@torch.no_grad()
def test_internvl(size, options):
    theirs = build("InternVLVisionModel", "internvl", **{"image_size": (56, 56), "patch_size": (14, 14)} | options)
    x = images(*size)
    same_tokens(from_transformers(theirs), x, theirs(x).last_hidden_state)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_phi4(size):
    theirs, x = build("Phi4MultimodalVisionModel", "phi4_multimodal"), images(*size)
    vit, expected = from_transformers(theirs), theirs(x)
    same_tokens(vit, x, expected.last_hidden_state)
    close(vit.pool(vit(x)), expected.pooler_output)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_pixtral_turns_rows_and_columns_by_other_frequencies(size):
    theirs, x = build("PixtralVisionModel", "pixtral"), images(*size)
    expected = theirs(x).last_hidden_state.unflatten(1, (len(x), -1))[0]  # all images are one sequence
    same_tokens(from_transformers(theirs), x, expected)


@torch.no_grad()
def test_llama4_with_its_class_token_last():
    """It reads images of one size."""
    theirs, x = build("Llama4VisionModel", "llama4", **LLAMA4), images(56, 56)
    seen: list[torch.Tensor] = []
    theirs.layernorm_post.register_forward_hook(lambda _m, _i, output: seen.append(output))
    theirs(x)
    same_tokens(from_transformers(theirs), x, seen[0].roll(1, 1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"use_head": False}, {"qkv_bias": True, "mlp_bias": True}])
@torch.no_grad()
def test_aimv2_native(size, options):
    theirs, x = build("Aimv2VisionModel", "aimv2", is_native=True, **options), images(*size)
    vit, expected = from_transformers(theirs), theirs(x)
    same_tokens(vit, x, expected.last_hidden_state)
    if expected.pooler_output is not None:
        close(vit.pool(vit(x)), expected.pooler_output)


@torch.no_grad()
def test_aimv2_with_learned_positions():
    """It reads images of one size; at others its table is resized."""
    theirs, x = build("Aimv2VisionModel", "aimv2", is_native=False), images(56, 56)
    vit = from_transformers(theirs)
    same_tokens(vit, x, theirs(x).last_hidden_state)
    assert vit.config.position_interpolation.mode == "bicubic"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"use_swiglu_ffn": True, "qkv_bias": False}, {"max_img_size": 70}])
@torch.no_grad()
def test_radio_normalizes_by_itself_and_has_several_summary_tokens(size, options):
    theirs = build("RadioModel", "radio", **{"max_img_size": 112, "num_registers": 2, "mlp_ratio": 2.0} | options)
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    vit, expected = from_transformers(theirs), theirs(x)
    same_tokens(vit, x, expected.last_hidden_state)
    close(vit.pool(vit(x)), expected.summary)
    assert (vit.config.num_registers, vit.config.num_summary_tokens) == (4, 1)
    assert (vit.preprocess.size, vit.preprocess.std) == ((56, 56), (1.0,) * 3)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_pixio_with_several_class_tokens(size):
    theirs, x = build("PixioModel", "pixio", n_cls_tokens=4, mlp_ratio=2), images(*size)
    same_tokens(from_transformers(theirs), x, theirs(x).last_hidden_state)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_yolos_with_its_detection_tokens_last(size):
    options = {"image_size": (56, 56), "num_detection_tokens": 3, "use_mid_position_embeddings": False}
    theirs, x = build("YolosModel", "yolos", **options), images(*size)
    expected = theirs(x).last_hidden_state
    same_tokens(from_transformers(theirs), x, torch.cat([expected[:, :1], expected[:, -3:], expected[:, 1:-3]], dim=1))


@torch.no_grad()
def test_vitpose_with_padded_patches():
    """It reads images of one size."""
    theirs, x = build("VitPoseBackbone", "vitpose_backbone", image_size=(56, 42), mlp_ratio=2), images(56, 42)
    same_tokens(from_transformers(theirs), x, theirs(x).feature_maps[-1])


@torch.no_grad()
def test_a_vit_of_timm_inside_of_transformers():
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 64}
    config = hf.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=options, do_pooling=False)
    theirs, x = perturb(hf.TimmWrapperModel(config)), images(64, 64)
    vit = from_transformers(theirs)
    assert vit.config.name.endswith("(timm_model)")
    same_tokens(vit, x, theirs(x).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "module", "options", "message"),
    [
        ("YolosModel", "yolos", {"image_size": (56, 56)}, "positions between its blocks"),
        ("VitPoseBackbone", "vitpose_backbone", {"num_experts": 2, "part_features": 8}, "a mixture of experts"),
        ("RadioModel", "radio", {"summary_idxs": [0, 2]}, r"a summary of tokens \[0, 2\]"),
        (
            *("InternVLVisionModel", "internvl"),
            {"image_size": (56, 56), "patch_size": (14, 14), "use_qk_norm": True},
            "queries and keys over all heads",
        ),
    ],
)
def test_what_would_bend_the_model_is_refused_by_name(name, module, options, message):
    with pytest.raises(CheckpointError, match=message):
        from_transformers(build(name, module, **options))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", ["Beit", "Data2VecVision"])
@torch.no_grad()
def test_beit(family, shared, size):
    x = images(*size)
    options = {"use_shared_relative_position_bias": shared, "use_relative_position_bias": not shared, "num_labels": 7}
    for mean in (True, False):
        theirs = build(f"{family}Model", "beit", **options, use_mean_pooling=mean)
        vit, expected = from_transformers(theirs), theirs(x)
        same_tokens(vit, x, expected.last_hidden_state)
        if expected.pooler_output is not None:
            close(vit.pool(vit(x)), expected.pooler_output)
        theirs = build(f"{family}ForImageClassification", "beit", **options, use_mean_pooling=mean)
        close(from_transformers(theirs).classify(x), theirs(x).logits)
