"""Round trips: what `save` writes is loaded by its own library in the same test and gives the same output."""

import dataclasses
import inspect
import json
import os
import stat

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vitreg.checkpoints.from_timm import from_timm
from vitreg.checkpoints.from_transformers import from_transformers
from vitreg.checkpoints.processors import preprocess_from_processor
from vitreg.checkpoints.saving import config_from_metadata, save, to_timm_state
from vitreg.checkpoints.state import CheckpointError, build
from vitreg.model import Preprocess, RopeConfig, VisionTransformer, ViTConfig

TOLERANCE = 1e-5
PLAIN = ViTConfig(embed_dim=32, depth=2, num_heads=2, mlp_dim=64, patch_size=14, image_size=(56, 56))
DINO = {"layer_scale": True, "num_registers": 3}
ROPE = {
    "rope": RopeConfig(tuple(2 * torch.pi / 100.0 ** (j / 4) for j in range(4))),
    "learned_positions": False,
    "norm_eps": 1e-5,
    "layer_scale": True,
    "num_registers": 4,
}
EVA_ROPE = {
    "rope": RopeConfig(tuple(10000.0 ** -(j / 4) for j in range(4)), "index", reference_grid=(4, 4), interleaved=True)
}
SWIGLU = {"gated_mlp": True, "activation": "silu"}
CLIP = {"norm_pre": True, "patch_bias": False, "activation": "quick_gelu", "norm_eps": 1e-5}
SIGLIP = {"class_token": False, "pool": "attention", "activation": "gelu_tanh"}
AFTER_POOL = {"final_norm": False, "fc_norm": True}


def model(**options) -> VisionTransformer:
    """Random, every parameter away from its initial value."""
    vit = VisionTransformer(dataclasses.replace(PLAIN, **options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return vit


def images(height: int = 56, width: int = 56) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).norm() / ours.norm()) <= TOLERANCE


def unchecked(function):
    """Without the type checks that only the tests run with."""
    return inspect.unwrap(function)


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


EVERYTHING = {
    "plain": {},
    "head": {"num_classes": 7},
    "registers": DINO | {"num_classes": 7, "pool": "token+mean"},
    "dinov3": ROPE | {"key_bias": False},
    "eva": EVA_ROPE | SWIGLU | {"mlp_norm": True, "attention_norm": True, "key_bias": False},
    "parallel": {"parallel": True, "qk_norm": True, "class_token": False, "pool": "mean"},
    "differential": {"differential": True, "qk_norm": True},
    "clip": CLIP | {"num_classes": 24, "head_bias": False},
    "siglip": SIGLIP,
    "CoCa": {"pool": "token+attention", "pool_heads": 4, "pool_dim": 24, "fc_norm": True, "num_classes": 7},
    "table of relative positions": {"rel_pos": "table", "learned_positions": False},
    "MLP of relative positions": {"rel_pos": "mlp", "rel_pos_dim": 5},
    "distillation token": {"num_registers": 2, "num_summary_tokens": 1, "num_classes": 7},
}


