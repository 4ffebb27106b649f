"""What goes wrong is told in one sentence, and costs nothing that was trained."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch

import vitreg
from training.commands import Run, log
from vitreg import cli

SMALL = (
    *("--arch", "micro", "--size", "32", "--patch-size", "16", "--batch-size", "8", "--diagnose-every", "0"),
    *("--workers", "0", "--device", "cpu"),
)


@pytest.fixture
def told(capsys):
    """Runs `vitreg train`; returns the exit status and the sentence on stderr."""

    def run(*args: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", *map(str, args)])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vitreg:")]
        assert len(lines) <= 1
        return stop.value.code or 0, "".join(lines)

    return run


@pytest.fixture(scope="session")
def four_steps(class_folders, tmp_path_factory) -> Path:
    """A run of four steps. Do not change it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.raises(SystemExit, match="0"):
        cli.main([str(arg) for arg in ("train", "deit3", "--data", class_folders, *SMALL, "--steps", 4, "--out", out)])
    return out


@pytest.fixture
def finished(four_steps, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(four_steps, tmp_path / "finished"))


def edit(run: Path, **changes: object) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | changes))


def test_a_corrupt_image_is_replaced_counted_and_named(folders, tmp_path, told, capsys):
    broken = folders / "train" / "class2" / "3.jpg"
    content = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(content[: len(content) // 3])
    out = tmp_path / "run"
    assert told("deit3", "--data", folders, *SMALL, "--steps", 16, "--out", out)[0] == 0
    entries = log(out)
    assert len(entries) == 16
    assert entries[-1]["skipped"] == 1
    (sentence,) = (out / "skipped.txt").read_text().splitlines()
    assert str(broken) in sentence


def test_an_empty_class_folder_is_named(folders, tmp_path, told):
    for image in (folders / "train" / "class1").iterdir():
        image.unlink()
    status, error = told("deit3", "--data", folders, *SMALL, "--steps", 2, "--out", tmp_path / "run")
    assert status == 2
    assert "class1" in error


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(class_folders, tmp_path, told):
    out = tmp_path / "run"
    args = ("--steps", 40, "--lr", "1e30", "--warmup-steps", 20, "--checkpoint-every", 1, "--out", out)
    status, error = told("deit3", "--data", class_folders, *SMALL, *args)
    assert status == 2
    assert "at step" in error or "after step" in error
    for tensor in vitreg.load(out).state_dict().values():
        assert torch.isfinite(tensor).all()
    kept = list((out / "checkpoints").glob("step-*"))
    assert not kept or str(kept[0]) in error


def test_a_folder_with_a_run_is_not_overwritten(finished, class_folders, told):
    before = (finished / "config.json").read_text()
    status, error = told("dinov2", "--data", class_folders, *SMALL, "--steps", 2, "--out", finished)
    assert status == 2
    assert "deit3" in error
    assert "--resume" in error
    assert (finished / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("clip", "--resume", "RUN"), "a run of deit3, not of clip"),
        (("--resume", "RUN", "--lr", "0.1"), "--lr"),
        (("--resume", "NOWHERE"), "holds no run"),
        (("--data", "DATA"), "give a recipe"),
        (("deit3", "--data", "DATA", "--batch-size", "7"), "multiple of 2"),
        (("deit3", "--data", "DATA", "--batch-size", "600"), "fewer than a batch"),
        (("deit3", "--data", "DATA", "--size", "33"), "multiple of the patch size"),
        (("deit3", "--data", "DATA", "--steps", "0"), "at least 1"),
        (("clip", "--data", "DATA"), "caption"),
        (("dinov2", "--data", "DATA", "--ema-decay", "0.9"), "ema_decay"),
        (("deit3", "--data", "NOWHERE"), "NOWHERE"),
    ],
)
def test_what_cannot_be_done_is_told(args, message, finished, class_folders, tmp_path, told):
    places = {"RUN": finished, "DATA": class_folders, "NOWHERE": tmp_path / "NOWHERE"}
    given = [places.get(arg, arg) for arg in args]
    settings = () if "--resume" in args else (*SMALL, "--out", tmp_path / "run")
    if "--batch-size" in args or "--size" in args:
        settings = ("--arch", "micro", "--patch-size", "16", "--out", tmp_path / "run", "--device", "cpu")
    status, error = told(*given, *settings)
    assert status == 2
    assert message in error


def test_a_checkpoint_of_another_size_is_refused(finished, told):
    config = json.loads((finished / "config.json").read_text())
    for change in ({"embed_dim": 64}, {"depth": 7}, {"depth": 5}, {"num_registers": 0}):
        edit(finished, model={**config["model"], **change}, num_steps=8)
        status, error = told("--resume", finished, "--device", "cpu")
        assert status == 2
        assert "does not fit" in error


def test_a_damaged_checkpoint_is_refused(finished, told):
    edit(finished, num_steps=8)
    (data,) = (finished / "checkpoints").glob("step-*/*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    status, error = told("--resume", finished, "--device", "cpu")
    assert status == 2
    assert str(finished) in error


def test_other_images_are_refused_and_moved_ones_taken(finished, folders, tmp_path, told):
    edit(finished, num_steps=6)
    moved = shutil.copytree(folders, tmp_path / "moved")
    (folders / "train" / "class0" / "0.jpg").unlink()
    status, error = told("--resume", finished, "--data", folders, "--device", "cpu")
    assert status == 2
    assert "59 images" in error
    assert told("--resume", finished, "--data", moved, "--device", "cpu")[0] == 0
    assert [entry["step"] for entry in log(finished)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_it(finished, class_folders, tmp_path):
    """Files may not grow beyond a limit, which the next checkpoint exceeds."""
    edit(finished, num_steps=8)
    before = sorted(path.name for path in (finished / "checkpoints").iterdir())
    limits = {resource.RLIMIT_FSIZE: 1_000_000}
    run = Run("train", "--resume", finished, "--device", "cpu", told=tmp_path / "full.txt", limits=limits)
    assert run.wait(120) == 2, run.told
    assert "cannot write" in run.told
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == before
    assert vitreg.load(finished).num_registers == 4
    again = Run("train", "--resume", finished, "--device", "cpu", told=tmp_path / "again.txt")
    assert again.wait(120) == 0, again.told
    assert [entry["step"] for entry in log(finished)] == list(range(1, 9))
