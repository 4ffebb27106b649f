"""State dicts as the official repositories write them.

Each is made from a timm model by renaming its weights to the repository's names, rule by rule, so that timm's
own class with the original weights says what the features must be.
"""

from __future__ import annotations

import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.narrow import check, small
from peers import TOLERANCE, error, perturb, random_images
from vitreg import from_state_dict

State = dict[str, Tensor]
pytestmark = pytest.mark.usefixtures("narrow")


def renamed(state: State, *rules: tuple[str, str]) -> State:
    def rename(key: str) -> str:
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        return key

    return {rename(key): tensor for key, tensor in state.items()}


# --- DINOv2 ---------------------------------------------------------------------------------------


def dinov2_state(model) -> State:
    """Names of facebookresearch/dinov2: the class token has a position of its own, also beside registers."""
    state = renamed(model.state_dict(), (r"^reg_token$", "register_tokens"))
    if type(model.blocks[0].mlp).__name__ == "GluMlp":
        state = renamed(state, (r"mlp\.fc1\.", "mlp.w12."), (r"mlp\.fc2\.", "mlp.w3."))
    if model.no_embed_class:
        of_cls = 0.1 * torch.randn(1, 1, model.embed_dim)
        state["pos_embed"] = torch.cat([of_cls, state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - of_cls
    state["mask_token"] = torch.randn(1, model.embed_dim)
    return state


def dinov2_interpolate_pos_encoding(pos_embed: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """`interpolate_pos_encoding` of dinov2/models/vision_transformer.py with hub/backbones.py's defaults.

    interpolate_offset=0.1, interpolate_antialias=False; `height` and `width` in pixels.
    """
    dim = pos_embed.shape[-1]
    class_pos_embed, patch_pos_embed = pos_embed[:, 0], pos_embed[:, 1:]
    M = int(math.sqrt(patch_pos_embed.shape[1]))
    w0, h0 = height // patch_size, width // patch_size  # the official code calls the first image axis w
    sx, sy = float(w0 + 0.1) / M, float(h0 + 0.1) / M
    patch_pos_embed = F.interpolate(
        patch_pos_embed.reshape(1, M, M, dim).permute(0, 3, 1, 2),
        mode="bicubic",
        antialias=False,
        scale_factor=(sx, sy),
    )
    assert (w0, h0) == patch_pos_embed.shape[-2:]
    patch_pos_embed = patch_pos_embed.permute(0, 2, 3, 1).view(1, -1, dim)
    return torch.cat((class_pos_embed.unsqueeze(0), patch_pos_embed), dim=1)


def with_official_positions(model, architecture: str, height: int, width: int, **options):
    """timm's model built for this size, its position table the official interpolation of the original one."""
    patch = model.patch_embed.patch_size[0]
    resized = small(architecture, img_size=(height, width), **options)
    state = model.state_dict()
    state["pos_embed"] = dinov2_interpolate_pos_encoding(state["pos_embed"], height, width, patch)
    resized.load_state_dict(state)
    return resized


@pytest.mark.parametrize("size", [(98, 98), (224, 224), (154, 238), (560, 532)])
def test_dinov2_resizes_positions_as_the_official_repository(size):
    """D7: a scale factor with offset 0.1 without antialiasing shows in the features (transformers #32175)."""
    model = small("vit_small_patch14_dinov2")
    vit = from_state_dict(dinov2_state(model), "vit_small_patch14_dinov2")
    images = random_images(*size, batch=1)
    check(vit, with_official_positions(model, "vit_small_patch14_dinov2", *size), images)
    with torch.no_grad():  # and timm's own rule is another one, so the test above can fail
        assert error(vit(images).patches, model.forward_features(images)[:, 1:]) > 10 * TOLERANCE


def test_dinov2_equals_timm_at_its_own_size():
    model = small("vit_small_patch14_dinov2")
    vit = from_state_dict(dinov2_state(model), "dinov2_vits14")
    assert (vit.config.name, vit.config.image_size) == ("vit_small_patch14_dinov2.lvd142m", (518, 518))
    check(vit, model, random_images(518, batch=1))


@pytest.mark.parametrize("size", [(98, 98), (154, 238)])
def test_dinov2_with_registers_resizes_positions_with_antialiasing(size):
    """`hub/backbones.py`: offset 0.0 and antialias True for the `_reg` models, which is timm's rule."""
    model = small("vit_small_patch14_reg4_dinov2")
    vit = from_state_dict(dinov2_state(model), "dinov2_vits14_reg")
    assert vit.num_registers == 4
    check(vit, model, random_images(*size, batch=1))


@pytest.mark.parametrize("architecture", ["vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"])
def test_dinov2_giant_has_w12_and_w3(architecture):
    model = small(architecture)
    state = dinov2_state(model)
    assert {"blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.bias"} <= set(state)
    check(from_state_dict(state, architecture), model, random_images(518, batch=1))


def test_dinov2_of_another_training_size():
    model = small("vit_small_patch14_dinov2", img_size=224)
    vit = from_state_dict(dinov2_state(model), "vit_small_patch14_dinov2")
    assert vit.config.image_size == (224, 224)
    check(vit, model, random_images(224, batch=1))


# --- DINO -----------------------------------------------------------------------------------------


def test_dino_by_its_short_name_resizes_positions_as_the_official_repository():
    model = small("vit_small_patch16_224")
    vit = from_state_dict(model.state_dict(), "dino_vits16")
    for size in ((480, 480), (96, 320)):
        expected = with_official_positions(model, "vit_small_patch16_224", *size)
        check(vit, expected, random_images(*size, batch=1))
    timms = from_state_dict(model.state_dict(), "vit_small_patch16_224")  # the same names, but no DINO
    check(timms, model, random_images(96, 320, batch=1))


def test_dino_training_checkpoint_gives_the_teacher():
    teacher, student = small("vit_small_patch16_224"), small("vit_small_patch16_224")
    student.cls_token.data += 1
    checkpoint = {
        "student": {f"module.backbone.{k}": v for k, v in student.state_dict().items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.state_dict().items()}
        | {"head.mlp.0.weight": torch.randn(8, 96), "head.last_layer.weight_v": torch.randn(8, 8)},
        "epoch": 3,
    }
    check(from_state_dict(checkpoint, "vit_small_patch16_224"), teacher, random_images(224, batch=1))


# --- DINOv3 ---------------------------------------------------------------------------------------


def dinov3_state(model, architecture: str) -> State:
    """Names of facebookresearch/dinov3, with everything its files hold besides."""
    state = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("attn.q_bias"):
            key = key.replace("q_bias", "qkv.bias")
            v_bias = model.state_dict()[key.replace("qkv.bias", "v_bias")]
            # the file's key bias is not zero, but masked
            tensor = torch.cat([tensor, torch.randn_like(tensor), v_bias])
            state[key.replace("qkv.bias", "qkv.bias_mask")] = torch.cat(
                [torch.ones_like(v_bias), torch.full_like(v_bias, math.nan), torch.ones_like(v_bias)]
            )
        elif key.endswith("attn.v_bias"):
            continue
        state[key] = tensor
    state = renamed(state, (r"gamma_(\d)", r"ls\1.gamma"), ("^reg_token$", "storage_tokens"))
    if "plus" in architecture:  # SwiGLU
        state = renamed(state, (r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"), (r"mlp\.fc2", "mlp.w3"))
    state["rope_embed.periods"] = model.rope.periods.to(torch.bfloat16)
    state["mask_token"] = torch.randn(1, model.embed_dim)
    state["local_cls_norm.weight"] = torch.randn(model.embed_dim)
    state["local_cls_norm.bias"] = torch.randn(model.embed_dim)
    return state


@pytest.mark.parametrize("architecture", ["vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"])
def test_dinov3_keeps_masked_key_bias_and_rounded_periods(architecture):
    model = small(architecture, global_pool="token")
    state = dinov3_state(model, architecture)
    vit = from_state_dict(state, architecture)
    images = random_images(256, 320, batch=1)
    model.rope.periods.copy_(state["rope_embed.periods"].float())  # timm computes them in float32
    check(vit, model, images)
    rounded = model.forward_features(images)
    model.rope._init_buffers()
    assert error(rounded, model.forward_features(images)) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["dinov3_vits16", "vit_small_patch16_dinov3", "vit_small_patch16_dinov3.lvd1689m"])
def test_dinov3_biases_are_kept_under_every_name(name):
    """timm's architectures without `_qkvb` have no place for the biases of the official file."""
    model = small("vit_small_patch16_dinov3_qkvb", global_pool="token")
    state = dinov3_state(model, "vit_small_patch16_dinov3_qkvb")
    model.rope.periods.copy_(state["rope_embed.periods"].float())
    vit = from_state_dict(state, name)
    images = random_images(128, batch=1)
    check(vit, model, images)
    assert error(vit.pool(vit(images)), model(images)) <= TOLERANCE


# --- DeiT, MAE ------------------------------------------------------------------------------------


def test_deit3_has_gammas_and_a_wrapper():
    model = small("deit3_small_patch16_224", num_classes=1000)
    state = renamed(model.state_dict(), (r"ls(\d)\.gamma", r"gamma_\1"))
    assert "blocks.0.gamma_1" in state
    vit = from_state_dict({"model": state}, "deit3_small_patch16_224")
    for size in ((224, 224), (160, 256)):
        images = random_images(*size, batch=1)
        check(vit, model, images)
        assert error(vit.classify(images), model(images)) <= TOLERANCE


def test_mae_pretraining_checkpoint_gives_the_encoder():
    model = small("vit_base_patch16_224")
    decoder = {
        "mask_token": torch.randn(1, 1, 512),
        "decoder_pos_embed": torch.randn(1, 197, 512),
        "decoder_embed.weight": torch.randn(512, 768),
        "decoder_blocks.0.norm1.weight": torch.randn(512),
        "decoder_norm.weight": torch.randn(512),
        "decoder_pred.bias": torch.randn(768),
    }
    vit = from_state_dict({"model": {**model.state_dict(), **decoder}, "epoch": 1}, "mae_vitb16")
    check(vit, model, random_images(224, batch=1))
    check(vit, model, random_images(160, 256, batch=1))


# --- CLIP -----------------------------------------------------------------------------------------


def clip_state(model) -> State:
    """Names of openai/CLIP and open_clip, with a piece of the text tower; the projection has no bias."""
    state = renamed(
        model.state_dict(),
        (r"^patch_embed\.proj\.", "visual.conv1."),
        (r"^norm_pre\.", "visual.ln_pre."),
        (r"^norm\.", "visual.ln_post."),
        (r"^blocks\.(\d+)\.", r"visual.transformer.resblocks.\1."),
        (r"\.norm([12])\.", r".ln_\1."),
        (r"\.attn\.qkv\.", ".attn.in_proj_"),
        (r"\.attn\.proj\.", ".attn.out_proj."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    )
    state["visual.class_embedding"] = state.pop("cls_token").flatten()
    state["visual.positional_embedding"] = state.pop("pos_embed")[0]
    state["visual.proj"] = state.pop("head.weight").T
    assert not state.pop("head.bias").any()
    return state


def clip_model(architecture: str, **options):
    model = small(architecture, **{"num_classes": 512, **options})
    model.head.bias.data.zero_()
    return model


TEXT = {
    "positional_embedding": torch.zeros(77, 512),
    "text_projection": torch.zeros(512, 512),
    "logit_scale": torch.tensor(4.6),
    "transformer.resblocks.0.ln_1.weight": torch.zeros(512),
    "token_embedding.weight": torch.zeros(8, 512),
    "ln_final.weight": torch.zeros(512),
}


@pytest.mark.parametrize("wrap", ["whole", "module", "state_dict", "visual"])
@pytest.mark.parametrize("architecture", ["vit_base_patch32_clip_quickgelu_224", "vit_base_patch32_clip_224"])
def test_clip_under_openai_and_open_clip_names(architecture, wrap):
    model = clip_model(architecture)
    state = clip_state(model)
    wrapped = {
        "whole": lambda: state | TEXT,
        "module": lambda: {f"module.{key}": tensor for key, tensor in (state | TEXT).items()},
        "state_dict": lambda: {
            "state_dict": {f"module.{k}": v for k, v in (state | TEXT).items()},
            "epoch": 32,
        },
        "visual": lambda: {key.removeprefix("visual."): tensor for key, tensor in state.items()},
    }[wrap]()
    vit = from_state_dict(wrapped, architecture)
    for size in ((224, 224), (160, 256)):
        images = random_images(*size, batch=1)
        check(vit, model, images)
        assert error(vit.classify(images), model(images)) <= TOLERANCE


def test_clip_of_another_image_size_keeps_its_own_positions():
    model = clip_model("vit_base_patch32_clip_quickgelu_224", img_size=320)
    vit = from_state_dict(clip_state(model), "vit_base_patch32_clip_quickgelu_224")
    assert vit.config.image_size == (320, 320)
    check(vit, model, random_images(320, batch=1))


def test_siglip_under_open_clip_names():
    model = small("vit_base_patch16_siglip_224")
    state = {f"visual.trunk.{key}": tensor for key, tensor in model.state_dict().items()}
    vit = from_state_dict(state | {"logit_bias": torch.tensor(-10.0)}, "vit_base_patch16_siglip_224")
    images = random_images(224, batch=1)
    check(vit, model, images)
    assert error(vit.pool(vit(images)), model(images)) <= TOLERANCE


@pytest.mark.parametrize("architecture", ["beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_relative_positions_go_through_their_own_converter(narrow, architecture):
    model = perturb(timm.create_model(architecture, num_classes=0))
    check(from_state_dict(model.state_dict(), architecture), model, random_images(224, batch=1))
