"""The commands as a user runs them: options, outputs, bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitreg import cli
from vitreg.cli.evaluate.options import EvaluationOptions
from vitreg.cli.options import ModelOptions

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture
def checkpoints(test_data, monkeypatch):
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(test_data / "weights"))


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    return stop.value.code or 0


@pytest.fixture
def folder(photographs, tmp_path) -> Path:
    """Four photographs, and four files that are none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in photographs[:4]:
        shutil.copy(path, folder)
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("not a picture")
    (folder / "cut.jpg").write_bytes(photographs[5].read_bytes()[:3000])
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    return folder


def test_diagnose_writes_report_and_skips_broken_files(checkpoints, folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("diagnose", folder, "--model", TINY, "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["has_artifacts"]
    assert printed["num_images"] == 4
    assert {Path(s["path"]).name for s in printed["skipped"]} == {
        "empty.jpg",
        "text.png",
        "cut.jpg",
        "gone.jpg",
    }
    saved = json.loads((out / "diagnosis.json").read_text())
    assert saved == {key: value for key, value in printed.items() if key != "report"}
    assert Path(printed["report"]).read_text().startswith("<!doctype html>")
    assert run("diagnose", folder, "--model", TINY, "--out", out) == 0
    text = capsys.readouterr().out
    assert "skipped 4 files" in text
    assert "empty.jpg" in text


def test_strict_makes_a_broken_file_an_error(checkpoints, folder, tmp_path, capsys):
    assert run("diagnose", folder, "--model", TINY, "--out", tmp_path / "out", "--strict") == 2
    assert "cut.jpg" in capsys.readouterr().err


def test_attention_arrays_add_up(checkpoints, tiny_vit, photographs, tmp_path, capsys):
    out = tmp_path / "maps"
    args = ("--model", TINY, "--queries", "cls", "3,5", "--block", "-2", "--out", out, "--json")
    assert run("attention", photographs[0], *args) == 0
    maps = json.loads(capsys.readouterr().out)["maps"]
    assert [m["query"] for m in maps] == ["class token", "patch (5, 3)"]
    for entry in maps:
        array = np.load(entry["array"])
        assert array.shape == (3, 14, 14)
        assert array.sum((1, 2)).mean() + entry["to_class_token"] == pytest.approx(1, abs=1e-5)
        assert entry["block"] == 10
        assert Image.open(entry["overlay"]).size == (224, 224)
        assert Image.open(entry["heads"]).width > 500
    trace = tiny_vit.trace(tiny_vit.preprocess(Image.open(photographs[0]))[None], blocks=[10], attention_from="cls")
    expected = trace.attention.to_patches[0, 0, :, 0].detach().numpy()
    np.testing.assert_allclose(np.load(maps[0]["array"]), expected, atol=1e-5)


def test_attention_of_the_whole_picture_keeps_its_aspect(checkpoints, photographs, tmp_path, capsys):
    Image.open(photographs[0]).resize((600, 300)).save(tmp_path / "wide.png")
    args = ("--model", TINY, "--crop", "none", "--out", tmp_path / "maps", "--json")
    assert run("attention", tmp_path / "wide.png", *args) == 0
    entry = json.loads(capsys.readouterr().out)["maps"][0]
    assert np.load(entry["array"]).shape == (3, 14, 28)


def test_pictures_of_one_name_do_not_overwrite_each_other(checkpoints, photographs, tmp_path, capsys):
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        shutil.copy(photographs[i], tmp_path / str(i) / "same.jpg")
    assert run("attention", tmp_path, "--model", TINY, "--out", tmp_path / "maps", "--json") == 0
    arrays = [m["array"] for m in json.loads(capsys.readouterr().out)["maps"]]
    assert len(set(arrays)) == 2


def test_models(capsys):
    assert run("models", "--filter", "dinov2", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 8
    assert {row["num_registers"] for row in rows} == {0, 4}
    assert run("models") == 0
    assert "dinov3_vitb16" in capsys.readouterr().out
    assert run("models", "--filter", "resnet") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["diagnose", "PICTURES", "--model", "dinov2_vitb15"], "dinov2_vitb14"),
        (["diagnose", "nowhere", "--model", TINY], "nowhere"),
        (["diagnose", "PICTURES", "--model", TINY, "--block", "12"], "blocks? 0 to 11|0 to 11"),
        (["diagnose", "PICTURES", "--model", TINY, "--threshold", "p98"], "mean\\+3sd"),
        (["diagnose", "PICTURES", "--model", TINY, "--size", "100"], "multiple of the patch size 16"),
        (["diagnose", "PICTURES", "--model", TINY, "--batch-size", "0"], "at least 1"),
        (["diagnose", "PICTURES", "--model", TINY, "--device", "tpu9"], "tpu9"),
        (["diagnose", "PICTURES", "--model", TINY, "--out", "/proc/nothing"], "cannot write"),
        (["attention", "PICTURES", "--model", TINY, "--queries", "registers"], "no registers"),
        (["attention", "PICTURES", "--model", TINY, "--queries", "14,0"], "outside the grid"),
        (["attention", "PICTURES", "--model", TINY, "--queries", "dog"], "COLUMN,ROW"),
        (["diagnose", "--model", TINY], "IMAGES|image|path"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(args, message, checkpoints, folder, tmp_path, capsys, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    assert run(*[folder if a == "PICTURES" else a for a in args]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("vitreg: ")
    assert len(error.strip().splitlines()) == 1


def test_debug_shows_the_traceback(checkpoints, folder, capsys):
    assert run("diagnose", folder, "--model", TINY, "--threshold", "p98", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_leaves_a_report(test_data, tmp_path):
    """A real SIGINT to a real process, sent while it looks at pictures."""
    out = tmp_path / "out"
    code = (
        "import signal, sys, vitreg.artifacts.observer as d, vitreg.cli as c\n"
        # Where the tests run in the background of a shell, SIGINT is ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Loud(d.Examples):\n"
        "    def add(self, *a):\n"
        "        super().add(*a); print('batch', file=sys.stderr, flush=True)\n"
        "d.Examples = Loud\n"
        f"c.main(['diagnose', {str(test_data / 'imagenet-samples')!r}, '--model', {TINY!r}, '--batch-size', '4', "
        f"'--out', {str(out)!r}])\n"
    )
    env = os.environ | {"VITREG_CHECKPOINTS": str(test_data / "weights")}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    # At the second the first is counted; interrupted in the first, there is nothing to report.
    assert [process.stderr.readline().strip() for _ in range(2)] == ["batch", "batch"]
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - start < 60
    saved = json.loads((out / "diagnosis.json").read_text())
    assert saved["interrupted"]
    assert 4 <= saved["num_images"] < 1000
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("flag", ["--help", "--nonsense"])
def test_help_and_a_wrong_flag_do_not_import_torch(flag):
    """It takes seconds; what is asked of a command before it runs is answered from its signature."""
    code = (
        "import contextlib, io, sys\n"
        "from vitreg import cli\n"
        f"for line in ['--version', '--help', 'evaluate --help', *(f'{{name}} {flag}' for name in cli.COMMANDS)]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            cli.main(line.split())\n"
        "    assert not {'torch', 'numpy', 'jaxtyping', 'PIL'} & set(sys.modules), line\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_of_all_commands_says_what_their_own_says_first():
    for name, line in cli.COMMANDS.items():
        assert (cli.command(name).__doc__ or "").splitlines()[0] == line


def test_import_needs_no_command_line_plotting_or_training_package():
    code = (
        "import sys, torch, time\n"
        "blocked = ('tyro', 'rich', 'lightly', 'ray', 'matplotlib', 'jinja2', 'transformers', 'open_clip', 'timm', "
        "'torchvision', 'sklearn', 'skimage', 'pyarrow')\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in blocked: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import vitreg\n"
        "assert len(vitreg.__all__) <= 25\n"
        "assert all(getattr(vitreg, name) for name in vitreg.__all__)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_is_frozen():
    """A flag is a promise: a change here is a change for users, and belongs into the changelog."""
    import inspect

    flags = {name: sorted(inspect.signature(cli.command(name)).parameters) for name in cli.COMMANDS}
    assert flags == {
        "attention": ["block", "crop", "images", "json", "model", "out", "queries", "strict"],
        "compare": [
            "after", "architecture", "batch_size", "before", "device", "dtype", "images", "json", "limit", "out",
            "size", "strict",
        ],
        "demo": ["json", "out"],
        "diagnose": [
            "batch_size",
            "block",
            "images",
            "json",
            "limit",
            "model",
            "out",
            "strict",
            "threshold",
        ],
        "fix": [
            "batch_size", "images", "json", "limit", "method", "model", "out", "registers", "report", "strict",
        ],
        "discover": [
            "batch_size", "images", "json", "max_objects", "method", "model", "out", "overlays", "protocol", "strict",
        ],
        "evaluate all": [
            "class_names", "common", "data", "depth", "depth_scale", "depth_size", "depth_variants", "discovery",
            "segmentation", "segmentation_ignore", "segmentation_size", "segmentation_variants",
        ],
        "evaluate depth": ["common", "data", "protocol", "scale", "size", "variant"],
        "evaluate discovery": ["batch_size", "data", "device", "dtype", "json", "models", "out", "sweep"],
        **{
            f"evaluate {probe}": ["common", "data", "protocol"]
            for probe in ("knn", "linear", "position", "reconstruction", "tokens")
        },
        "evaluate segmentation": ["common", "data", "ignore", "protocol", "size", "variant"],
        "evaluate zero-shot": ["class_names", "common", "data", "protocol"],
        "models": ["filter", "json"],
        "timeline": ["json", "out", "runs"],
        "train": [
            "accumulation", "batch_size", "checkpoint_every", "compile", "data", "device", "diagnose_every",
            "drop_path", "dtype", "ema_decay", "epochs", "gradient_checkpointing", "image_size", "json", "log_every",
            "lr", "out", "patch_size", "recipe", "registers", "resume", "seed", "sharding", "size", "smoke",
            "steps", "val", "warmup_steps", "weight_decay", "workers",
        ],
    }  # fmt: skip
    assert list(EvaluationOptions.__dataclass_fields__) == [
        "models", "out", "train_images", "val_images", "patch_images", "device", "dtype", "feature_batch_size", "json",
    ]  # fmt: skip
    assert list(ModelOptions.__dataclass_fields__) == ["model", "architecture", "device", "dtype", "size"]


def test_the_public_names_are_frozen():
    import vitreg

    assert dir(vitreg) == sorted(vitreg.__all__)
    assert sorted(vitreg.__all__) == [
        "AttentionRows", "CheckpointError", "Comparison", "Detection", "Diagnosis", "ImageError", "Preprocess",
        "RegisterNeuron", "Tokens", "Trace", "ViTConfig", "VisionTransformer", "add_registers",
        "add_test_time_registers", "compare", "diagnose", "discover_objects", "find_register_neurons",
        "from_open_clip", "from_state_dict", "from_timm", "from_transformers", "list_models", "load", "save",
    ]  # fmt: skip


def test_a_full_disk_is_one_sentence_that_says_what_to_do(monkeypatch, tmp_path, capsys):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "models.json"))

    monkeypatch.setattr("vitreg.cli.models.models", full)
    assert run("models") == 2
    told = f"vitreg: the disk has no room left for {tmp_path / 'models.json'}; make room, or choose another --out\n"
    assert capsys.readouterr().err == told