@pytest.mark.parametrize("name", EVERYTHING)
@torch.no_grad()
def test_vitreg_round_trip_is_identical(name, tmp_path):
    vit = model(**EVERYTHING[name], name="mine", preprocess=Preprocess(size=(56, 56), crop="squash"))
    save(vit, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == ["model.safetensors"]
    metadata = metadata_of(tmp_path / "model.safetensors")
    config = config_from_metadata(metadata)
    assert config == vit.config
    again = build(config, load_file(tmp_path / "model.safetensors"), "the file")
    assert all(torch.equal(tensor, vit.state_dict()[key]) for key, tensor in again.state_dict().items())
    torch.testing.assert_close(again(images()).sequence(), vit(images()).sequence(), rtol=0, atol=0)


def test_config_from_metadata_of_other_files():
    assert config_from_metadata(None) is None
    assert config_from_metadata({"format": "pt"}) is None
    with pytest.raises(CheckpointError, match="cannot be read"):
        config_from_metadata({"format": "vitreg", "config": "{"})
    newer = PLAIN.to_dict() | {"mystery": 1}
    with pytest.raises(CheckpointError, match="newer vitreg"):
        config_from_metadata({"format": "vitreg", "config": json.dumps(newer)})


TIMM = {
    "plain": {},
    "classifier": {"num_classes": 7},
    "registers and LayerScale": DINO | {"num_classes": 7},
    "mean": {"pool": "mean", "num_classes": 7},
    "norm after pooling": AFTER_POOL | {"pool": "mean", "num_classes": 7},
    "distillation token": {"num_registers": 1, "num_summary_tokens": 1, "num_classes": 7},
    "no class token": {"class_token": False, "pool": "mean", "num_registers": 1},
    "no biases": {
        "qkv_bias": False,
        "proj_bias": False,
        "mlp_bias": False,
        "head_bias": False,
        "num_classes": 3,
    },
    "masked key bias": {"key_bias": False},
    "q/k norm": {"qk_norm": True},
    "odd MLP": {"mlp_dim": 119},
    "not square": {"image_size": (56, 84)},
    "SwiGLU": SWIGLU | DINO,
    "parallel": {"parallel": True, "layer_scale": True, "num_registers": 2},
    "parallel without biases": {"parallel": True, "qkv_bias": False},
    "differential": {"differential": True, "num_registers": 1},
    "differential, all norms": {"differential": True, "qk_norm": True, "attention_norm": True, "mlp_norm": True},
    "differential, parallel": {"differential": True, "parallel": True, "layer_scale": True},
    "differential, parallel without biases": {
        "differential": True,
        "parallel": True,
        "qkv_bias": False,
        "proj_bias": False,
        "mlp_bias": False,
    },
    "CLIP": CLIP | {"num_classes": 24, "head_bias": False},
    "CLIP with registers": CLIP | AFTER_POOL | {"num_registers": 4, "num_classes": 24, "head_bias": False},
    "SigLIP": SIGLIP,
    "DINOv3": ROPE,
    "DINOv3, keys without bias": ROPE | {"key_bias": False},
    "DINOv3 without biases": ROPE | {"qkv_bias": False, "key_bias": False},
    "DINOv3, gated": ROPE | SWIGLU,
    "RMSNorm": {"rms_norm": True, "patch_norm": True, "norm_eps": 1e-5, "gated_mlp": True, "activation": "silu"},
    "RMSNorm, parallel": {"rms_norm": True, "parallel": True, "qk_norm": True, "norm_pre": True, "patch_bias": False},
    "class token in attention pool": SIGLIP | {"pool": "token+attention", "class_token": True},
    "Perception Encoder": EVA_ROPE | {"pool": "token+attention", "pool_heads": 2, "pool_mlp_dim": 80},
    "post-norm": {"post_norm": True, "class_token": False, "pool": "mean"},
    "EVA, post-norm": EVA_ROPE | {"post_norm": True},
    "mixed RoPE": EVA_ROPE | {"rope": None, "mixed_rope": True},
    "EVA-02": EVA_ROPE | SWIGLU | {"mlp_norm": True, "attention_norm": True, "key_bias": False},
    "EVA, all biases": EVA_ROPE | {"pool": "mean", "num_classes": 5} | AFTER_POOL,
}


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_timm_loads_it_strictly(name, tmp_path):
    vit = model(**TIMM[name])
    save(vit, tmp_path / "model.safetensors", format="timm")
    metadata = metadata_of(tmp_path / "model.safetensors")
    theirs = timm.create_model(metadata["architecture"], **json.loads(metadata["kwargs"])).eval()
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    x = images(*vit.config.image_size)
    sequence = theirs.forward_features(x)
    tokens = vit(x)
    close(tokens.sequence(), sequence)
    pooled = vit.pool(tokens).unflatten(-1, (-1, vit.config.embed_dim)).mean(1)  # of a distilled model's two tokens
    close(pooled, theirs.forward_head(sequence, pre_logits=True))
    if vit.head is not None:
        close(vit.classify(x), theirs(x))
    # Other sizes by timm's rule, which is the default of `PositionInterpolation`.
    close(
        vit(images(28, 84)).patches,
        theirs.forward_features(images(28, 84))[:, vit.config.num_prefix_tokens :],
    )
    assert from_timm(theirs).config.num_registers == vit.num_registers


@pytest.mark.parametrize(
    "architecture",
    [
        "vit_small_patch14_reg4_dinov2",
        "deit3_small_patch16_224",
        "vit_small_patch16_dinov3",
        "vit_base_patch16_sapiens2",
    ],
)
def test_a_model_from_timm_goes_back_into_its_architecture(architecture):
    if not timm.is_model(architecture):
        pytest.skip(f"this timm has no {architecture}")
    options = {"num_kv_heads": (12, 4)} if "sapiens2" in architecture else {}
    theirs = timm.create_model(architecture, depth=2, img_size=112, global_pool="token", **options).eval()
    state, described = to_timm_state(from_timm(theirs))
    assert described["architecture"] == architecture
    again = timm.create_model(architecture, **described["kwargs"])
    again.load_state_dict(state, strict=True)
    with torch.no_grad():
        close(again.eval().forward_features(images(112, 112)), theirs.forward_features(images(112, 112)))


def test_what_timm_lacks_is_refused(tmp_path):
    for options, message in (
        ({"norm_eps": 1e-12}, r"norm_eps=1e-12; save with format='vitreg'"),
        ({"norm_eps": 1e-12, "attention_norm": True}, r"norm_eps=1e-12; save with format='vitreg'"),
        (DINO | {"pool": "token+mean"}, r"pool='token\+mean'"),
        ({"norm_pre": True}, "patch_bias=True"),
        ({"pool": "token+attention", "pool_heads": 4, "pool_dim": 24}, "pool_dim=24; save"),
        ({"rel_pos": "table"}, "rel_pos='table'; save"),
        ({"rel_pos": "mlp", "rel_pos_dim": 5, "architecture": "vit_relpos_small_patch16_224"}, "rel_pos='mlp'"),
        (SIGLIP | SWIGLU, "format 'timm' cannot express .*gated_mlp=True; save with format='vitreg'"),
        (ROPE | {"pool": "attention"}, "format 'timm' cannot express pool='attention'; save with format='vitreg'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save(model(**options), tmp_path / "model.safetensors", format="timm")
    assert not os.listdir(tmp_path)


TRANSFORMERS = {
    "ViTModel": {},
    "ViTForImageClassification": {"num_classes": 7, "norm_eps": 1e-12, "qkv_bias": False},
    "Dinov2Model": {"layer_scale": True, "activation": "gelu_tanh"},
    "Dinov2ForImageClassification": {"layer_scale": True, "num_classes": 7, "pool": "token+mean"},
    "Dinov2WithRegistersModel": DINO,
    "Dinov2WithRegistersForImageClassification": DINO | {"num_classes": 7, "pool": "token+mean"},
    "CLIPVisionModel": CLIP | AFTER_POOL,
    "CLIPVisionModelWithProjection": CLIP | AFTER_POOL | {"num_classes": 24, "head_bias": False},
    "SiglipVisionModel": SIGLIP,
    "SiglipForImageClassification": {"class_token": False, "pool": "mean", "num_classes": 7},
    "DINOv3ViTModel": ROPE,
}
VARIANTS = {
    "registers without LayerScale": ("Dinov2WithRegistersModel", {"num_registers": 2}),
    "SwiGLU": ("Dinov2Model", SWIGLU | {"mlp_dim": 88}),
    "head on the class token": ("Dinov2WithRegistersForImageClassification", DINO | {"num_classes": 7}),
    "head on the mean": ("Dinov2ForImageClassification", {"num_classes": 7, "pool": "mean"}),
    "SigLIP without pool": ("SiglipVisionModel", {"class_token": False, "pool": "mean"}),
    "no biases": (
        "Dinov2Model",
        {"layer_scale": True, "proj_bias": False, "mlp_bias": False, "patch_bias": False},
    ),
    "masked key bias": ("Dinov2Model", {"layer_scale": True, "key_bias": False}),
    "DINOv3, keys without bias": ("DINOv3ViTModel", ROPE | {"key_bias": False, "num_registers": 0}),
    "DINOv3, few biases": ("DINOv3ViTModel", ROPE | SWIGLU | {"qkv_bias": False, "mlp_bias": False}),
}


@pytest.mark.parametrize("case", [*TRANSFORMERS, *VARIANTS])
@torch.no_grad()
def test_transformers_loads_it(case, tmp_path):
    hf = pytest.importorskip("transformers")
    name, options = (case, TRANSFORMERS[case]) if case in TRANSFORMERS else VARIANTS[case]
    vit = model(**options)
    save(vit, tmp_path / "folder", format="transformers")
    assert os.listdir(tmp_path) == ["folder"]
    assert {"config.json", "model.safetensors"} <= set(os.listdir(tmp_path / "folder"))
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["architectures"] == [name]
    theirs, info = getattr(hf, name).from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} <= {"pooler"}
    assert not info["unexpected_keys"]
    theirs, x = theirs.eval(), images()
    output = theirs(x)
    if name.endswith(("Classification", "Projection")):
        close(vit.classify(x), output.logits if hasattr(output, "logits") else output.image_embeds)
    else:
        close(vit(x).sequence(), output.last_hidden_state)
    assert (
        type(hf.AutoModel.from_pretrained(tmp_path / "folder")).__name__
        in name.replace("ForImageClassification", "Model") + name
    )
    again = from_transformers(theirs)
    close(again(x).sequence(), vit(x).sequence())
    assert again.num_registers == vit.num_registers


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
def test_towers_are_where_transformers_4_looks(name, tmp_path):
    """Transformers 4 silently starts from random weights where the `vision_model.` prefix is missing."""
    pytest.importorskip("transformers")
    save(model(**TRANSFORMERS[name]), tmp_path / "folder", format="transformers")
    assert all(key.startswith("vision_model.") for key in load_file(tmp_path / "folder" / "model.safetensors"))


@torch.no_grad()
def test_open_clips_order_of_norm_and_pool_becomes_clips(tmp_path):
    """OpenCLIP norms all tokens, then pools; CLIP's class pools, then norms: the embedding is the same."""
    hf = pytest.importorskip("transformers")
    vit = model(**CLIP, num_classes=24, head_bias=False)
    save(vit, tmp_path / "clip", format="transformers")
    theirs = hf.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip")
    close(vit.classify(images()), theirs(images()).image_embeds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": True}, "parallel blocks; save with format='vitreg' or 'timm'"),
        ({"differential": True}, "differential attention; save with format='vitreg' or 'timm'"),
        ({"qk_norm": True, "norm_eps": 1e-3}, "norms inside .*; save with format='vitreg'$"),
        (CLIP | {"num_registers": 4}, "registers .*; save with format='vitreg' or 'timm'"),
        ({"image_size": (56, 84)}, "position grid of 4 x 6"),
        (AFTER_POOL | {"pool": "mean", "num_classes": 3}, "norm after pooling"),
        (ROPE | {"num_classes": 3}, "head on DINOv3"),
        (EVA_ROPE, "RoPE other than DINOv3's"),
        ({"layer_scale": True, "mlp_dim": 65}, "MLP of 65 units"),
        (CLIP | AFTER_POOL | {"num_classes": 3}, "bias of its projection"),
        (
            CLIP | AFTER_POOL | {"patch_bias": True, "layer_scale": True},
            "express patch_bias=True, layer_scale=True; save",
        ),
        ({"learned_positions": False}, "express learned_positions=False; save"),
        (ROPE | {"learned_positions": True}, "express learned_positions=True; save"),
        (ROPE | {"norm_pre": True}, "express norm_pre=True; save"),
        (SIGLIP | SWIGLU | AFTER_POOL, "final_norm=False, fc_norm=True, .*gated_mlp=True; save"),
        (SWIGLU | {"mlp_dim": 88, "activation": "gelu"}, "express activation='gelu'; save"),
    ],
)
def test_what_transformers_lacks_is_refused(options, message, tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(CheckpointError, match=message):
        save(model(**options), tmp_path / "folder", format="transformers")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(size=(224, 224), crop_pct=0.875),
        Preprocess(size=(224, 224), crop="squash", crop_pct=1.0, interpolation="bilinear", mean=(0.5,) * 3),
        Preprocess(size=(224, 280), crop="squash", crop_pct=1.0),
        Preprocess(size=(224, 224), crop="none", crop_pct=1.0),
    ],
)
def test_preprocessing_goes_along(preprocess, tmp_path):
    pytest.importorskip("transformers")
    preprocess = dataclasses.replace(preprocess, multiple_of=14)
    save(model(preprocess=preprocess), tmp_path / "folder", format="transformers")
    written = json.loads((tmp_path / "folder" / "preprocessor_config.json").read_text())
    assert preprocess_from_processor(written, 14) == preprocess


