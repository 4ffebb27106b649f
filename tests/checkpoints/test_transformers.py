"""Parity with transformers: the same weights, the same images, the peer run in the same test."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from vitreg.checkpoints.state import CheckpointError
from vitreg.checkpoints.transformers import canonical_name, from_transformers, preprocess_from_processor
from vitreg.model import VisionTransformer

hf = pytest.importorskip("transformers")

BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = {"intermediate_size": 48}
SQUARE = {"image_size": 56, "patch_size": 14}
SIZES = [(56, 56), (98, 98), (42, 70), (28, 56)]
TOLERANCE = 1e-5


def perturb(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter away from its initial value: tokens, positions, norms, biases and LayerScale count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert error(ours, theirs) <= tolerance


def same_tokens(vit: VisionTransformer, x: torch.Tensor, sequence: torch.Tensor) -> None:
    """The named parts against a sequence whose order the peer documents: class token, registers, patches."""
    tokens = vit(x)
    first = int(vit.config.class_token)
    patches = first + vit.num_registers
    if tokens.cls is not None:
        close(tokens.cls, sequence[:, 0])
    if vit.num_registers:
        close(tokens.registers, sequence[:, first:patches])
    close(tokens.patches, sequence[:, patches:])


def vit_model(**options):
    return hf.ViTModel(hf.ViTConfig(**BASE, **MLP, **SQUARE, **options))


def dinov2_config(registers: bool, **options):
    kind = hf.Dinov2WithRegistersConfig if registers else hf.Dinov2Config
    return kind(**BASE, **SQUARE, **{"mlp_ratio": 2, **options})


def dinov3_model(**options):
    return hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**BASE, **MLP, **SQUARE, **{"num_register_tokens": 4, **options}))


def clip_config():
    vision = dict(**BASE, **MLP, **SQUARE, projection_dim=24)
    text = dict(**BASE, **MLP, vocab_size=64, max_position_embeddings=8)
    return hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


def siglip_config(**options):
    vision = dict(**BASE, **MLP, **SQUARE, **options)
    text = dict(**BASE, **MLP, vocab_size=64, max_position_embeddings=8)
    return hf.SiglipConfig(text_config=text, vision_config=vision)


def siglip2_config():
    vision = dict(**BASE, **MLP, patch_size=14, num_patches=16)
    text = dict(**BASE, **MLP, vocab_size=64, max_position_embeddings=8)
    return hf.Siglip2Config(text_config=text, vision_config=vision)


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
    """What SigLIP 2's own image processor makes of pictures that need no resizing."""
    from transformers.models.siglip2 import image_processing_siglip2 as processing

    numpy = int(hf.__version__.split(".")[0]) < 5  # there pictures are arrays, channels last
    pictures = x.permute(0, 2, 3, 1).numpy() if numpy else x
    patches = [torch.as_tensor(processing.convert_image_to_patches(picture, patch)) for picture in pictures]
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


def test_distillation_token_is_refused():
    theirs = hf.DeiTModel(hf.DeiTConfig(**BASE, **MLP, **SQUARE))
    with pytest.raises(CheckpointError, match="distillation token"):
        from_transformers(theirs)


def test_what_vitreg_lacks_is_refused():
    with pytest.raises(CheckpointError, match="activation 'relu'"):
        from_transformers(vit_model(hidden_act="relu"))
    with pytest.raises(CheckpointError, match="1 input channels"):
        from_transformers(vit_model(num_channels=1))


