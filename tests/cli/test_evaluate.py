"""`vitreg evaluate knn`, `linear` and the others as a user runs them, on the models that come with the package."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitreg
from probes.dense import squares
from vitreg import cli
from vitreg.images import open_image_set
from vitreg.probes.catalogue import PROBES
from vitreg.probes.heads.logistic import LogisticConfig

PAIR = ("vitreg_tiny", "vitreg_tiny_reg4")
SHORT = {
    "linear": {"epochs": 1, "epoch_length": 20},
    "tokens": {"draws": 1, "min_images": 5, "logistic": LogisticConfig(C=(0.1, 1.0))},
    "position": {"epochs": 2},
    "segmentation": {"steps": 20},
    "depth": {"steps": 20},
    "depth-lin4": {"steps": 20},
}


@pytest.fixture(autouse=True)
def _checkpoints(test_data, monkeypatch):
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(test_data / "weights"))


def run(*args: object) -> int | str:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    return stop.value.code or 0


@pytest.fixture(scope="module")
def folders(test_data, tmp_path_factory) -> Path:
    """train/ and val/ with four classes each, and 12 and 5 images of a class."""
    root = tmp_path_factory.mktemp("folders")
    for part, number in (("train", 12), ("val", 5)):
        images = open_image_set(test_data / "tiny-imagenet-100" / f"{part}.parquet")
        assert images.labels is not None
        for label in (3, 7, 20, 50):
            (root / part / f"class {label}").mkdir(parents=True)
            for index in [i for i, found in enumerate(images.labels) if found == label][:number]:
                images.image(index).save(root / part / f"class {label}" / f"{index}.png")
    return root


def test_evaluate_knn_writes_four_files_and_loads_every_model_once(folders, tmp_path, capsys, monkeypatch):
    out, loaded, load = tmp_path / "out", [], vitreg.load
    monkeypatch.setattr(vitreg, "load", lambda source, **options: loaded.append(source) or load(source, **options))
    arguments = ("evaluate", "knn", "--data", folders, "--models", *PAIR, "--out", out, "--k", 1, 5)
    assert run(*arguments, "--json") == 0
    assert loaded == list(PAIR)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "evaluation.json").read_text())
    assert printed["format"] == "vitreg-evaluation/1"
    assert [model["name"] for model in printed["models"]] == list(PAIR)
    assert [model["compared_with"] for model in printed["models"]] == [None, "vitreg_tiny"]
    scores = printed["models"][1]["probes"]["knn"]["scores"]
    assert {score["subject"] for score in scores} == {"k = 1", "k = 5"}
    for score in scores:
        assert score["interval"][0] <= score["value"] <= score["interval"][1]
        assert score["difference"] is not None
    rows = list(csv.DictReader((out / "evaluation.csv").open()))
    assert [float(row["value"]) for row in rows if row["model"] == PAIR[1]] == [score["value"] for score in scores]
    for page in ("evaluation.md", "report.html"):
        text = (out / page).read_text()
        assert all(name in text for name in PAIR)
        assert f"{scores[0]['value']:.1f} [" in text
    # The features and the answers are there: nothing is loaded twice, and the same is printed for people.
    before = {path: path.stat().st_mtime_ns for path in (out / "features").rglob("*.safetensors")}
    assert run(*arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "features").rglob("*.safetensors")} == before
    table = capsys.readouterr().out
    assert f"{scores[0]['value']:.1f} [" in table
    assert "report.html" in table


def test_evaluate_all_asks_every_probe(folders, photographs, tmp_path, capsys, monkeypatch):
    for name, settings in SHORT.items():
        config = dataclasses.replace(PROBES[name].config, **settings)
        monkeypatch.setitem(PROBES, name, dataclasses.replace(PROBES[name], config=config))
    dense = squares(tmp_path / "dense", train=6, val=3)
    boxes = tmp_path / "boxes"
    for part in ("images", "labels"):
        (boxes / part).mkdir(parents=True)
    for number, path in enumerate(photographs[:2]):
        Image.open(path).resize((96, 64)).save(boxes / f"images/{number}.png")
        (boxes / f"labels/{number}.txt").write_text("0 0.5 0.5 0.9 0.9\n")
    out = tmp_path / "out"
    status = run(
        "evaluate", "all", "--models", *PAIR, "--out", out, "--json", "--data", folders, "--train-images", 24,
        "--segmentation", dense, "--segmentation-size", 64, 96, "--depth", dense, "--depth-size", 64, 96,
        "--depth-variants", "lin.1", "lin.4", "--discovery", f"yolo:{boxes}",
    )  # fmt: skip
    assert status == 0
    printed = json.loads(capsys.readouterr().out)
    expected = {
        "knn", "linear", "tokens", "position", "reconstruction", "segmentation", "depth", "depth-lin4", "discovery",
    }  # fmt: skip
    assert all(set(model["probes"]) == expected for model in printed["models"])
    assert printed["data"]["classification"]["num_train"] == 24
    for model in printed["models"]:
        assert len(model["probes"]["tokens"]["scores"]) > model["num_registers"]
        outlier = [s for p in model["probes"].values() for s in p["scores"] if s["subject"] == "outlier"]
        assert outlier
        if model["name"] == PAIR[0]:
            assert any(score["value"] is not None for score in outlier)
        else:
            assert all(score["value"] is None and "outlier" in score["missing"] for score in outlier), "said, not zero"
    page = (out / "report.html").read_text()
    assert page.count('alt="truth of') == 6
    assert "https://" not in page
    header = (out / "evaluation.md").read_text().splitlines()[0]
    assert header.count("|") == len(expected) + 2


def test_images_without_labels_are_asked_what_patches_know(photographs, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photographs[:20]:
        Image.open(path).resize((64, 64)).save(folder / f"{path.stem}.png")
    assert run("evaluate", "all", "--data", folder, "--models", PAIR[0], "--out", tmp_path / "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["models"][0]["probes"]) == {"position", "reconstruction"}
    assert (printed["data"]["classification"]["num_train"], printed["data"]["classification"]["num_val"]) == (16, 4)


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name.startswith("evaluate")])
def test_help_of_every_command(command, capsys):
    assert run(*command.split(), "--help") == 0
    text = capsys.readouterr().out
    assert f"vitreg {command} --" in " ".join(text.split())
    assert "--models" in text


def one_class(root: Path) -> list[object]:
    for part in ("train", "val"):
        (root / part / "only").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64, 64), (i, 80, 90)).save(root / part / "only" / f"{i}.png")
    return ["knn", "--data", root]


def class_missing(root: Path) -> list[object]:
    for part, classes in (("train", "abc"), ("val", "ab")):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            Image.new("RGB", (64, 64)).save(root / part / name / "0.png")
    return ["linear", "--data", root]


def mask_of_another_size(root: Path) -> list[object]:
    squares(root, train=3, val=2)
    Image.new("L", (7, 5)).save(root / "train/masks/01.png")
    return ["segmentation", "--data", root]


def mask_missing(root: Path) -> list[object]:
    squares(root, train=3, val=2)
    (root / "val/masks/01.png").unlink()
    return ["segmentation", "--data", root]


def only_holes(root: Path) -> list[object]:
    squares(root, train=3, val=2)
    for path in (root / "train/depth").iterdir():
        Image.fromarray(np.zeros((80, 120), np.uint16)).save(path)
    return ["depth", "--size", 64, "--data", root]


def eight_bits(root: Path) -> list[object]:
    squares(root, train=3, val=2)
    Image.new("RGB", (120, 80)).save(root / "train/depth/02.png")
    return ["depth", "--size", 64, "--data", root]


def no_folder(root: Path) -> list[object]:
    return ["all", "--segmentation", root / "absent"]


def nothing(root: Path) -> list[object]:
    return ["all"]


def broken_image(root: Path) -> list[object]:
    for part in ("train", "val"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            (root / part / name / "0.png").write_text("no image")
    return ["tokens", "--data", root]


def test_evaluate_had_no_strict(folders, tmp_path, capsys):
    """An image that cannot be read was left out, whoever asked. Nor may features or answers of before lack one."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(folders, data)
    broken = sorted((data / "val").rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:60])
    arguments = ("evaluate", "knn", "--data", data, "--models", PAIR[0], "--k", 1, "--out")
    assert run(*arguments, tmp_path / "fresh", "--strict") == 2
    assert broken.name in capsys.readouterr().err.splitlines()[-1]
    assert run(*arguments, out, "--json") == 0
    asked = json.loads(capsys.readouterr().out)["models"][0]["probes"]["knn"]
    assert asked["details"]["skipped"] == {"training": 0, "validation": 1}
    assert run(*arguments, out, "--strict") == 2
    assert broken.name in capsys.readouterr().err.splitlines()[-1]


