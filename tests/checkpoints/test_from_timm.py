"""Parity with timm: the same weights, the same images, timm run in the same test."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from peers import FIXED_SIZE, TOLERANCE, at_size, error, errors, perturb, random_images, timm_model
from vitreg import CheckpointError, from_timm

# One of each way to build a Vision Transformer, with what timm must be told beyond its own defaults.
FAMILIES = {
    "augreg": ("vit_small_patch16_224", {}),
    "augreg_patch8": ("vit_small_patch8_224", dict(img_size=64)),
    "augreg_nonsquare": ("vit_small_patch16_224", dict(img_size=(96, 160))),
    "mae": ("vit_base_patch16_224", dict(num_classes=0)),
    "mae_finetuned": ("vit_base_patch16_224", dict(global_pool="avg")),
    "deit": ("deit_small_patch16_224", {}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "deit3_patch14": ("deit3_huge_patch14_224", dict(img_size=98)),
    "dinov2": ("vit_small_patch14_dinov2", dict(img_size=98)),
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", dict(img_size=98)),
    "dinov2_swiglu": ("vit_giant_patch14_dinov2", dict(img_size=98)),
    "dinov2_swiglu_reg": ("vit_giant_patch14_reg4_dinov2", dict(img_size=98)),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3_token": ("vit_small_patch16_dinov3", dict(global_pool="token")),
    "dinov3_qkvb": ("vit_small_patch16_dinov3_qkvb", {}),
    "dinov3_plus": ("vit_small_plus_patch16_dinov3_qkvb", {}),
    "dinov3_huge_plus": ("vit_huge_plus_patch16_dinov3_qkvb", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "clip_quickgelu": ("vit_base_patch16_clip_quickgelu_224", {}),
    "clip_patch32": ("vit_base_patch32_clip_256", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "siglip_gap": ("vit_base_patch16_siglip_gap_224", {}),
    "siglip2": ("vit_giantopt_patch16_siglip_256", {}),
    "siglip_so400m": ("vit_so400m_patch14_siglip_378", dict(img_size=126)),
    "sbb_reg1": ("vit_wee_patch16_reg1_gap_256", {}),
    "sbb_reg4": ("vit_medium_patch16_reg4_gap_256", {}),
    "sbb_parallel": ("vit_pwee_patch16_reg1_gap_256", {}),
    "sbb_differential": ("vit_dwee_patch16_reg1_gap_256", {}),
    "sbb_differential_parallel": ("vit_dpwee_patch16_reg1_gap_256", {}),
    "sbb_parallel_without_biases": ("vit_pwee_patch16_reg1_gap_256", dict(qkv_bias=False, proj_bias=False)),
    "differential_norms": (
        "vit_dlittle_patch16_reg1_gap_256",
        dict(qk_norm=True, scale_attn_norm=True, qkv_bias=False, proj_bias=False),
    ),
    "differential_parallel_without_biases": (
        "vit_dpwee_patch16_reg1_gap_256",
        dict(qk_norm=True, qkv_bias=False, proj_bias=False),
    ),
    "sbb_map": ("vit_so150m_patch16_reg4_map_256", {}),
    "sbb_rope": ("vit_medium_patch16_rope_reg1_gap_256", {}),
    "sbb_rope_reg4": ("vit_betwixt_patch16_rope_reg4_gap_256", {}),
    "rope": ("vit_small_patch16_rope_224", {}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "rope_mixed_ape": ("vit_small_patch16_rope_mixed_ape_224", {}),
    "rope_ape": ("vit_small_patch16_rope_ape_224", {}),
    "eva02": ("eva02_small_patch14_224", {}),
    "eva02_norms": ("eva02_large_patch14_224", {}),
    "eva_clip": ("eva02_base_patch16_clip_224", {}),
    "pe_spatial": ("vit_pe_spatial_small_patch16_512", dict(img_size=128)),
    "post_norm": ("vit_base_patch16_rpn_224", {}),
    "eva02_enormous": ("eva02_enormous_patch14_clip_224", dict(img_size=98)),
    "pe_core": ("vit_pe_core_base_patch16_224", {}),
    "pe_core_gigantic": ("vit_pe_core_gigantic_patch14_448", dict(img_size=98)),
    "class_token_in_pool": ("vit_small_patch16_224", dict(global_pool="map", pool_include_prefix=True)),
    "tipsv2": ("vit_base_patch14_reg1_tipsv2", dict(img_size=98)),
    "aimv2": ("aimv2_large_patch14_224", dict(img_size=98, num_heads=3)),
    "rms_parallel": ("vit_base_patch16_xp_224", {}),
    "rms_reg": ("test_vit4", {}),
    "sapiens2": ("vit_large_patch16_sapiens2", dict(img_size=96, num_kv_heads=(3, 1))),
    "qk_norm": ("vit_small_patch16_224", dict(qk_norm=True, init_values=1e-5)),
    "reg_with_positions": ("vit_small_patch16_224", dict(reg_tokens=3)),
    "naflex": ("naflexvit_base_patch16_gap", dict(pos_embed_grid_size=(6, 6))),
    "naflex_aspect_ratio": ("naflexvit_base_patch16_par_gap", dict(pos_embed_grid_size=(6, 6))),
    "naflex_factorized": ("naflexvit_base_patch16_parfac_gap", dict(pos_embed_grid_size=(6, 6))),
    "naflex_siglip": ("naflexvit_base_patch16_siglip", dict(pos_embed_grid_size=(6, 6))),
    "naflex_map": ("naflexvit_base_patch16_map", dict(pos_embed_grid_size=(6, 6), embed_proj_type="conv")),
    "radio_v3": ("naflexvit_base_patch16_radio_v3", dict(pos_embed_grid_size=(9, 9))),
    "radio_v4": ("naflexvit_so400m_patch16_radio_v4", dict(pos_embed_grid_size=(9, 9), num_classes=0)),
    "beit": ("beit_base_patch16_224", {}),
    "beit_absolute": ("beitv2_base_patch16_224", dict(use_abs_pos_emb=True, global_pool="token")),
    "beit_shared": ("beit_base_patch16_224", dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)),
    "relpos": ("vit_relpos_small_patch16_224", {}),
    "relpos_shared": ("vit_srelpos_small_patch16_224", {}),
    "relpos_class_token": ("vit_relpos_medium_patch16_cls_224", {}),
    "relpos_post_norm": ("vit_relpos_small_patch16_rpn_224", {}),
    "relpos_table": ("vit_relpos_medium_patch16_cls_224", dict(rel_pos_type="bias")),
}
# Not in the oldest timm that is supported.
FAMILIES = {name: family for name, family in FAMILIES.items() if timm.is_model(family[0])}
HAS_HEAD = {name for name, (_, options) in FAMILIES.items() if options.get("num_classes") != 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_pooled_feature_and_logits_equal_timms(family):
    architecture, options = FAMILIES[family]
    model = timm_model(architecture, **options)
    vit = from_timm(model)
    patch, (height, width) = vit.config.patch_size, vit.config.image_size
    larger = (height + 3 * patch, width + 3 * patch)
    for size in ((height, width), larger, (height + patch, width - 2 * patch), (2 * patch, 3 * patch)):
        found = errors(vit, model, random_images(*size))
        assert ("logits" in found) == (family in HAS_HEAD)
        assert ("registers" in found) == bool(vit.num_registers)
        assert max(found.values()) <= TOLERANCE, (size, found)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_parameter_counts(family):
    """Guards the test above: a weight that no output depends on could be converted wrongly unnoticed."""
    architecture, options = FAMILIES[family]
    model = timm_model(architecture, **options)
    images = random_images(4 * timm_patch(model), batch=1)
    model = at_size(model, images)

    def outputs():
        sequence = model.forward_features(images)
        return sequence, model.forward_head(sequence)

    before = outputs()
    for name, parameter in model.named_parameters():
        if name.endswith("k_norm.bias") and getattr(model, "rope", None) is None:
            continue  # without RoPE it adds the same to every logit of a row
        if name.endswith("rel_pos.mlp.fc2.bias") and model.cls_token is None:
            continue  # so does this
        kept = parameter.clone()
        # The norm after differential attention undoes most of what lambda changes.
        parameter.add_((1.0 if "lambda" in name else 0.1) * torch.randn_like(parameter))
        assert max(map(error, outputs(), before)) > 10 * TOLERANCE, name
        parameter.copy_(kept)


def timm_patch(model) -> int:
    embeds = getattr(model, "embeds", None) or model.patch_embed
    return embeds.patch_size[0]


# What vitreg refuses: the pattern in the message, and every architecture of timm 1.0.31 that it is for.
REFUSED = {
    "registers in its pooling": "test_vit3",
    "blocks of type": "_18x2_",
}
ARCHITECTURES = [
    name
    for module in ("vision_transformer", "eva", "deit", "naflexvit", *FIXED_SIZE)
    for name in timm.list_models(module=module)
]


def expected_refusal(architecture: str) -> str | None:
    return next(
        (why for why, names in REFUSED.items() if any(part in architecture for part in names.split("|"))),
        None,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_timm_architecture_is_equal_or_refused(architecture):
    side = 4 * (14 if "patch14" in architecture else 32 if "patch32" in architecture else 16)
    options = dict(depth=2, embed_dim=48, num_heads=3, num_classes=5, img_size=side)
    if timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2] not in (*FIXED_SIZE, "naflexvit"):
        options["dynamic_img_size"] = True
    if "sapiens2" in architecture:
        options.update(num_kv_heads=(3, 1))
    model = perturb(timm.create_model(architecture, **options))
    if (why := expected_refusal(architecture)) is not None:
        with pytest.raises(CheckpointError, match=why):
            from_timm(model)
        return
    vit = from_timm(model)
    assert vit.config.architecture == architecture
    found = errors(vit, model, random_images(side, side + 2 * timm_patch(model), batch=1))
    assert max(found.values()) <= TOLERANCE, found


FULL_SIZE = {
    "vit_small_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_medium_patch16_reg4_gap_256": {},
    "vit_base_patch14_reg4_dinov2": dict(img_size=224),
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_siglip_224": {},
}


@pytest.mark.parametrize("architecture", FULL_SIZE)
def test_full_size_models_equal_timms(architecture):
    model = perturb(timm.create_model(architecture, num_classes=10, **FULL_SIZE[architecture]))
    vit = from_timm(model)
    found = errors(vit, model, random_images(*vit.config.image_size, batch=1))
    assert max(found.values()) <= 1e-4, found


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("family", ["deit3", "dinov3_plus", "siglip", "sbb_reg4", "sbb_differential"])
def test_half_precision_is_as_close_to_float32_as_timms(family, dtype, precision):
    architecture, options = FAMILIES[family]
    model, images = timm_model(architecture, **options), random_images(96)
    vit = from_timm(model)
    with torch.no_grad():
        expected = vit(images).patches
        model.to(dtype)
        ours = from_timm(model)(images).patches
        theirs = model.forward_features(images.to(dtype))[:, model.num_prefix_tokens :]
    assert ours.dtype == dtype
    assert error(ours, expected) <= min(16 * precision, 2 * error(theirs, expected))


def test_the_original_is_left_untouched_and_shares_no_memory():
    model, images = timm_model("vit_small_patch14_reg4_dinov2", img_size=98), random_images(98)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vit = from_timm(model)
    expected = model(images)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(images), expected)


def test_a_fine_tuned_model_without_pretrained_cfg_converts():
    model = perturb(timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=96, depth=2, num_heads=3, num_classes=3, drop_rate=0.5,
        drop_path_rate=0.5, attn_drop_rate=0.5, dynamic_img_size=True,
    )).train()  # fmt: skip
    vit = from_timm(model)
    assert not vit.training
    assert max(errors(vit, model.eval(), random_images(64, 96)).values()) <= TOLERANCE


def test_the_config_says_where_the_weights_are_from():
    model = timm.create_model("vit_small_patch14_reg4_dinov2.lvd142m", depth=1, img_size=224)
    vit = from_timm(model)
    assert (vit.config.name, vit.config.architecture) == (
        "vit_small_patch14_reg4_dinov2.lvd142m",
        "vit_small_patch14_reg4_dinov2",
    )
    assert (vit.num_registers, vit.preprocess.size, vit.preprocess.multiple_of) == (4, (224, 224), 14)
    assert vit.preprocess.mean == (0.485, 0.456, 0.406)


def test_a_model_without_memory_converts_with_its_rope():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_dinov3_qkvb")
    vit = from_timm(model)
    assert all(parameter.is_meta for parameter in vit.parameters())
    assert vit.config.rope == from_timm(timm.create_model("vit_small_patch16_dinov3_qkvb", depth=1)).config.rope


def with_scalar_lambdas():
    model = timm_model("vit_dwee_patch16_reg1_gap_256")
    model.blocks[0].attn = timm.layers.DiffAttention(96, 3, dual_lambda=True)
    return model


def without_schedule():
    model = timm_model("vit_dpwee_patch16_reg1_gap_256")
    model.blocks[1].set_lambda_init(0)
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: nn.Linear(2, 2), "Linear is not a timm VisionTransformer .* from_transformers"),
        (lambda: timm.create_model("resnet18"), "ResNet is not a timm VisionTransformer"),
        (lambda: timm_model("vit_small_patch16_224", in_chans=4), "4 input channels"),
        (lambda: timm_model("vit_small_patch16_224", patch_size=(8, 16)), r"patches of \(8, 16\) pixels"),
        (lambda: timm_model("vit_small_patch16_224", act_layer=nn.ReLU), "the activation ReLU"),
        (
            lambda: timm_model("naflexvit_base_patch16_parfac_gap", pos_embed_grid_size=(6, 5)),
            "positions of two axes of 6 and 5 patches that keep the aspect ratio",
        ),
        (with_scalar_lambdas, r"scalar lambdas \(dual_lambda\)"),
        (without_schedule, "a lambda_init in block 1 that is not the paper's"),
    ],
    ids=["linear", "resnet", "channels", "patches", "activation", "axes", "dual_lambda", "lambda_init"],
)
def test_what_is_not_implemented_is_refused_by_name(model, why):
    with pytest.raises(CheckpointError, match=why):
        from_timm(model())