# Parameters as transformers 4.5x named them (`model.safetensors` of google/vit-base-patch16-224,
# facebook/dinov2-base, facebook/dinov2-giant, facebook/dinov3-vits16-pretrain-lvd1689m,
# openai/clip-vit-base-patch32, google/siglip-base-patch16-224), beside those of transformers 5 and ours.
@pytest.mark.parametrize(
    ("transformers4", "transformers5", "ours"),
    [
        (
            "vit.encoder.layer.0.attention.attention.query.weight",
            "vit.layers.0.attention.q_proj.weight",
            "blocks.0.attn.q.weight",
        ),
        (
            "vit.encoder.layer.11.attention.attention.value.bias",
            "vit.layers.11.attention.v_proj.bias",
            "blocks.11.attn.v.bias",
        ),
        (
            "vit.encoder.layer.0.attention.output.dense.weight",
            "vit.layers.0.attention.o_proj.weight",
            "blocks.0.attn.proj.weight",
        ),
        ("vit.encoder.layer.0.intermediate.dense.bias", "vit.layers.0.mlp.fc1.bias", "blocks.0.mlp.fc1.bias"),
        ("vit.encoder.layer.0.output.dense.weight", "vit.layers.0.mlp.fc2.weight", "blocks.0.mlp.fc2.weight"),
        (
            "vit.encoder.layer.0.layernorm_before.bias",
            "vit.layers.0.layernorm_before.bias",
            "blocks.0.norm1.bias",
        ),
        (
            "vit.encoder.layer.0.layernorm_after.bias",
            "vit.layers.0.layernorm_after.bias",
            "blocks.0.norm2.bias",
        ),
        ("vit.layernorm.weight", "layernorm.weight", "norm.weight"),
        ("vit.embeddings.patch_embeddings.projection.weight",) * 2 + ("patch_embed.weight",),
        ("vit.embeddings.position_embeddings", "embeddings.position_embeddings", "positions"),
        ("vit.embeddings.cls_token", "embeddings.cls_token", "cls_token"),
        ("classifier.weight", "classifier.weight", "head.weight"),
        (
            "encoder.layer.3.attention.attention.key.weight",
            "encoder.layer.3.attention.k_proj.weight",
            "blocks.3.attn.k.weight",
        ),
        (
            "encoder.layer.3.attention.output.dense.bias",
            "encoder.layer.3.attention.o_proj.bias",
            "blocks.3.attn.proj.bias",
        ),
        (
            "dinov2.encoder.layer.3.layer_scale1.lambda1",
            "encoder.layer.3.layer_scale1.lambda1",
            "blocks.3.scale1",
        ),
        (
            "encoder.layer.3.mlp.weights_out.bias",
            "encoder.layer.3.mlp.down_proj.bias",
            "blocks.3.mlp.fc2.bias",
        ),
        ("embeddings.register_tokens", "dinov2_with_registers.embeddings.register_tokens", "registers"),
        (
            "layer.2.attention.q_proj.weight",
            "model.layer.2.attention.q_proj.weight",
            "blocks.2.attn.q.weight",
        ),
        ("layer.2.mlp.down_proj.bias", "model.layer.2.mlp.down_proj.bias", "blocks.2.mlp.fc2.bias"),
        ("embeddings.patch_embeddings.weight", "embeddings.patch_embeddings.weight", "patch_embed.weight"),
        ("norm.weight", "norm.weight", "norm.weight"),
        (
            "vision_model.encoder.layers.1.self_attn.out_proj.bias",
            "encoder.layers.1.self_attn.out_proj.bias",
            "blocks.1.attn.proj.bias",
        ),
        (
            "vision_model.encoder.layers.1.layer_norm2.bias",
            "encoder.layers.1.layer_norm2.bias",
            "blocks.1.norm2.bias",
        ),
        ("vision_model.embeddings.class_embedding", "embeddings.class_embedding", "cls_token"),
        (
            "vision_model.embeddings.position_embedding.weight",
            "embeddings.position_embedding.weight",
            "positions",
        ),
        (
            "vision_model.embeddings.patch_embedding.bias",
            "embeddings.patch_embedding.bias",
            "patch_embed.bias",
        ),
        ("vision_model.pre_layrnorm.weight", "pre_layrnorm.weight", "pre_norm.weight"),
        ("vision_model.post_layernorm.weight", "post_layernorm.weight", "norm.weight"),
        ("visual_projection.weight", "visual_projection.weight", "head.weight"),
        ("vision_model.head.probe", "head.probe", "attention_pool.latent"),
        (
            "vision_model.head.attention.in_proj_bias",
            "head.attention.in_proj_bias",
            "attention_pool.in_proj_bias",
        ),
        (
            "vision_model.head.attention.out_proj.bias",
            "head.attention.out_proj.bias",
            "attention_pool.proj.bias",
        ),
        ("vision_model.head.layernorm.bias", "head.layernorm.bias", "attention_pool.norm.bias"),
        ("vision_model.head.mlp.fc1.bias", "head.mlp.fc1.bias", "attention_pool.mlp.fc1.bias"),
        ("encoder.layer.3.mlp.weights_in.weight", None, "blocks.3.mlp.fc1.weight"),
        ("vision_model.embeddings.position_ids", "embeddings.position_ids", None),
        ("text_model.encoder.layers.1.self_attn.out_proj.bias", "text_projection.weight", None),
        ("embeddings.mask_token", "dinov2.embeddings.mask_token", None),
        ("pooler.dense.weight", "logit_scale", None),
    ],
)
def test_names_of_both_generations(transformers4, transformers5, ours):
    assert canonical_name(transformers4) == ours
    assert transformers5 is None or canonical_name(transformers5) == ours


