"""`vitreg train` and `vitreg timeline` as a user runs them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

import vitreg
from training.runs import real_diagnoses, write_run
from vitreg import cli
from vitreg.cli.overrides import FLAGS
from vitreg.cli.parsing import parse
from vitreg.cli.train import configured
from vitreg.training import RECIPES, TrainingConfig
from vitreg.training.recipes.sizes import SIZES, Size

SMALL = (*("--size", "32", "--patch-size", "16", "--batch-size", "8"), "--workers", "0", "--device", "cpu")


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    return stop.value.code or 0


@pytest.fixture(scope="module")
def found(_tiny_vit, photograph_batch):
    return real_diagnoses(_tiny_vit, photograph_batch[:6])


def test_timeline_draws_says_and_stores(found, tmp_path, capsys):
    none = write_run(tmp_path / "none", {100: found["clean"], 200: found["artifacts"]})
    four = write_run(tmp_path / "four", {100: found["registers"], 200: found["registers"]})
    out = tmp_path / "out"
    assert run("timeline", none, four, "--out", out) == 0
    first, second, see = capsys.readouterr().out.splitlines()
    assert first.startswith("none: artifacts from step 200, block 7 on: ")
    assert second == "four: no artifacts in 2 diagnoses"
    assert str(out / "timeline.png") in see
    assert Image.open(out / "timeline.png").width > 1000
    assert run("timeline", none, four, "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "timeline.json").read_text())
    assert [run["first_step"] for run in printed["runs"]] == [200, None]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["."], "is no run: it has no config.json"),
        (["empty"], "has no diagnosis yet"),
        (["empty", "empty"], "each once"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(folders, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "empty", {})
    assert run("timeline", *folders) == 2
    error = capsys.readouterr().err
    assert error.startswith("vitreg: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "vitreg-out").exists()


@pytest.fixture
def classes(test_data, tmp_path) -> Path:
    """Two classes, each of 16 photographs, and a val part of 4."""
    photographs = sorted((test_data / "imagenet-samples").glob("*.jpg"))
    for label in range(2):
        for part, first, last in (("train", 0, 16), ("val", 16, 20)):
            folder = tmp_path / "data" / part / f"class{label}"
            folder.mkdir(parents=True)
            for path in photographs[40 * label + first : 40 * label + last]:
                Image.open(path).convert("RGB").resize((48, 40)).save(folder / path.name)
    return tmp_path / "data"


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr("vitreg.training.engine.run_logger.matrix_rate", lambda device, dtype: 1e9)


def sentence(capsys) -> str:
    """What was printed, one line on stderr and nothing else."""
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("vitreg: ")
    assert len(told.err.strip().splitlines()) == 1
    return told.err


@pytest.mark.usefixtures("_quick")
def test_train_tells_what_it_did_and_its_model_can_be_used(classes, tmp_path, capsys):
    out = tmp_path / "run"
    broken = classes / "train" / "class0" / sorted(os.listdir(classes / "train" / "class0"))[0]
    broken.write_bytes(b"no image")
    args = ("deit3", "--data", classes, "--smoke", *SMALL, "--registers", "2", "--steps", "5", "--diagnose-every", "3")
    assert run("train", *args, "--out", out) == 0
    told = capsys.readouterr()
    assert [line.split(":")[0] for line in told.err.splitlines()] == ["step 3", "step 5"]
    assert "top1" in told.err
    lines = told.out.splitlines()
    assert lines[0].startswith("finished after 5 steps, loss ")
    assert lines[1] == f"  vitreg diagnose IMAGES --model {out}"
    assert lines[2] == f"1 images could not be read and were replaced by others; see {out / 'skipped.txt'}"
    assert vitreg.load(out).num_registers == 2
    assert run("diagnose", classes / "val", "--model", out, "--out", tmp_path / "report") == 0
    capsys.readouterr()
    # A run that is finished, and its state as JSON.
    assert run("train", "--resume", out, *SMALL[-4:], "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["finished"], told["log"]["step"], told["diagnosis"]["step"]) == (True, 5, 5)
    # Fewer images, of all classes, which a resumed run goes on with.
    few = tmp_path / "few"
    assert run("train", *args, "--limit", "9", "--out", few) == 0
    stored = json.loads((few / "config.json").read_text())["data"]
    assert (stored["limit"], stored["num_images"], len(stored["classes"])) == (9, 9, 2)
    assert run("train", "--resume", few, *SMALL[-4:]) == 0
    assert run("train", "--resume", few, "--limit", "8") == 2
    assert "leave out --limit," in capsys.readouterr().err
    # Another recipe, other settings, another run in its place.
    assert run("train", "clip", "--resume", out) == 2
    assert "is a run of deit3, not of clip" in sentence(capsys)
    assert run("train", "--resume", out, "--steps", "9", "--registers", "0") == 2
    assert "leave out --registers, --steps," in sentence(capsys)
    assert run("train", *args, "--out", out) == 2
    assert "holds a run of deit3 already; go on with --resume" in sentence(capsys)
    assert run("train", "dinov2", *args[1:], "--out", out) == 2
    assert "holds a run of deit3 already" in sentence(capsys)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["deit3"], "give a recipe and --data"),
        (["--data", "DATA"], "give a recipe and --data"),
        (["deit3", "--data", "nowhere"], "nowhere does not exist"),
        (["deit3", "--data", "DATA", "--val", "nowhere"], "nowhere does not exist"),
        (["deit3", "--data", "FLAT"], "has no labels, from which deit3 learns; give one folder for each class"),
        (["clip", "--data", "DATA"], "has no captions, which clip learns from"),
        (["deit3", "--data", "EMPTY"], "class folder .*class2 holds no image"),
        (["deit3", "--data", "DATA", "--batch-size", "64"], "32 images, fewer than a batch of 64"),
        (["deit3", "--data", "DATA", "--batch-size", "7"], "choose a multiple of 2"),
        (["deit3", "--data", "DATA", "--batch-size", "0"], "batch_size is 0"),
        (["deit3", "--data", "DATA", "--epochs", "0"], "epochs is 0"),
        (["deit3", "--data", "DATA", "--limit", "0"], "--limit 0 must be at least 1"),
        (["deit3", "--data", "DATA", "--steps", "0"], "num_steps is 0"),
        (["deit3", "--data", "DATA", "--size", "40"], "image size 40 is not a multiple"),
        (["deit3", "--data", "DATA", "--registers", "-1"], "num_registers is -1"),
        (["deit3", "--data", "DATA", "--drop-path", "1"], "drop_path is 1"),
        (["deit3", "--data", "DATA", "--device", "tpu9"], "cannot use device 'tpu9'"),
        (["deit3", "--data", "DATA", "--out", "/proc/nothing"], "cannot write"),
        (["clip", "--data", "DATA", "--accumulation", "2"], "leave accumulation at 1"),
        (["dinov2", "--data", "DATA", "--ema-decay", "0.9"], "leave it 0 for dinov2"),
        (["--resume", "nowhere"], "holds no run"),
        (["--resume", "DATA"], "holds no run"),
        (["moco", "--data", "DATA"], "deit3"),
    ],
)
def test_bad_training_input_is_one_sentence_and_status_2(args, message, classes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"DATA": classes, "FLAT": tmp_path / "flat", "EMPTY": tmp_path / "empty"}
    shutil.copytree(classes / "train" / "class0", places["FLAT"])
    shutil.copytree(classes, places["EMPTY"])
    (places["EMPTY"] / "train" / "class2").mkdir()
    options = () if "--resume" in args else ("--smoke", *SMALL)
    assert run("train", *options, *[places.get(a, a) for a in args]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("vitreg: ") or "moco" in args
    assert len(error.strip().splitlines()) == 1 or "moco" in args


def test_sizes_on_the_command_line_are_all_sizes():
    assert set(get_args(Size)) == set(SIZES)


def plain_fields(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The places and values of everything in a config that is no config itself."""
    for field in dataclasses.fields(config):
        value, place = getattr(config, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value):
            yield from plain_fields(value, place)
        else:
            yield place, value


