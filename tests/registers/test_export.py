"""Models as ONNX and as exported programs, against PyTorch on other batches and sizes than the example's."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from torch import nn

import vitreg
from peers import error, random_images, timm_model
from vitreg import cli
from vitreg.checkpoints.state import build
from vitreg.registers import Exported

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

FAMILIES = {
    "mae": ("vit_base_patch16_224", dict(num_classes=0)),
    "dinov2_swiglu": ("vit_giant_patch14_reg4_dinov2", dict(img_size=98)),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", {}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "parallel, differential": ("vit_dpwee_patch16_reg1_gap_256", {}),
}


def fix(vit: vitreg.VisionTransformer) -> vitreg.VisionTransformer:
    fixed = vitreg.add_test_time_registers(vit, neurons=[(1, 1), (1, 5), (1, 7)], count=2)
    config = dataclasses.replace(fixed.config, register_weight=3, register_start=1)
    return build(config, fixed.state_dict(), "the fixed model")


def run(written: Exported, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a file gives, by the name of the output."""
    if written.path.suffix == ".pt2":
        outputs = torch.export.load(written.path).module()(images)
        return dict(zip(written.outputs, outputs, strict=True))
    session = onnxruntime.InferenceSession(written.path)
    assert tuple(output.name for output in session.get_outputs()) == written.outputs
    outputs = session.run(None, {"images": images.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(written.outputs, outputs, strict=True)}


@torch.no_grad()
def expected(vit: vitreg.VisionTransformer, images: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = vit(images)
    found = {"patches": tokens.patches}
    if tokens.cls is not None:
        found["cls"] = tokens.cls
    if vit.num_registers:
        found["registers"] = tokens.registers
    return found | ({} if vit.head is None else {"logits": vit.classify(images)})


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_of_a_fixed_model(family, tmp_path):
    architecture, options = FAMILIES[family]
    vit = fix(vitreg.from_timm(timm_model(architecture, **options)))
    size = (3 * vit.config.patch_size, 5 * vit.config.patch_size)
    before = {name: weight.clone() for name, weight in vit.state_dict().items()}
    written = vitreg.export(vit, tmp_path / "model.onnx", image_size=size)
    assert written.errors is not None
    assert max(written.errors.values()) <= 1e-5
    for batch in (1, 4):
        images = random_images(*size, batch=batch)
        found, wanted = run(written, images), expected(vit, images)
        assert found.keys() == wanted.keys() == set(written.outputs)
        assert max(error(found[name], wanted[name]) for name in wanted) <= 1e-5
    assert all(torch.equal(weight, before[name]) for name, weight in vit.state_dict().items())


@pytest.mark.parametrize(("suffix", "size"), [("onnx", (160, 288)), ("pt2", None)])
def test_real_vit(tiny_vit, photograph_batch, tmp_path, suffix, size):
    written = vitreg.export(tiny_vit, tmp_path / f"model.{suffix}", image_size=size)
    assert written.outputs == ("cls", "patches", "logits")
    assert written.errors is not None
    assert max(written.errors.values()) <= 1e-5
    height, width = written.preprocess.size
    assert (height, width) == (size or (224, 224))
    images = torch.nn.functional.interpolate(photograph_batch[:3], (height, width), mode="bilinear")
    found, wanted = run(written, images), expected(tiny_vit, images)
    assert max(error(found[name], wanted[name]) for name in wanted) <= 1e-5


def test_metadata_says_how_to_use_it(tmp_path):
    fixed = fix(vitreg.from_timm(timm_model("vit_small_patch16_224")))
    vitreg.export(fixed, tmp_path / "a.onnx", check=False)
    vitreg.export(fixed, tmp_path / "a.pt2", check=False)
    file = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    told = {entry.key: entry.value for entry in file.metadata_props}
    extra = {"vitreg.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    assert json.loads(extra["vitreg.json"]) == told
    assert json.loads(told["preprocess"])["std"] == list(fixed.preprocess.std)
    assert json.loads(told["grid"]) == [14, 14]
    assert vitreg.ViTConfig.from_dict(json.loads(told["config"])) == fixed.config
    dimensions = file.graph.input[0].type.tensor_type.shape.dim
    assert [dimension.dim_param or dimension.dim_value for dimension in dimensions] == ["batch", 3, 224, 224]


def test_single_images(tmp_path):
    vit = vitreg.from_timm(timm_model("vit_small_patch16_224"))
    written = vitreg.export(vit, tmp_path / "one.onnx", image_size=64, dynamic_batch=False)
    file = onnx.load(written.path)
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_half_precision(tmp_path):
    vit = vitreg.from_timm(timm_model("vit_small_patch16_224")).half()
    for suffix in ("onnx", "pt2"):
        written = vitreg.export(vit, tmp_path / f"half.{suffix}", image_size=64)
        assert written.errors is not None
        assert max(written.errors.values()) < 0.01


class Odd(nn.Module):
    """An operator that ONNX lacks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    vit = vitreg.from_timm(timm_model("vit_small_patch16_224"))
    vit.blocks[0].mlp.act = Odd()
    with pytest.raises(ValueError, match=r"ONNX cannot express \w+\.\w*bessel_j0; write a \.pt2 instead"):
        vitreg.export(vit, tmp_path / "odd.onnx", image_size=64)
    assert not list(tmp_path.iterdir())
    written = vitreg.export(vit, tmp_path / "odd.pt2", image_size=64)
    assert written.errors == dict.fromkeys(written.outputs, 0.0)


def test_a_wrong_file_is_not_kept(tmp_path):
    vit = vitreg.from_timm(timm_model("vit_small_patch16_224"))
    with torch.no_grad():
        vit.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"logits of the written model differs from PyTorch's by inf"):
        vitreg.export(vit, tmp_path / "nan.onnx", image_size=64)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("model.pt", {}, r"model\.pt must end in \.onnx or \.pt2"),
        ("model.onnx", {"image_size": (64, 60)}, "image_size 64 x 60 is not in whole patches of 16 pixels"),
        ("model.onnx", {"image_size": 0}, "image_size 0 x 0 is not in whole patches"),
    ],
)
def test_refusals(tmp_path, name, options, said):
    vit = vitreg.from_timm(timm_model("vit_small_patch16_224"))
    with pytest.raises(ValueError, match=said):
        vitreg.export(vit, tmp_path / name, **options)
    with pytest.raises(ValueError, match=r"the model is in bfloat16; export vit\.float\(\) or vit\.half\(\)"):
        vitreg.export(vit.bfloat16(), tmp_path / "model.onnx")


def test_without_onnx(tmp_path, monkeypatch):
    vit = vitreg.from_timm(timm_model("vit_small_patch16_224"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r'ONNX needs onnxscript: pip install "vitreg\[export\]", or write a \.pt2'):
        vitreg.export(vit, tmp_path / "model.onnx")


def test_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["export", "vitreg_tiny", "--out", str(tmp_path / "tiny.onnx"), "--json"])
    assert done.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == str(tmp_path / "tiny.onnx")
    assert told["preprocess"]["size"] == told["size"]
    assert max(told["errors"].values()) <= 1e-5
    with pytest.raises(SystemExit):
        cli.main(["export", "vitreg_tiny", "--out", str(tmp_path / "tiny.pt2"), "--no-check"])
    assert "tiny.pt2: cls, patches, logits of images of 224 x 224 pixels" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.onnx", "tiny.pt2"}
