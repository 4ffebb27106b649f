"""`vitreg demo` as a user runs it: on the package's pair, on small pairs of any kind, and on one model."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image

import vitreg
from vitreg.artifacts import plant_artifacts
from vitreg.cli import main
from vitreg.images import bundled_photographs, read_image

FILES = {"report.html", "demo.json", "demo.png"}


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    return stop.value.code or 0


def small_vit(patch: int, registers: int, class_token: bool) -> vitreg.VisionTransformer:
    """A random model that tells its patches apart a little, as trained ones do."""
    torch.manual_seed(0)
    config = vitreg.ViTConfig(
        embed_dim=48, depth=4, num_heads=3, mlp_dim=96, patch_size=patch, image_size=(64, 64),
        num_registers=registers, class_token=class_token, pool="token" if class_token else "mean", num_classes=5,
        preprocess=vitreg.Preprocess(size=(64, 64), crop_pct=1.0, multiple_of=patch),
    )  # fmt: skip
    vit = vitreg.VisionTransformer(config).eval()
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight *= 5
    return vit


def ill_vit(class_token: bool = True) -> vitreg.VisionTransformer:
    """The same with outliers in the corners."""
    vit = small_vit(4, 0, class_token)
    images = torch.stack([vit.preprocess(read_image(path)) for path in bundled_photographs()])
    return plant_artifacts(vit, torch.cat([images, images.flip(2)]))


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(folder))
    return folder


def demo(out: Path, *args: object) -> dict:
    """The summary of a run that went well."""
    assert run("demo", "--out", out, *args) == 0
    assert {path.name for path in out.glob("[!.]*")} == FILES
    return json.loads((out / "demo.json").read_text())


def test_a_pair_of_which_the_first_has_artifacts(checkpoints, tmp_path, capsys):
    vitreg.save(ill_vit(), checkpoints / "vitreg_tiny.safetensors")
    vitreg.save(small_vit(4, 4, True), checkpoints / "vitreg_tiny_reg4.safetensors")
    summary = demo(tmp_path / "out", "--json")
    assert json.loads(capsys.readouterr().out) == summary | {"report": str(tmp_path / "out" / "report.html")}
    plain, trained, fixed = summary["models"]
    assert [m["what"] for m in summary["models"]] == ["without registers", "4 trained registers", "test-time register"]
    assert [m["verdict"] for m in summary["models"]] == ["artifacts", "no artifacts", "removed"]
    names = [model["name"] for model in summary["models"]]
    assert summary["title"] == (
        f"{names[0]} has artifacts, {names[1]} has no artifacts, and a test-time register removes those of the first"
    )
    assert summary["verdict"][2].startswith("1 test-time register added")
    assert summary["verdict"][2].endswith("These images are the photographs and their quarters.")
    assert any("the register of the fixed model has a norm of" in sentence for sentence in summary["verdict"])
    assert not any("second" in sentence for sentence in summary["verdict"]), "which here is the trained one"
    assert plain["outlier_fraction"] == 4 / 16**2
    assert plain["largest_over_median"] > 10 > fixed["largest_over_median"]
    assert [len(model["register_norms"]) for model in summary["models"]] == [0, 4, 1]
    assert plain["attention_on_outliers"] > plain["outlier_fraction"]
    assert trained["attention_on_outliers"] == fixed["attention_on_outliers"] == 0
    for model in summary["models"]:
        at = model["diagnosis"]["blocks"][summary["block"]]
        assert model["attention_on_outliers"] == pytest.approx(at["attention_on_outliers"], rel=1e-4)
        assert (model["attention_on_registers"] or 0) == pytest.approx(at["attention_on_registers"], rel=1e-4)


@pytest.mark.parametrize(("patch", "class_token"), [(8, True), (4, False), (16, True)])
def test_a_pair_without_artifacts_has_two_columns(checkpoints, tmp_path, patch, class_token):
    for name, registers in (("vitreg_tiny", 0), ("vitreg_tiny_reg4", 4)):
        vitreg.save(small_vit(patch, registers, class_token), checkpoints / f"{name}.safetensors")
    summary = demo(tmp_path / "out")
    assert [model["verdict"] for model in summary["models"]] == ["no artifacts"] * 2
    assert summary["title"] == "vitreg_tiny has no artifacts and vitreg_tiny_reg4 has no artifacts"
    assert summary["verdict"][-1] == "No register was added, because there are no artifacts to move."
    assert summary["grid"] == [64 // patch] * 2
    assert summary["attention_from"] == ("the class token" if class_token else "all patches")


@pytest.mark.parametrize("class_token", [True, False])
def test_a_model_as_it_is_and_fixed(tmp_path, class_token):
    vitreg.save(ill_vit(class_token), tmp_path / "ill.safetensors")
    summary = demo(tmp_path / "out", "--model", tmp_path / "ill.safetensors")
    assert [m["what"] for m in summary["models"]] == ["as it is", "test-time register"]
    assert [m["verdict"] for m in summary["models"]] == ["artifacts", "removed"]
    assert summary["title"].endswith(" has artifacts, and a test-time register removes them")
    assert [m["attention_on_outliers"] > 0 for m in summary["models"]] == [True, False]


def test_a_model_without_artifacts_is_one_column(tmp_path, capsys):
    vitreg.save(small_vit(8, 2, True), tmp_path / "well.safetensors")
    summary = demo(tmp_path / "out", "--model", tmp_path / "well.safetensors", "--size", 96, "--dtype", "bfloat16")
    assert [m["what"] for m in summary["models"]] == ["as it is"]
    assert summary["title"] == "well has no artifacts"
    assert (summary["image_size"], summary["grid"]) == ([96, 96], [12, 12])
    assert "No register was added, because there are no artifacts to move." in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert len(re.findall('<article class="photograph">', page)) == len(bundled_photographs())


def test_too_few_photographs_to_tell_is_one_column(tmp_path):
    vit = ill_vit()
    written = vit.blocks[1].mlp.fc2.weight
    with torch.no_grad():  # outliers of four medians, which only a hundred images prove
        written[:, written.norm(dim=0).argmax()] *= 0.18
    vitreg.save(vit, tmp_path / "unclear.safetensors")
    summary = demo(tmp_path / "out", "--model", tmp_path / "unclear.safetensors")
    assert [m["verdict"] for m in summary["models"]] == ["too few patches to tell"]
    assert "cannot be told from 9 images" in summary["verdict"][0]
    assert not any("no artifacts" in sentence for sentence in summary["verdict"])


def test_boxes_are_in_pixels_of_the_photograph(checkpoints, tmp_path):
    """chelsea.jpg is 451 x 300: the model sees the 300 x 300 in the middle, 20 x 20 patches of 15 of its pixels."""
    for name, registers in (("vitreg_tiny", 0), ("vitreg_tiny_reg4", 4)):
        vitreg.save(small_vit(8, registers, True), checkpoints / f"{name}.safetensors")
    summary = demo(tmp_path / "out", "--size", 160)
    photograph = next(entry for entry in summary["photographs"] if entry["image"] == "chelsea.jpg")
    assert (photograph["width"], photograph["height"]) == (451, 300)
    assert len(photograph["boxes"]) == len(summary["models"])
    for box in photograph["boxes"]:
        patches = [(x - 75.5) / 15 for x in box[::2]] + [y / 15 for y in box[1::2]]
        assert all(abs(place - round(place)) < 0.11 and 0 <= round(place) <= 20 for place in patches)
    for entry in summary["photographs"]:
        for x0, y0, x1, y1 in entry["boxes"]:
            assert 0 <= x0 < x1 <= entry["width"]
            assert 0 <= y0 < y1 <= entry["height"]


def test_the_bundled_pair_needs_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("VITREG_CHECKPOINTS", raising=False)

    def unreachable(*_: object) -> None:
        raise AssertionError("the demo asked for the network")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    assert run("demo", "--out", tmp_path, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert {path.name for path in tmp_path.glob("[!.]*")} == FILES
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert Image.open(tmp_path / "demo.png").width > 1400
    assert [model["verdict"] for model in printed["models"]] == ["artifacts", "no artifacts", "removed"]
    assert [len(model["register_norms"]) for model in printed["models"]] == [0, 4, 1]
    plain, trained, fixed = (model["attention_on_outliers"] for model in printed["models"])
    assert plain > 0.2
    assert trained == fixed == 0
    assert len(printed["photographs"]) == len(bundled_photographs()) >= 8
