"""ViT, CLIP and SigLIP under other names of transformers: parity at any size, the peer run in the same test."""

import importlib
from typing import Any

import pytest
import torch

from checkpoints.transformers_models import BASE, MLP, SIZES, SQUARE, close, hf, images, perturb, same_tokens
from vitreg import load
from vitreg.checkpoints.from_transformers import from_transformers

TOWER = {**BASE, **MLP, **SQUARE}
TEXT = {**BASE, **MLP, "vocab_size": 64, "max_position_embeddings": 8}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3}
KOSMOS_TEXT = {"vocab_size": 64, "layers": 1, "embed_dim": 32, "attention_heads": 2, "ffn_dim": 48}
CLIPS = ("MetaClip2", "ChineseCLIP", "AltCLIP", "CLIPSeg", "OwlViT", "Owlv2", "Blip")


def model(name: str, config: Any) -> Any:
    """A small one with all parameters perturbed."""
    return perturb(getattr(hf, name)(config))


def both_configs(family: str, **options: Any) -> Any:
    """The config of a pair of towers."""
    config = getattr(hf, f"{family}Config")(vision_config=TOWER, text_config=TEXT, projection_dim=24)
    for name, value in options.items():
        setattr(config, name, value)
    return config


def expected_of(tower: Any, x: torch.Tensor) -> Any:
    return tower(x, interpolate_pos_encoding=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["ViTMSN", "IJepa"])
@torch.no_grad()
def test_vits_and_their_classifiers(family, size):
    config, x = getattr(hf, f"{family}Config")(**TOWER, num_labels=7), images(*size)
    theirs = model(f"{family}Model", config)
    same_tokens(from_transformers(theirs), x, expected_of(theirs, x).last_hidden_state)
    theirs = model(f"{family}ForImageClassification", config)
    close(from_transformers(theirs).classify(x), expected_of(theirs, x).logits)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", [*CLIPS, "Blip2", "InstructBlip", "InstructBlipVideo", "Tipsv2"])
@torch.no_grad()
def test_towers_of_clips(family, size):
    theirs = model(f"{family}VisionModel", getattr(hf, f"{family}VisionConfig")(**TOWER))
    vit, x = from_transformers(theirs), images(*size)
    expected = theirs(x) if family == "Tipsv2" else expected_of(theirs, x)
    same_tokens(vit, x, expected.last_hidden_state)
    close(vit.pool(vit(x)), expected.pooler_output)  # BLIP's has been through its last norm twice
    assert vit.head is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", CLIPS)
@torch.no_grad()
def test_clips_with_their_projection(family, size):
    theirs = model(f"{family}Model", both_configs(family))
    vit, x = from_transformers(theirs), images(*size)
    expected = expected_of(theirs.vision_model, x)
    same_tokens(vit, x, expected.last_hidden_state)
    close(vit.pool(vit(x)), expected.pooler_output)
    close(vit.classify(x), theirs.visual_projection(expected.pooler_output))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_metaclip2_with_projection(size):
    theirs = model("MetaClip2VisionModelWithProjection", hf.MetaClip2VisionConfig(**TOWER, projection_dim=24))
    x = images(*size)
    close(from_transformers(theirs).classify(x), expected_of(theirs, x).image_embeds)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["CLIP", "MetaClip2"])
@torch.no_grad()
def test_classifiers_on_clip_average_patches_that_no_norm_has_seen(family, size):
    theirs = model(f"{family}ForImageClassification", both_configs(family, num_labels=7))
    vit, x = from_transformers(theirs), images(*size)
    close(vit.classify(x), expected_of(theirs, x).logits)
    assert not vit.config.final_norm
    assert not vit.config.fc_norm


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["GitVision", "FlavaImage"])
@torch.no_grad()
def test_towers_that_norm_all_tokens(family, size):
    theirs = model(f"{family}Model", getattr(hf, f"{family}Config")(**TOWER))
    vit, x = from_transformers(theirs), images(*size)
    expected = expected_of(theirs, x).last_hidden_state
    same_tokens(vit, x, expected)
    close(vit.pool(vit(x)), expected[:, 0])


@torch.no_grad()
def test_blip2_without_bias_of_queries_and_values():
    theirs, x = model("Blip2VisionModel", hf.Blip2VisionConfig(**TOWER, qkv_bias=False)), images(42, 70)
    same_tokens(from_transformers(theirs), x, expected_of(theirs, x).last_hidden_state)


@pytest.mark.parametrize("size", [*SIZES, (350, 70), (126, 686)])
@pytest.mark.parametrize("family", ["Idefics2", "Idefics3", "SmolVLM"])
@pytest.mark.parametrize("side", [56, 350])
@torch.no_grad()
def test_navit_buckets_of_positions(family, side, size):
    """Grids of 25 and 49 patches on a table of 25, where transformers' rounding is not that of `F.interpolate`."""
    module = importlib.import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    kind = getattr(module, f"{family}VisionTransformer")
    theirs = perturb(kind(kind.config_class(**{**TOWER, "image_size": side})))
    vit, x = from_transformers(theirs), images(*size)
    expected = theirs(x).last_hidden_state
    same_tokens(vit, x, expected)
    close(vit.pool(vit(x)), expected.mean(1))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_janus(size):
    theirs = model("JanusVisionModel", hf.JanusVisionConfig(**TOWER))
    vit, x = from_transformers(theirs), images(*size)
    expected = expected_of(theirs, x).last_hidden_state
    same_tokens(vit, x, expected)
    close(vit.pool(vit(x)), expected.mean(1))  # its `pooler_output` is the first patch, normed twice


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_kosmos2(size):
    theirs = model("Kosmos2Model", hf.Kosmos2Config(vision_config=TOWER, text_config=KOSMOS_TEXT))
    vit, x = from_transformers(theirs), images(*size)
    expected = expected_of(theirs.vision_model, x)
    same_tokens(vit, x, expected.last_hidden_state)
    close(vit.pool(vit(x)), expected.pooler_output)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_dpt(size):
    theirs = model("DPTModel", hf.DPTConfig(**TOWER))
    x = images(*size)
    same_tokens(from_transformers(theirs), x, theirs(x).last_hidden_state)


@torch.no_grad()
def test_the_tower_of_a_whole_model():
    detector = model("OwlViTForObjectDetection", both_configs("OwlViT"))
    vit, x = from_transformers(detector), images(42, 70)
    assert vit.config.name == "(owlvit)"
    expected = expected_of(detector.owlvit.vision_model, x)
    same_tokens(vit, x, expected.last_hidden_state)
    close(vit.classify(x), detector.owlvit.visual_projection(expected.pooler_output))

    backbone = hf.Dinov2Config(**BASE, **SQUARE, out_features=["stage2"], reshape_hidden_states=False)
    sizes = {"reassemble_factors": [1], "neck_hidden_sizes": [8], "fusion_hidden_size": 8, "reassemble_hidden_size": 32}
    depth = model("DepthAnythingForDepthEstimation", hf.DepthAnythingConfig(backbone_config=backbone, **sizes))
    vit = from_transformers(depth)
    assert vit.config.name == "(backbone)"
    same_tokens(vit, x, depth.backbone(x).feature_maps[-1])


@torch.no_grad()
def test_a_whole_model_by_its_folder(tmp_path):
    detector = model("Owlv2ForObjectDetection", both_configs("Owlv2"))
    detector.save_pretrained(tmp_path / "mine")
    vit, x = load(tmp_path / "mine"), images(56, 56)
    assert vit.config.name == "mine (owlv2)"
    close(vit(x).sequence(), expected_of(detector.owlv2.vision_model, x).last_hidden_state)