def two_classes(root: Path) -> Path:
    for part in ("train", "val"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (64, 64), (i, 80, 90)).save(root / part / name / f"{i}.png")
    return root


def no_text_tower(root: Path) -> list[object]:
    return ["zero-shot", "--data", two_classes(root)]


def wrong_option(root: Path) -> list[object]:
    return ["knn", "--data", two_classes(root), "--train-images", 0]


def fewer_images_than_classes(root: Path) -> list[object]:
    return ["knn", "--data", two_classes(root), "--train-images", 1]


def one_image(root: Path) -> list[object]:
    root.mkdir()
    Image.new("RGB", (64, 64)).save(root / "only.png")
    return ["position", "--data", root]


def no_such_block(root: Path) -> list[object]:
    return ["position", "--data", two_classes(root), "--block", 12]


def parquet_cut_in_the_middle(root: Path) -> list[object]:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = [next(two_classes(root).rglob("*.png")).read_bytes()] * 40
    file = root / "all.parquet"
    parquet.write_table(pyarrow.table({"image": data, "label": [0, 1] * 20}), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return ["knn", "--data", file]


def captions_in_latin_1(root: Path) -> list[object]:
    two_classes(root)
    (root / "captions.csv").write_text("image,caption\ntrain/a/0.png,un café\n", encoding="latin-1")
    return ["reconstruction", "--data", root / "captions.csv"]


def tar_of_an_absurd_size(root: Path) -> list[object]:
    image, file = next(two_classes(root).rglob("*.png")), root / "all.tar"
    with tarfile.open(file, "w") as tar:
        tar.add(image, "a.png")
    header = bytearray(file.read_bytes()[:512])
    header[124:136], header[148:156] = b"\x80" + b"\xff" * 11, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    file.write_bytes(header + file.read_bytes()[512:])
    return ["knn", "--data", file]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (parquet_cut_in_the_middle, "all.parquet cannot be read as Parquet"),
        (captions_in_latin_1, "captions.csv is not in UTF-8"),
        (tar_of_an_absurd_size, "all.tar is damaged or cut short"),
        (one_class, "two at least"),
        (class_missing, "val lacks c"),
        (mask_of_another_size, "01.png"),
        (mask_missing, "01.png"),
        (only_holes, "depth"),
        (eight_bits, "02.png"),
        (no_folder, "absent"),
        (nothing, "--segmentation"),
        (broken_image, "0.png"),
        (no_text_tower, "text"),
        (wrong_option, "--train-images"),
        (fewer_images_than_classes, "--train-images 1 is fewer than the classes of"),
        (one_image, "1 images, of which none can be held out"),
        (no_such_block, "block 12 does not exist"),
    ],
)
def test_bad_input_is_one_sentence(prepare, message, tmp_path, capsys):
    probe, *rest = prepare(tmp_path / "data")
    assert run("evaluate", probe, "--models", PAIR[0], "--out", tmp_path / "out", *rest) not in (0, None)
    captured = capsys.readouterr()
    assert captured.out == ""
    *_, last = captured.err.strip().splitlines()
    assert message in last
    assert "Traceback" not in captured.err
    print(last)


