"""A run that is killed or interrupted goes on as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from training.commands import Run, log

SETTINGS = (
    *("--arch", "micro", "--size", "32", "--patch-size", "16", "--batch-size", "8", "--steps", "60"),
    *("--drop-path", "0.2", "--ema-decay", "0.9", "--log-every", "3", "--checkpoint-every", "8"),
    *("--diagnose-every", "20", "--device", "cpu"),
)


def steps_in_log(run: Path) -> int:
    return len(log(run)) if (run / "log.jsonl").exists() else 0


@pytest.mark.slow
def test_killed_at_three_moments_is_as_never_killed(class_folders, tmp_path):
    whole, killed = tmp_path / "entire", tmp_path / "killed"
    first = ("train", "deit3", "--data", class_folders, *SETTINGS)
    assert Run(*first, "--workers", "0", "--out", whole, told=tmp_path / "whole.txt").wait(120) == 0
    command = (*first, "--workers", "1", "--out", killed)
    for moment in (4, 22, 41):
        run = Run(*command, told=tmp_path / f"{moment}.txt")
        run.wait_for(lambda moment=moment: steps_in_log(killed) >= moment, 120)
        run.send(signal.SIGKILL, group=True)
        assert run.wait() == -signal.SIGKILL
        command = ("train", "--resume", killed, "--workers", "1", "--device", "cpu")
    # A checkpoint that a kill left half written is not one.
    (killed / "checkpoints" / ".step-00000056.partial").mkdir()
    run = Run(*command, told=tmp_path / "last.txt")
    assert run.wait(120) == 0, run.told
    expected = [(entry["step"], entry["loss"], entry["lr"]) for entry in log(whole)]
    assert [(entry["step"], entry["loss"], entry["lr"]) for entry in log(killed)] == expected
    assert (killed / "model.safetensors").stat().st_size == (whole / "model.safetensors").stat().st_size
    assert_equal_weights(killed, whole)


def assert_equal_weights(one: Path, other: Path) -> None:
    import torch

    import vitreg

    weights = vitreg.load(other).state_dict()
    for name, tensor in vitreg.load(one).state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "group"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_interrupted_leaves_a_checkpoint_and_says_how_to_go_on(kind, group, class_folders, tmp_path):
    """Schedulers send the signal to all processes of a group, workers too."""
    out = tmp_path / "run"
    args = ("train", "deit3", "--data", class_folders, *SETTINGS, "--checkpoint-every", "1000", "--out", out)
    run = Run(*args, told=tmp_path / "told.txt")
    run.wait_for(lambda: steps_in_log(out) >= 6, 120)
    run.send(kind, group=group)
    assert run.wait() == 130
    assert f"--resume {out}" in run.told
    (checkpoint,) = (out / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == steps_in_log(out)
    moved = tmp_path / "moved"
    shutil.move(out, moved)
    again = Run("train", "--resume", moved, "--device", "cpu", told=tmp_path / "again.txt")
    assert again.wait(120) == 0, again.told
    assert [entry["step"] for entry in log(moved)] == list(range(1, 61))