def test_half_precision_is_kept(tmp_path):
    vit = model(**DINO).bfloat16()
    save(vit, tmp_path / "ours.safetensors")
    save(vit, tmp_path / "timm.safetensors", format="timm")
    for file in ("ours", "timm"):
        tensors = load_file(tmp_path / f"{file}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_failed_write_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write to .*file: File exists; make room, or choose another folder"):
        save(model(), tmp_path / "file" / "model.safetensors")
    old = tmp_path / "old.safetensors"
    save(model(), old)
    before = old.read_bytes()

    def full_disk(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitreg.checkpoints.saving.save_file", full_disk)
    with pytest.raises(ValueError, match=r"cannot write to .*: No space left on device; make room"):
        save(model(num_registers=1), old)
    assert old.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["file", "old.safetensors"]


def test_the_file_is_readable_by_others(tmp_path):
    save(model(), tmp_path / "model.safetensors")
    (tmp_path / "plain").write_text("")
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("model.safetensors", "plain")}
    assert len(modes) == 1


def test_wrong_arguments_are_explained(tmp_path):
    with pytest.raises(CheckpointError, match=r"'onnx' is unknown; choose vitreg, timm or transformers"):
        unchecked(save)(model(), tmp_path / "model.safetensors", format="onnx")
    with pytest.raises(CheckpointError, match=r"must end in .safetensors"):
        save(model(), tmp_path / "model.pth")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["vit_base_patch14_reg4_dinov2", "vit_base_patch16_dinov3"])
@torch.no_grad()
def test_full_size(architecture, tmp_path):
    hf = pytest.importorskip("transformers")
    vit = from_timm(timm.create_model(architecture, global_pool="token"))
    save(vit, tmp_path / "folder", format="transformers")
    x = images(*vit.config.image_size)[:1]
    theirs = hf.AutoModel.from_pretrained(tmp_path / "folder").eval()
    close(vit(x).sequence(), theirs(x).last_hidden_state)
