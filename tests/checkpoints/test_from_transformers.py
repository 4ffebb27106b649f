"""Parity with transformers: the same weights, the same images, the peer run in the same test."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from checkpoints.transformers_models import (
    BASE,
    MLP,
    SIZES,
    SQUARE,
    clip_config,
    close,
    dinov2_config,
    dinov3_model,
    error,
    hf,
    images,
    perturb,
    same_tokens,
    siglip2_config,
    siglip_config,
    vit_model,
)
from vitreg.checkpoints.from_transformers import from_transformers
from vitreg.checkpoints.state import CheckpointError


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": False}, {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}]
)
@torch.no_grad()
def test_vit(size, options):
    theirs = perturb(vit_model(**options))
    vit, x = from_transformers(theirs), images(*size)
    expected = theirs(x, interpolate_pos_encoding=True).last_hidden_state
    same_tokens(vit, x, expected)
    close(vit.pool(vit(x)), expected[:, 0])
    assert vit.head is None


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_vit_classifier(size):
    theirs = perturb(hf.ViTForImageClassification(hf.ViTConfig(**BASE, **MLP, **SQUARE, num_labels=7)))
    x = images(*size)
    close(from_transformers(theirs).classify(x), theirs(x, interpolate_pos_encoding=True).logits)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_mae_encoder_without_masking(size):
    config = hf.ViTMAEConfig(**BASE, **MLP, **SQUARE, decoder_hidden_size=16, decoder_num_attention_heads=2)
    config.mask_ratio, config.decoder_num_hidden_layers = 0.0, 1
    for theirs in (hf.ViTMAEModel(config), hf.ViTMAEForPreTraining(config)):
        encoder = getattr(perturb(theirs), "vit", theirs)
        vit, x = from_transformers(theirs), images(*size)
        output = encoder(x, interpolate_pos_encoding=True)
        # transformers shuffles the patches even where none is masked.
        order = output.ids_restore.unsqueeze(-1).expand(-1, -1, 32)
        patches = output.last_hidden_state[:, 1:].gather(1, order)
        same_tokens(vit, x, torch.cat([output.last_hidden_state[:, :1], patches], dim=1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_swiglu_ffn": True}, {"qkv_bias": False}])
@torch.no_grad()
def test_dinov2(size, registers, options):
    config = dinov2_config(registers, **options)
    theirs = perturb((hf.Dinov2WithRegistersModel if registers else hf.Dinov2Model)(config))
    vit, x = from_transformers(theirs), images(*size)
    expected = theirs(x)
    assert vit.num_registers == 4 * registers
    same_tokens(vit, x, expected.last_hidden_state)
    close(vit.pool(vit(x)), expected.pooler_output)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("registers", [False, True])
@torch.no_grad()
def test_dinov2_classifier(size, registers):
    kind = hf.Dinov2WithRegistersForImageClassification if registers else hf.Dinov2ForImageClassification
    theirs = perturb(kind(dinov2_config(registers, num_labels=7)))
    x = images(*size)
    close(from_transformers(theirs).classify(x), theirs(x).logits)


@pytest.mark.parametrize("kind", ["Dinov2Backbone", "Dinov2WithRegistersBackbone", "DINOv3ViTBackbone"])
@torch.no_grad()
def test_backbone_feature_map(kind):
    if not hasattr(hf, kind):
        pytest.skip(f"this transformers has no {kind}")
    if kind == "DINOv3ViTBackbone":
        config = hf.DINOv3ViTConfig(**BASE, **MLP, **SQUARE, num_register_tokens=4, out_features=["stage2"])
    else:
        config = dinov2_config("Registers" in kind, out_features=["stage2"])
    theirs = perturb(getattr(hf, kind)(config))
    x = images(56, 70)
    close(from_transformers(theirs)(x).patch_map(), theirs(x).feature_maps[-1])


@torch.no_grad()
def test_transformers_issue_37817_registers_never_averaged():
    """Up to 4.51 transformers averaged the registers into the classifier's mean of the patches."""
    theirs = perturb(hf.Dinov2WithRegistersForImageClassification(dinov2_config(True, num_labels=7)))
    vit = from_transformers(theirs)
    tokens = vit(images(56, 56))
    expected = torch.cat([tokens.cls, tokens.patches.mean(1)], dim=-1)
    torch.testing.assert_close(vit.pool(tokens), expected, rtol=0, atol=0)