def test_settings_that_make_no_sense_are_refused(folders, tmp_path, capsys):
    arguments = ("--data", folders, "--models", PAIR[0], "--out", tmp_path / "out", "--learning-rates", 0)
    assert run("evaluate", "linear", *arguments) == 2
    assert "all must be above 0" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_every_model_once(folders, tmp_path, capsys):
    assert run("evaluate", "knn", "--data", folders, "--models", PAIR[0], PAIR[0], "--out", tmp_path) != 0
    assert "each once" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(folders, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_batch", full)
    assert run("evaluate", "knn", "--data", folders, "--models", PAIR[0], "--out", tmp_path / "out") != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "space" in error.lower()
    monkeypatch.undo()
    monkeypatch.setenv("VITREG_CHECKPOINTS", "")
    assert run("evaluate", "knn", "--data", folders, "--models", PAIR[0], "--out", tmp_path / "out", "--k", 5) == 0


def test_ctrl_c_keeps_what_is_done_and_shows_it(folders, tmp_path):
    """Interrupted in the first model's linear probe, after k-NN; the same command goes on."""
    code = (
        "import dataclasses, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a suite in the background inherits it ignored
        "from vitreg import cli\n"
        "from vitreg.probes.catalogue import PROBES\n"
        "long = dataclasses.replace(PROBES['linear'].config, epochs=1, epoch_length=100000)\n"
        "kept = {'knn': PROBES['knn'], 'linear': dataclasses.replace(PROBES['linear'], config=long)}\n"
        "PROBES.clear()\n"
        "PROBES.update(kept)\n"
        "cli.main(sys.argv[1:])\n"
    )
    command = [
        sys.executable, "-c", code, "evaluate", "all", "--data", str(folders), "--models", *PAIR,
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # The state is written every ten seconds.
    while not list((tmp_path / "out").glob("states/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in error.splitlines()[-1]
    assert "what is left takes on this machine about: linear" in error
    assert "k-NN, 224 px: top-1" in printed
    assert "The last command was interrupted" in printed
    (model,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]
    assert list(model["probes"]) == ["knn"]
    assert len(list((tmp_path / "out" / "features").iterdir())) == 2


def test_a_wrong_model_ends_the_command_before_the_first_pass(folders, tmp_path, capsys):
    arguments = ("--data", folders, "--models", PAIR[0], "vitreg_tinny", "--out", tmp_path)
    assert run("evaluate", "knn", *arguments) == 2
    assert "vitreg_tinny" in capsys.readouterr().err
    assert not (tmp_path / "features").exists()


def test_commands_into_one_folder_add_up(folders, tmp_path, capsys):
    out = tmp_path / "out"
    dense = squares(tmp_path / "dense", train=4, val=2)
    at_64 = ("--size", 64, 96, "--out", out)
    assert run("evaluate", "segmentation", "--data", dense, "--models", *PAIR, *at_64, "--steps", 5) == 0
    assert run("evaluate", "knn", "--data", folders, "--models", PAIR[1], "--out", out, "--k", 1) == 0
    assert run("evaluate", "linear", "--quick", "--data", folders, "--models", *PAIR, "--out", out) == 0
    summary = json.loads((out / "evaluation.json").read_text())
    assert [(model["name"], list(model["probes"])) for model in summary["models"]] == [
        (PAIR[0], ["linear-quick", "segmentation"]),
        (PAIR[1], ["knn", "linear-quick", "segmentation"]),
    ]
    assert summary["models"][1]["probes"]["segmentation"]["scores"][0]["difference"] is not None
    assert set(summary["data"]) == {"classification", "segmentation"}
    page = (out / "report.html").read_text()
    assert page.count('alt="truth of') == 2, "images of the earlier command are shown, too"
    # Of other images: left out, and said.
    capsys.readouterr()
    assert run("evaluate", "knn", "--data", folders, "--val-images", 8, "--models", PAIR[1], "--out", out) == 0
    assert "linear-quick of vitreg_tiny is left out: it is of other images" in capsys.readouterr().out
    summary = json.loads((out / "evaluation.json").read_text())
    assert [list(model["probes"]) for model in summary["models"]] == [["segmentation"], ["knn", "segmentation"]]


def test_a_second_process_is_kept_out_of_the_folder(folders, tmp_path, capsys):
    code = (
        "import pathlib, sys\n"
        "from vitreg.common.disk import lock\n"
        "held = lock(pathlib.Path(sys.argv[1]), 'evaluates into')\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        arguments = ("evaluate", "knn", "--data", folders, "--models", PAIR[0], "--out", tmp_path, "--k", 1)
        assert run(*arguments) == 2
        assert f"another process writes to {tmp_path}; wait for it, or stop it" in capsys.readouterr().err
        other.communicate("")
    assert run(*arguments) == 0


def test_the_folder_may_be_on_another_file_system(folders, tmp_path):
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    with tempfile.TemporaryDirectory(dir=shm) as out:
        assert run("evaluate", "knn", "--data", folders, "--models", PAIR[0], "--out", out, "--k", 1) == 0
        assert (Path(out) / "report.html").is_file()
