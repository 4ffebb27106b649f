"""Several processes do what one does (gloo, DDP and FSDP2, two processes started by torchrun)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitreg
from training.commands import log

SETTINGS = (
    *("--size", "micro", "--image-size", "32", "--patch-size", "16", "--batch-size", "8", "--drop-path", "0.2"),
    *("--lr", "0.003", "--warmup-steps", "3", "--checkpoint-every", "10", "--diagnose-every", "0"),
)


def launch(processes: int, *args: object) -> None:
    """`vitreg train` on the CPU, by torchrun."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
    command = [sys.executable, *torchrun, "--rdzv-endpoint=localhost:0", "-m", "vitreg", "train"]
    command += [*map(str, args), "--workers", "0", "--device", "cpu"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def prolong(run: Path, steps: int) -> None:
    """Give a finished run more steps."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"num_steps": steps}))


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_goes_on_with_what_two_began(class_folders, tmp_path):
    for name, processes, sharding in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
        args = ("deit3", "--data", class_folders, *SETTINGS, "--steps", "20", "--sharding", sharding)
        launch(processes, *args, "--out", tmp_path / name)
    expected = [entry["loss"] for entry in log(tmp_path / "one")]
    assert len(expected) == 20
    weights = vitreg.load(tmp_path / "one").state_dict()
    for name in ("ddp", "fsdp"):
        assert [entry["loss"] for entry in log(tmp_path / name)] == pytest.approx(expected, rel=1e-4)
        for key, tensor in vitreg.load(tmp_path / name).state_dict().items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    for name in ("one", "fsdp"):
        prolong(tmp_path / name, 26)
        launch(1, "--resume", tmp_path / name)
    expected = [entry["loss"] for entry in log(tmp_path / "one")]
    assert len(expected) == 26
    assert [entry["loss"] for entry in log(tmp_path / "fsdp")] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dinov2", "clip"])
def test_the_other_recipes_train_sharded_as_whole(recipe, test_data, class_folders, tmp_path):
    data = {"dinov2": class_folders, "clip": test_data / "flickr8k-1k"}[recipe]
    sizes = ("--image-size", "32", "--patch-size", "16", "--batch-size", "8", "--diagnose-every", "0")
    for name, processes in (("one", 1), ("fsdp", 2)):
        args = (recipe, "--data", data, "--smoke", *sizes, "--steps", "5", "--sharding", "fsdp")
        launch(processes, *args, "--out", tmp_path / name)
    one, two = ([entry["loss"] for entry in log(tmp_path / name)] for name in ("one", "fsdp"))
    assert two == pytest.approx(one, rel=1e-4)
