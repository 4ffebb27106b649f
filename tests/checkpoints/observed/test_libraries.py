"""Models of timm and transformers as they are: against their conversion, or what the libraries say themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm
import torch

import vitreg
from peers import TOLERANCE, error, perturb, random_images
from vitreg.checkpoints import convert_or_observe
from vitreg.checkpoints.observed.inputs import patch_lists
from vitreg.report import write_report

hf = pytest.importorskip("transformers")
TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2)
MLP = dict(intermediate_size=48)


@pytest.fixture(scope="module")
def observed_vit_ti(test_data):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    file = {"file": str(test_data / "weights" / f"{name}.safetensors")}
    return vitreg.observe(timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file))


def test_the_real_vit_is_diagnosed_as_its_conversion_is(observed_vit_ti, tiny_vit, photograph_batch):
    asked = {"attention_from": "cls", "embeddings": True, "largest": 8}
    few = photograph_batch[:3]
    with torch.no_grad():
        ours, theirs = (vit.trace(few, **asked) for vit in (tiny_vit, observed_vit_ti))
    for name in ("patch_norms", "cls_norms", "embeddings", "largest"):
        assert error(getattr(ours, name), getattr(theirs, name)) <= TOLERANCE
    assert error(ours.attention.to_patches, theirs.attention.to_patches) <= TOLERANCE
    converted, observed = (vitreg.diagnose(vit, photograph_batch[:6]) for vit in (tiny_vit, observed_vit_ti))
    assert [block.threshold for block in observed.blocks] == [block.threshold for block in converted.blocks]
    assert observed.verdict[:-2] == converted.verdict[:-1]  # advice, and what was observed
    assert observed.channels == converted.channels
    np.testing.assert_array_equal(observed.position_frequency, converted.position_frequency)


def test_what_is_not_converted_is_compared_too(observed_vit_ti, tiny_vit, photograph_batch):
    comparison = vitreg.compare(observed_vit_ti, tiny_vit, photograph_batch[:4])
    assert not comparison.same_model
    assert comparison.blocks[-1].max_before == pytest.approx(comparison.blocks[-1].max_after)
    assert comparison.verdict[-1] == observed_vit_ti.config.assumed
    assert vitreg.compare(observed_vit_ti, observed_vit_ti, photograph_batch[:4]).same_model


def test_hiera_is_put_back_in_order():
    """Its tokens are sorted by strides, and its stages change the grid: the longest one is watched."""
    model = perturb(timm.create_model("hiera_tiny_224", embed_dim=24, num_heads=1, stages=(1, 1, 3, 1)))
    observed = vitreg.observe(model)
    assert "2 of 6 blocks, the first is blocks.3; 14 x 14 patches of 16 pixels" in observed.config.assumed
    images = random_images(224)
    with torch.no_grad():
        _, features = model.forward_intermediates(images, output_fmt="NHWC", coarse=False)
        norms = torch.stack([x.norm(dim=-1) for x in features[3:5]])
    torch.testing.assert_close(observed.trace(images).patch_norms, norms)


def test_sam_is_watched_through_its_windows():
    options = dict(img_size=128, embed_dim=48, num_heads=2, depth=3, window_size=3, global_attn_indexes=(2,))
    model = perturb(timm.create_model("samvit_base_patch16", **options))
    preprocess = vitreg.Preprocess(size=(128, 128))
    observed = vitreg.observe(model, preprocess=preprocess)
    assert (observed.config.depth, observed.config.patch_size, observed.config.class_token) == (3, 16, False)
    images, seen = random_images(128), []
    handle = model.blocks[1].register_forward_hook(lambda _m, _i, output: seen.append(output.norm(dim=-1)))
    with torch.no_grad():
        model(images)
    handle.remove()
    torch.testing.assert_close(observed.trace(images).patch_norms[1], seen[0])
    assert vitreg.diagnose(observed, images).cls_norms is None


def qwen():
    config = type(hf.Qwen2_5_VLConfig().vision_config)(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[2]
    )
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    return perturb(Qwen2_5_VisionTransformerPretrainedModel(config))


def test_patch_lists_are_those_of_the_processor():
    model, pixels = qwen(), torch.randint(0, 256, (2, 3, 56, 84), dtype=torch.uint8)
    processor = hf.Qwen2VLImageProcessor(do_resize=False)
    theirs = processor(images=list(pixels), return_tensors="pt")
    normalize = vitreg.Preprocess(mean=processor.image_mean, std=processor.image_std).normalize
    lists, grids = patch_lists(normalize(pixels), model.config)
    assert torch.equal(grids, theirs["image_grid_thw"])
    torch.testing.assert_close(lists, theirs["pixel_values"])


def test_qwen_is_put_back_in_order():
    """Its tokens have no batch axis, and are sorted by windows of merged patches."""
    model = qwen()
    observed = vitreg.observe(model)
    assert observed.config.preprocess.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert "32 x 32 patches of 14 pixels; the order of the patches was measured" in observed.config.assumed
    images = random_images(224)
    trace = observed.trace(images, embeddings=True)
    kernel = model.patch_embed.proj.weight.sum(2)  # a still image fills both frames
    with torch.no_grad():
        embedded = torch.nn.functional.conv2d(images, kernel, stride=14)
        first = model.blocks[0]
        lonely = observed.trace(images[1:])
    torch.testing.assert_close(trace.embeddings, embedded.flatten(2).mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trace.patch_norms[:, 1:], lonely.patch_norms)
    # A patch that changes is seen where it is: the first block attends within windows of 8 x 8 patches.
    images[0, :, 14 * 9 : 14 * 10, 14 * 3 : 14 * 4] += 1
    changed = (observed.trace(images).patch_norms[0, 0] - trace.patch_norms[0, 0]).abs()
    assert changed.argmax() == 9 * 16 + 3
    assert changed[:8].max() == 0
    assert changed[8:, 8:].max() == 0
    assert first is model.blocks[0]


@pytest.mark.parametrize("kind", ["vjepa2", "videomae"])
def test_time_is_an_axis_of_the_grid(kind, tmp_path):
    if kind == "vjepa2":
        predictor = dict(pred_hidden_size=32, pred_num_hidden_layers=2, pred_num_attention_heads=2)
        sizes = {**TINY, "hidden_size": 48}
        model = hf.VJEPA2Model(hf.VJEPA2Config(**sizes, **predictor, crop_size=64, frames_per_clip=4))
    else:
        model = hf.VideoMAEForPreTraining(hf.VideoMAEConfig(**TINY, **MLP, image_size=64, num_frames=4, **DECODER))
    observed = vitreg.observe(perturb(model))
    steps = {"vjepa2": 1, "videomae": 2}[kind]
    assert observed.config.time_steps == steps
    assert "4 x 4 patches of 16 pixels" in observed.config.assumed
    diagnosis = vitreg.diagnose(observed, random_images(64, batch=4))
    assert diagnosis.position_frequency.shape == (4 * steps, 4)
    assert diagnosis.examples[0].photo.shape == (64 * steps, 64, 3)
    assert diagnosis.to_dict()["model"]["observed"]["time_steps"] == steps
    page = diagnosis.save(tmp_path).read_text()
    assert "There are no attention maps: its stream has no class token" in page
    assert "Observed by hooks in V" in page


DECODER = dict(decoder_num_hidden_layers=1, decoder_hidden_size=32, decoder_num_attention_heads=2)


def test_neighbors_are_of_one_time():
    model = perturb(hf.VideoMAEModel(hf.VideoMAEConfig(**TINY, **MLP, image_size=64, num_frames=4)))
    observed = vitreg.observe(model)
    images = random_images(64, batch=2)
    embeddings = observed.trace(images, embeddings=True).embeddings.unflatten(1, (2, 16)).flatten(0, 1)
    expected = vitreg.artifacts.neighbour_similarity(embeddings, (4, 4)).mean()
    assert vitreg.diagnose(observed, images).neighbour_similarity.others == pytest.approx(float(expected), abs=1e-6)


def test_the_tower_of_a_whole_model_is_named():
    sizes = dict(mlp_dim=48, image_size=128, window_size=4, global_attn_indexes=[2], output_channels=32)
    vision = hf.SamVisionConfig(**TINY, **sizes)
    decoder = dict(hidden_size=32, num_hidden_layers=1, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32)
    prompts = dict(hidden_size=32, image_size=128, image_embedding_size=8)
    config = hf.SamConfig(vision_config=vision.to_dict(), prompt_encoder_config=prompts, mask_decoder_config=decoder)
    observed = convert_or_observe(perturb(hf.SamModel(config)))
    assert observed.config.name == "SamModel (vision_encoder)"
    assert observed.preprocess.size == (128, 128)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_compiled_and_quantized_modules_are_seen():
    model = perturb(timm.create_model("cait_xxs24_224", img_size=64, depth=2, embed_dim=48, num_heads=2))
    plain = vitreg.observe(model)
    images = random_images(64)
    norms = plain.trace(images).patch_norms
    torch.testing.assert_close(vitreg.observe(torch.compile(model)).trace(images).patch_norms, norms)
    blocks = model.blocks
    model.blocks = torch.nn.Sequential(*map(torch.compile, blocks))
    torch.testing.assert_close(vitreg.observe(model).trace(images).patch_norms, norms)
    model.blocks = blocks
    quantization = pytest.importorskip("torch.ao.quantization")
    quantized = quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert error(norms, vitreg.observe(quantized).trace(images).patch_norms) < 0.05
    half = vitreg.observe(model.to(torch.bfloat16)).trace(images)
    assert error(norms, half.patch_norms) < 0.05


def test_a_page_says_which_blocks_were_seen(tmp_path, observed_vit_ti, photograph_batch):
    diagnosis = vitreg.diagnose(observed_vit_ti, photograph_batch[:2])
    page = write_report(diagnosis.to_dict(), diagnosis.examples, tmp_path / "page.html").read_text()
    assert "12 blocks, the first is blocks.0" in page
    assert "There are no attention maps" not in page
    assert dataclasses.asdict(observed_vit_ti.config)["num_heads"] == 3