@torch.no_grad()
def test_transformers_issue_32175_position_rule():
    """Features depend on the rule by which positions are resized: each class keeps its own."""
    x = images(28, 42)
    plain = perturb(hf.Dinov2Model(dinov2_config(False)))
    registers = perturb(hf.Dinov2WithRegistersModel(dinov2_config(True)))
    rules = [from_transformers(m).config.position_interpolation for m in (plain, registers)]
    assert [(r.mode, r.antialias, r.offset) for r in rules] == [
        ("bicubic", False, 0.0),
        ("bicubic", True, 0.0),
    ]
    vit = from_transformers(plain)
    close(vit(x).patches, plain(x).last_hidden_state[:, 1:])
    vit.config = dataclasses.replace(vit.config, position_interpolation=rules[1])
    assert error(vit(x).patches, plain(x).last_hidden_state[:, 1:]) > 1e-2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_gated_mlp": True, "hidden_act": "silu"},
        {"use_gated_mlp": True},
        {"key_bias": True, "num_register_tokens": 0},
        {"query_bias": False, "proj_bias": False, "mlp_bias": False},
        {"query_bias": False, "value_bias": False, "rope_theta": 10.0},
    ],
)
@torch.no_grad()
def test_dinov3(size, options):
    theirs = perturb(dinov3_model(**options))
    vit, x = from_transformers(theirs), images(*size)
    expected = theirs(x)
    same_tokens(vit, x, expected.last_hidden_state)
    close(vit.pool(vit(x)), expected.pooler_output)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_clip(size):
    theirs = perturb(hf.CLIPModel(clip_config()))
    vit, x = from_transformers(theirs), images(*size)
    expected = theirs.vision_model(x, interpolate_pos_encoding=True)
    same_tokens(vit, x, expected.last_hidden_state)
    close(vit.pool(vit(x)), expected.pooler_output)
    close(vit.classify(x), theirs.visual_projection(expected.pooler_output))
    assert not vit(x).normed


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_clip_vision_model(size):
    theirs = perturb(hf.CLIPVisionModel(clip_config().vision_config))
    vit, x = from_transformers(theirs), images(*size)
    expected = theirs(x, interpolate_pos_encoding=True)
    same_tokens(vit, x, expected.last_hidden_state)
    close(vit.pool(vit(x)), expected.pooler_output)
    assert vit.head is None


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_clip_vision_model_with_projection(size):
    theirs = perturb(hf.CLIPVisionModelWithProjection(clip_config().vision_config))
    vit, x = from_transformers(theirs), images(*size)
    expected = theirs(x, interpolate_pos_encoding=True)
    same_tokens(vit, x, expected.last_hidden_state)
    close(vit.classify(x), expected.image_embeds)
    assert not vit.config.head_bias


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_siglip(size):
    x = images(*size)
    for theirs in (hf.SiglipModel(siglip_config()), hf.SiglipVisionModel(siglip_config().vision_config)):
        tower = getattr(perturb(theirs), "vision_model", theirs)
        expected = tower(x, interpolate_pos_encoding=True)
        vit = from_transformers(theirs)
        same_tokens(vit, x, expected.last_hidden_state)
        close(vit.pool(vit(x)), expected.pooler_output)
    theirs = perturb(hf.SiglipVisionModel(siglip_config(vision_use_head=False).vision_config))
    same_tokens(from_transformers(theirs), x, theirs(x, interpolate_pos_encoding=True).last_hidden_state)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_siglip_classifier_averages_the_patches(size):
    config = siglip_config()
    config.num_labels = 7
    theirs = perturb(hf.SiglipForImageClassification(config))
    vit, x = from_transformers(theirs), images(*size)
    close(vit.classify(x), theirs(x, interpolate_pos_encoding=True).logits)
    assert vit.attention_pool is None


