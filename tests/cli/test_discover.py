"""`vitreg discover` and `vitreg evaluate discovery` as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitreg import cli, discover_objects

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(autouse=True)
def _checkpoints(test_data, monkeypatch):
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(test_data / "weights"))


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    return stop.value.code or 0


@pytest.fixture
def yolo(photographs, tmp_path) -> Path:
    """Six small images, five with a box, and a label of an image that is not there."""
    root = tmp_path / "data"
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for number, path in enumerate(photographs[:6]):
        Image.open(path).resize((100, 64 + 16 * (number % 2))).save(root / f"images/{number}.jpg")
        if number < 5:
            (root / f"labels/{number}.txt").write_text("0 0.5 0.5 0.9 0.9\n")
    (root / "labels/gone.txt").write_text("0 0.5 0.5 0.9 0.9\n")
    return root


def test_discover_writes_boxes_and_overlays(tiny_vit, yolo, tmp_path, capsys):
    folder, out = yolo / "images", tmp_path / "out"
    Image.new("RGB", (40, 100)).save(folder / "small.png")
    (folder / "text.png").write_text("no image")
    shutil.copytree(folder, folder / "again")
    assert run("discover", folder, "--model", TINY, "--out", out, "--max-objects", 2, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "detections.json").read_text())
    assert {Path(skip["path"]).name for skip in printed["skipped"]} == {"small.png", "text.png"}
    assert len(printed["skipped"]) == 4
    assert len(printed["images"]) == 12
    paths = [Path(entry["image"]) for entry in printed["images"]]
    for entry, found in zip(printed["images"], discover_objects(tiny_vit, paths, max_objects=2), strict=True):
        objects = (found, *found.others)
        assert [tuple(o["box"]) for o in entry["objects"]] == [o.box for o in objects]
        assert [tuple(o["seed"]) for o in entry["objects"]] == [o.seed for o in objects]
        mask = np.array([list(row) for row in entry["objects"][0]["mask"]]) == "1"
        np.testing.assert_array_equal(mask, found.mask)
        assert entry["grid"] == list(found.mask.shape)
        assert Image.open(entry["overlay"]).height > entry["height"]
    assert len({entry["overlay"] for entry in printed["images"]}) == 12

    coco = json.loads((out / "coco.json").read_text())
    boxes = [o["box"] for entry in printed["images"] for o in entry["objects"]]
    assert [image["file_name"] for image in coco["images"]] == [str(path) for path in paths]
    assert len(coco["annotations"]) == len(boxes)
    for annotation, (x0, y0, x1, y1) in zip(coco["annotations"], boxes, strict=True):
        assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        assert annotation["area"] == (x1 - x0) * (y1 - y0)
    assert [o["image_id"] for o in coco["annotations"]][:2] == [1, 1]


def test_discover_says_what_it_did_and_needs_no_overlays(yolo, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ("--method", "tokencut", "--no-overlays", "--facet", "keys", "--no-center")
    assert run("discover", yolo / "images", "--model", TINY, "--out", out, *flags) == 0
    assert "6 objects in 6 images" in capsys.readouterr().out
    assert {path.name for path in out.glob("[!.]*")} == {"detections.json", "coco.json"}
    assert json.loads((out / "detections.json").read_text())["protocol"]["center"] is False


EVALUATE = ("evaluate", "discovery", "--models", TINY, "--out")


def test_evaluate_writes_table_json_and_image(yolo, tmp_path, capsys):
    out = tmp_path / "out"
    data = f"yolo:{yolo}"
    assert run(*EVALUATE, out, "--data", data, "--sweep", "blocks", "normalize", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "discovery.json").read_text())
    assert (printed["num_images"], printed["num_images_without_boxes"]) == (5, 1)
    assert [Path(path).stem for path in printed["missing_images"]] == ["gone"]
    assert len(printed["models"][0]["settings"]) == 8
    assert Image.open(out / "discovery.png").width > 800
    # Done already: the same numbers, from the record.
    assert run(*EVALUATE, out, "--data", data, "--sweep", "blocks", "normalize") == 0
    text = capsys.readouterr().out
    assert "on 5 images; left out: 1 without boxes" in text
    assert "gone" in text
    assert "on the other half" in text
    assert f"{printed['models'][0]['best']['corloc']:.1f}" in text
    assert run(*EVALUATE, out, "--data", data) == 2
    assert "another sweep" in capsys.readouterr().err


def test_evaluate_compares_models_loaded_from_files(tiny_vit, yolo, tmp_path, capsys):
    import vitreg

    vitreg.save(tiny_vit, tmp_path / "copy.safetensors")
    data = ("--data", f"yolo:{yolo}", "--models", TINY, tmp_path / "copy.safetensors", "--out", tmp_path / "out")
    assert run("evaluate", "discovery", *data, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["models"]
    assert first["protocol"] == second["protocol"]
    assert run("evaluate", "discovery", *data) == 0
    printed = capsys.readouterr().out
    assert "copy minus vit_tiny" in printed
    assert f"{tmp_path / 'copy.safetensors'}" not in printed, "an absolute path is no name"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["discover", "nowhere", "--model", TINY], "nowhere"),
        (["discover", "DATA/images", "--model", TINY, "--block", "12"], "blocks 0 to 11"),
        (["discover", "DATA/images", "--model", TINY, "--k-patches", "0"], "k_patches is 0"),
        (["discover", "DATA/images", "--model", TINY, "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["discover", "DATA/small", "--model", TINY], "needs 3 x 3 patches"),
        (["discover", "DATA/images", "DATA/small", "--model", TINY, "--strict"], "needs 3 x 3 patches"),
        (["discover", "DATA/images", "--model", TINY, "--method", "tokencut", "--max-objects", "2"], "max_objects"),
        (["evaluate", "discovery", "--data", "voc2007:DATA", "--models", TINY], "folder that holds VOCdevkit"),
        (["evaluate", "discovery", "--data", "DATA", "--models", TINY], "is unknown; give one of"),
        (["evaluate", "discovery", "--data", "yolo:DATA", "--models", "dinov2_vitb15"], "dinov2_vitb14"),
        (["evaluate", "discovery", "--data", "yolo:DATA", "--models", TINY, TINY], "each once"),
        (["evaluate", "discovery", "--data", "json:DATA/none.json", "--models", TINY], "not one box"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(args, message, yolo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (yolo / "small").mkdir()
    Image.new("RGB", (300, 40)).save(yolo / "small/flat.png")
    (yolo / "none.json").write_text('[{"image": "images/0.jpg"}]')
    assert run(*[str(a).replace("DATA", str(yolo)) for a in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vitreg: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("args", [["evaluate"], ["evaluate", "nothing"], ["evaluate", "discovery"]])
def test_incomplete_commands_are_refused(args, capsys):
    assert run(*args) == 2
    assert capsys.readouterr().err


def test_ctrl_c_keeps_what_is_done_and_the_same_command_continues(test_data, yolo, tmp_path, capsys):
    """A real SIGINT to a real process, after the second image."""
    out = tmp_path / "out"
    args = ["evaluate", "discovery", "--data", f"yolo:{yolo}", "--models", TINY, "--out", str(out), "--batch-size", "1"]
    code = (
        "import signal, sys, vitreg.discovery.sweep as s, vitreg.cli as c\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a suite in the background inherits it ignored
        "boxes, n = s._boxes, 0\n"
        "def loud(*a):\n"
        "    global n; n += 1\n"
        "    if n == 3: print('third', file=sys.stderr, flush=True); __import__('time').sleep(60)\n"
        "    return boxes(*a)\n"
        "s._boxes = loud\n"
        f"c.main({args!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "third" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in error
    (record,) = out.glob("boxes-*.jsonl")
    before = record.read_text()
    assert len(before.splitlines()) == 3
    assert run(*args) == 0
    assert record.read_text().startswith(before)
    assert len(record.read_text().splitlines()) == 6