@torch.no_grad()
def test_dinov2_swiglu_of_transformers_4_is_gate_first():
    """Version 4 held gate and value in one matrix: `x1, x2 = weights_in(x).chunk(2); silu(x1) * x2`."""
    theirs = perturb(hf.Dinov2Model(dinov2_config(False, use_swiglu_ffn=True)))
    state = theirs.state_dict()
    for key in [key for key in state if ".mlp.gate_proj." in key]:
        gate, up = state.pop(key), state.pop(key.replace("gate_proj", "up_proj"))
        state[key.replace("gate_proj", "weights_in")] = torch.cat((gate, up))
    state = {key.replace("down_proj", "weights_out"): tensor for key, tensor in state.items()}
    old = hf.Dinov2Model(theirs.config)
    old.state_dict = lambda: state
    x = images(56, 56)
    same_tokens(from_transformers(old), x, theirs(x).last_hidden_state)


PROCESSORS = {
    # preprocessor_config.json of openai/clip-vit-base-patch32, google/vit-base-patch16-224 (before and after
    # 4.26), facebook/dinov2-base, a processor without crop, google/siglip2-base-patch16-naflex
    "clip": (
        {
            "crop_size": 224,
            "do_center_crop": True,
            "resample": 3,
            "size": 224,
            "image_mean": [0.4] * 3,
            "image_std": [0.2] * 3,
        },
        ((224, 224), "center", "bicubic", 1.0),
    ),
    "vit before 4.26": (
        {"do_normalize": True, "size": 224, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        ((224, 224), "squash", "bilinear", 1.0),
    ),
    "vit": (
        {
            "size": {"height": 224, "width": 224},
            "resample": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        ((224, 224), "squash", "bilinear", 1.0),
    ),
    "dinov2": (
        {
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "resample": 3,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        ((224, 224), "center", "bicubic", 0.875),
    ),
    "aspect kept": (
        {
            "size": {"shortest_edge": 224},
            "do_center_crop": False,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        ((224, 224), "none", "bicubic", 1.0),
    ),
    "naflex": (
        {
            "patch_size": 16,
            "max_num_patches": 256,
            "resample": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        ((256, 256), "squash", "bilinear", 1.0),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocess_from_processor(name):
    config, expected = PROCESSORS[name]
    preprocess = preprocess_from_processor(config, 16)
    assert (preprocess.size, preprocess.crop, preprocess.interpolation, preprocess.crop_fraction) == expected
    assert preprocess.mean == tuple(config["image_mean"])
    assert preprocess.multiple_of == 16


@pytest.mark.parametrize(("crop", "edge"), [(c, e) for e in range(224, 600, 13) for c in (196, 217, 224)])
def test_crop_fraction_gives_the_edge_back(crop, edge):
    config = {"size": {"shortest_edge": edge}, "crop_size": crop, "do_center_crop": True}
    preprocess = preprocess_from_processor(config | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 1)
    assert math.floor(crop / preprocess.crop_fraction) == edge


@pytest.mark.parametrize(("height", "width"), [(320, 480), (300, 200), (224, 224)])
@pytest.mark.parametrize(
    "kind", ["CLIPImageProcessor", "BitImageProcessor", "ViTImageProcessor", "SiglipImageProcessor"]
)
def test_preprocess_equals_the_image_processor(kind, height, width):
    """Up to the rounding of single pixels: a shifted crop or another filter is ten times as far away."""
    processor = (getattr(hf, f"{kind}Pil", None) or getattr(hf, kind))()
    picture = Image.fromarray(skimage.data.astronaut()[:height, :width])
    theirs = torch.as_tensor(np.asarray(processor(picture, return_tensors="np")["pixel_values"][0]))
    close(preprocess_from_processor(processor.to_dict(), 1)(picture), theirs, 1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"longest_edge": 1024}}, "size"),
        ({"resample": 4}, "resample"),
        ({"do_resize": False}, "do_resize"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"image_mean": None}, "image_mean"),
        ({"size": {"shortest_edge": 100}, "do_center_crop": True, "crop_size": 224}, "crop_size"),
    ],
)
def test_processors_beyond_preprocess_are_refused(change, message):
    config = {
        "size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    with pytest.raises(CheckpointError, match=message):
        preprocess_from_processor(config | change, 16)


def test_values_pass_without_normalization():
    preprocess = preprocess_from_processor({"size": 32, "do_normalize": False}, 16)
    assert (preprocess.mean, preprocess.std) == ((0.0,) * 3, (1.0,) * 3)


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
