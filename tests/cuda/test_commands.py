"""Every command on a GPU, in float32 and in half precision: it ends well and writes what it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("tyro", reason="the command line needs tyro")
import vitreg
from cuda.test_analysis import some_images
from probes.dense import squares
from vitreg import cli
from vitreg.artifacts.planted import plant_artifacts

pytestmark = pytest.mark.cuda
MODEL = "vitreg_tiny_reg4"
DATA, IMAGES, IMAGE, DENSE = "DATA", "IMAGES", "IMAGE", "DENSE"
BOXES, CAPTIONS, CLIP, PLANTED = "BOXES", "CAPTIONS", "CLIP", "PLANTED"
EVALUATED = ("--data", DATA, "--models", MODEL)
TRAIN = (
    *("--size", "micro", "--image-size", "32", "--patch-size", "16", "--batch-size", "6", "--steps", "2"),
    *("--diagnose-every", "0", "--workers", "0"),
)
COMMANDS: dict[str, tuple[str, ...]] = {
    "diagnose": (IMAGES, "--model", MODEL),
    "attention": (IMAGE, "--model", MODEL, "--queries", "registers", "1,2"),
    "fix": (DATA, "--model", PLANTED),
    "compare": ("vitreg_tiny", MODEL, IMAGES),
    "discover": (IMAGES, "--model", MODEL),
    "extract": (IMAGES, "--model", MODEL),
    "evaluate knn": (*EVALUATED, "--k", "5"),
    "evaluate linear": (*EVALUATED, "--epochs", "1", "--epoch-length", "10"),
    "evaluate zero-shot": ("--data", DATA, "--models", CLIP),
    "evaluate tokens": (*EVALUATED, "--draws", "1", "--min-images", "5", "--C", "0.1", "1.0"),
    "evaluate position": (*EVALUATED, "--epochs", "2"),
    "evaluate reconstruction": EVALUATED,
    "evaluate segmentation": ("--data", DENSE, "--models", MODEL, "--steps", "20"),
    "evaluate depth": ("--data", DENSE, "--models", MODEL, "--steps", "20", "--bins", "16"),
    "evaluate discovery": ("--data", BOXES, "--models", MODEL),
    "train": ("deit3", "--data", DATA, *TRAIN),
}
ELSEWHERE = {
    "evaluate all": "all of the above, in one",
    "timeline": "reads what a run has written",
    "models": "a list",
    "export": "writes on the CPU what tests/registers/test_export.py reads",
    "demo": "diagnose, fix and discover, in one",
}


def test_every_command_is_tried_here():
    assert set(COMMANDS) | set(ELSEWHERE) == set(cli.COMMANDS)


@pytest.fixture(scope="session")
def places(folders, tmp_path_factory) -> dict[str, str]:
    """What the words in capitals stand for."""
    root = tmp_path_factory.mktemp("places")
    for part in ("images", "labels"):
        (root / "boxes" / part).mkdir(parents=True)
    for number, path in enumerate(sorted((folders / "val").rglob("*.png"))[:4]):
        Image.open(path).resize((96, 64)).save(root / "boxes" / "images" / f"{number}.png")
        (root / "boxes" / "labels" / f"{number}.txt").write_text("0 0.5 0.5 0.9 0.9\n", encoding="utf-8")
    (root / "captioned" / "images").mkdir(parents=True)
    rows = ["image,caption"]
    for number, path in enumerate(sorted((folders / "train").rglob("*.png"))):
        Image.open(path).save(root / "captioned" / "images" / f"{number}.png")
        rows.append(f"{number}.png,an image of {path.parent.name}")
    (root / "captioned" / "captions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    vit = vitreg.load("vitreg_tiny")
    vit = plant_artifacts(vit, some_images(vit, folders))
    vit.config = dataclasses.replace(vit.config, name="planted")
    vitreg.save(vit, root / "planted.safetensors")
    squares(root / "squares", train=6, val=3)
    return {
        DATA: str(folders),
        IMAGES: str(folders / "train" / "class 0"),
        IMAGE: str(folders / "train" / "class 0" / "0.png"),
        DENSE: str(root / "squares"),
        BOXES: f"yolo:{root / 'boxes'}",
        CAPTIONS: str(root / "captioned"),
        PLANTED: str(root / "planted.safetensors"),
        CLIP: str(root / "clip"),
    }


def run(*args: object) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    assert not stop.value.code, stop.value.code


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("command", COMMANDS)
def test_command(device, command, dtype, places, tmp_path):
    if dtype == "float16" and command in ("train", "fix"):
        pytest.skip("trains in bfloat16" if command == "train" else "the planted vectors overflow float16")
    if command == "evaluate zero-shot":
        pytest.importorskip("open_clip")
        if not Path(places[CLIP]).exists():
            run("train", "clip", "--data", places[CAPTIONS], *TRAIN, "--out", places[CLIP], "--device", device)
    out = tmp_path / ("fixed.safetensors" if command == "fix" else "out")
    args = [places.get(arg, arg) for arg in COMMANDS[command]]
    run(*command.split(), *args, "--out", out, "--device", device, "--dtype", dtype)
    assert out.exists()
    if command == "train":
        assert vitreg.load(out, device=device).config.depth > 0
    if command == "fix":
        assert vitreg.load(out).config.num_test_time_registers > 0