OTHERS = {
    "teacher": "vitreg_tiny_reg4",
    "start": "vitreg_tiny_reg4",
    "teacher_blocks": (1, 3, 5, 7),
    "cache": "tokens",
    "loss": "ce",
    "dtype": "bfloat16",
    "sharding": "fsdp",
    "centering": "mean",
    "text_width": 576,
}
"""Values of what is no number, or not any number."""


def another(name: str, value: Any) -> Any:
    """A value that a field does not have."""
    if name == "name":
        return "lamb" if value == "adamw" else "adamw"
    if isinstance(value, tuple):
        return tuple(0.9 * part for part in value)
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 0.9 * value if value else 0.3


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_of_a_recipe_has_a_flag(recipe):
    def config_of(*words: str) -> TrainingConfig:
        if recipe == "distill" and "--teacher" not in words:
            words = ("--teacher", "vitreg_tiny", *words)
        call = parse("train", cli.command("train", [recipe]), [recipe, *words])
        run, shape, given = (call.keywords[name] for name in ("run", "shape", "given"))
        return configured(recipe, run, shape, given, num_images=1000, num_classes=5)

    # The model is chosen by its size and its registers; clip takes no micro-batches, distill no drop_path.
    left_out = {"recipe", "model", *{"clip": ["accumulation"], "distill": ["drop_path"]}.get(recipe, [])}
    new = {place: another(place[-1], value) for place, value in plain_fields(config_of()) if place[0] not in left_out}
    words = []
    for place, value in new.items():
        flag = f"--{FLAGS.get(place[-1], place[-1]).replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag if value else flag.replace("--", "--no-")]
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    after = dict(plain_fields(config_of(*words)))
    assert len(new) >= 30
    assert {place: after[place] for place in new} == new
    assert config_of("--clip-norm", "None").optimizer.clip_norm is None