def naflex(x: torch.Tensor, patch: int = 14) -> dict[str, torch.Tensor]:
    """What SigLIP 2's own image processor makes of images that need no resizing."""
    from transformers.models.siglip2 import image_processing_siglip2 as processing

    numpy = int(hf.__version__.split(".")[0]) < 5  # there images are arrays, channels last
    images = x.permute(0, 2, 3, 1).numpy() if numpy else x
    patches = [torch.as_tensor(processing.convert_image_to_patches(image, patch)) for image in images]
    patches = torch.stack(patches)
    shape = torch.tensor([[x.shape[2] // patch, x.shape[3] // patch]]).expand(len(x), -1)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32),
        "spatial_shapes": shape,
    }


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_siglip2_naflex(size):
    x = images(*size)
    for theirs in (hf.Siglip2Model(siglip2_config()), hf.Siglip2VisionModel(siglip2_config().vision_config)):
        tower = getattr(perturb(theirs), "vision_model", theirs)
        expected = tower(*naflex(x).values())
        vit = from_transformers(theirs)
        same_tokens(vit, x, expected.last_hidden_state)
        close(vit.pool(vit(x)), expected.pooler_output)
    config = siglip2_config()
    config.num_labels = 7
    theirs = perturb(hf.Siglip2ForImageClassification(config))
    close(from_transformers(theirs).classify(x), theirs(**naflex(x)).logits)


@torch.no_grad()
def test_fine_tuned_half_precision_model_converts_and_stays_untouched():
    theirs = perturb(dinov3_model()).bfloat16()
    before = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    vit = from_transformers(theirs)
    with torch.no_grad():
        vit.registers.zero_()
    assert vit.patch_embed.weight.dtype is torch.bfloat16
    assert all(torch.equal(tensor, before[key]) for key, tensor in theirs.state_dict().items())
    exact = from_transformers(perturb(dinov3_model())).config.rope
    assert vit.config.rope == exact


def test_name_and_preprocessing():
    theirs = vit_model()
    theirs.config._name_or_path = "google/vit-base-patch16-224"
    config = from_transformers(theirs).config
    assert config.name == "google/vit-base-patch16-224"
    assert (config.preprocess.mean, config.preprocess.size, config.preprocess.multiple_of) == (
        (0.5,) * 3,
        (56, 56),
        14,
    )
    clip = from_transformers(hf.CLIPVisionModel(clip_config().vision_config)).config.preprocess
    assert clip.mean == (0.48145466, 0.4578275, 0.40821073)
    assert clip.interpolation == "bicubic"
    dino = from_transformers(hf.Dinov2Model(dinov2_config(False))).config.preprocess
    assert dino.mean == (0.485, 0.456, 0.406)


def test_unknown_classes_are_named():
    with pytest.raises(CheckpointError, match=r"Linear is not one of transformers' classes.*Dinov2Model.*from_timm"):
        from_transformers(torch.nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="CLIPTextModel is not one of"):
        from_transformers(hf.CLIPTextModel(clip_config().text_config))


def test_what_vitreg_lacks_is_refused():
    with pytest.raises(CheckpointError, match="activation 'relu'"):
        from_transformers(vit_model(hidden_act="relu"))
    with pytest.raises(CheckpointError, match="1 input channels"):
        from_transformers(vit_model(num_channels=1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
@torch.no_grad()
def test_full_size_dinov2(kind):
    config = getattr(hf, f"{kind}Config")(image_size=518)
    theirs = getattr(hf, f"{kind}Model")(config).eval()
    vit, x = from_transformers(theirs), images(224, 224, batch=1)
    close(vit(x).sequence(), theirs(x).last_hidden_state, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ViT", "CLIPVision", "SiglipVision", "DINOv3ViT", "ViTMAE"])
@torch.no_grad()
def test_full_size(kind):
    theirs = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")()).eval()
    if kind == "ViTMAE":
        theirs.config.mask_ratio = 0.0
    vit, x = from_transformers(theirs), images(224, 224, batch=1)
    output = theirs(x)
    expected = output.last_hidden_state
    if kind == "ViTMAE":
        order = 1 + output.ids_restore
        expected = expected[:, torch.cat([torch.zeros(1, dtype=torch.long), order[0]])]
    close(vit(x).sequence(), expected, 1e-4)


def test_stub_with_a_foreign_module_path_is_refused():
    """Remote code from the hub may bear a known name and do something else."""
    stub = type("Dinov2Model", (torch.nn.Module,), {"__module__": "transformers_modules.someone.modeling"})()
    stub.config = SimpleNamespace()
    with pytest.raises(CheckpointError, match="Dinov2Model is not one of"):
        from_transformers(stub)
