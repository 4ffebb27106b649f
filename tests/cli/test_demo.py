"""`vitreg demo` as a user runs it: on small pairs of any kind, and on the one that the package brings."""

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
from vitreg.cli.demo import GRID
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


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(folder))
    return folder


@pytest.mark.parametrize(("patch", "class_token"), [(8, True), (4, False), (16, True)])
def test_outliers_are_planted_where_the_model_has_none(checkpoints, tmp_path, capsys, patch, class_token):
    for name, registers in (("vitreg_tiny", 0), ("vitreg_tiny_reg4", 4)):
        vitreg.save(small_vit(patch, registers, class_token), checkpoints / f"{name}.safetensors")
    out = tmp_path / "out"
    assert run("demo", "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert {path.name for path in out.glob("[!.]*")} == FILES
    assert printed == json.loads((out / "demo.json").read_text()) | {"report": str(out / "report.html")}

    assert printed["title"].startswith("Planted outliers: vitreg_tiny has no artifacts of its own")
    assert printed["planted"].startswith("Outliers were planted: unit ")
    page = (out / "report.html").read_text("utf-8")
    assert re.search("<title>Planted outliers", page)
    whats = ["without registers", "4 trained registers", "planted outliers", "planted outliers, test-time register"]
    assert [model["what"] for model in printed["models"]] == whats
    plain, trained, planted, fixed = printed["models"]
    assert [m["verdict"] for m in printed["models"]] == [
        "no artifacts",
        "no artifacts",
        "artifacts, planted",
        "removed",
    ]
    assert planted["outlier_fraction"] == 4 / GRID**2
    assert planted["largest_over_median"] > 10 > fixed["largest_over_median"]
    assert planted["onset_block"] == 1
    assert [len(model["register_norms"]) for model in (plain, trained, fixed)] == [0, 4, 1]
    assert printed["planted"] in planted["diagnosis"]["model"]["changes"]
    assert planted["attention_on_outliers"] > planted["outlier_fraction"]
    assert plain["attention_on_outliers"] == fixed["attention_on_outliers"] == 0
    if class_token:
        for model in printed["models"]:
            at = model["diagnosis"]["blocks"][printed["block"]]
            assert model["attention_on_outliers"] == pytest.approx(at["attention_on_outliers"], rel=1e-4)
            shares = model["attention_on_registers"] or 0, at["attention_on_registers"]
            assert shares[0] == pytest.approx(shares[1], rel=1e-4)
    else:
        assert printed["attention_from"] == "all patches"


def test_nothing_is_planted_where_the_model_has_artifacts(checkpoints, tmp_path, capsys):
    vit = small_vit(8, 0, True)
    preprocess = vit.preprocess.with_size(8 * GRID, 8 * GRID)
    images = torch.stack([preprocess(read_image(path)) for path in bundled_photographs()])
    vitreg.save(plant_artifacts(vit, torch.cat([images, images.flip(2)])), checkpoints / "vitreg_tiny.safetensors")
    vitreg.save(small_vit(8, 4, True), checkpoints / "vitreg_tiny_reg4.safetensors")
    assert run("demo", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert said.startswith("vitreg_tiny has artifacts: after the last block")
    summary = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert summary["planted"] is None
    assert [model["what"] for model in summary["models"]] == [
        "without registers",
        "4 trained registers",
        "test-time register",
    ]
    assert [model["verdict"] for model in summary["models"]] == ["artifacts", "no artifacts", "removed"]
    found = "vitreg_tiny has artifacts, vitreg_tiny_reg4 has no artifacts"
    assert summary["title"] == f"{found}, and a test-time register removes those of the first"


def test_boxes_are_in_pixels_of_the_photograph(checkpoints, tmp_path):
    """chelsea.jpg is 451 x 300: the model sees the 300 x 300 in the middle, 20 x 20 patches of 15 of its pixels."""
    for name, registers in (("vitreg_tiny", 0), ("vitreg_tiny_reg4", 4)):
        vitreg.save(small_vit(8, registers, True), checkpoints / f"{name}.safetensors")
    assert run("demo", "--out", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "demo.json").read_text())
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
    assert Image.open(tmp_path / "demo.png").width > 1500
    plain, trained, *_, fixed = printed["models"]
    assert trained["verdict"] == "no artifacts"
    assert len(trained["register_norms"]) == 4
    assert (plain["verdict"] == "no artifacts") == (printed["planted"] is not None)
    assert fixed["verdict"] == "removed"
    assert len(printed["photographs"]) == len(bundled_photographs()) >= 8
