"""Several processes do what one does (gloo, DDP and FSDP2), and end where one of them does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

import vitreg
from training import opening_ranks
from training.commands import Run, log

SIZES = ("--size", "32", "--patch-size", "16", "--batch-size", "8", "--diagnose-every", "0", "--device", "cpu")
SETTINGS = (
    *SIZES,
    "--arch",
    "micro",
    "--drop-path",
    "0.2",
    "--lr",
    "0.003",
    "--warmup-steps",
    "3",
    "--workers",
    "0",
    "--steps",
    "20",
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ranks(number: int, *args: object, told: Path) -> list[Run]:
    """`vitreg train` in so many processes, as torchrun would start them but without its seconds of imports."""
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Run(
            *("train", *args),
            told=told.with_name(f"{told.name}-{rank}.txt"),
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {},
        )
        for rank in range(number)
    ]


def finish(runs: list[Run]) -> None:
    for run in runs:
        assert run.wait(240) == 0, run.told  # two cores may be busy with other tests


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in log(run)]


def assert_equal_runs(ours: Path, theirs: Path, steps: int) -> None:
    assert len(losses(theirs)) == steps
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    weights = vitreg.load(theirs).state_dict()
    for key, tensor in vitreg.load(ours).state_dict().items():
        torch.testing.assert_close(tensor, weights[key], rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def prolong(run: Path, steps: int) -> None:
    """Give a finished run more steps."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"num_steps": steps}))


@pytest.fixture(scope="module")
def alone(class_folders, tmp_path_factory) -> Path:
    """20 steps by one process."""
    folder = tmp_path_factory.mktemp("alone")
    finish(ranks(1, "deit3", "--data", class_folders, *SETTINGS, "--out", folder / "run", told=folder / "told"))
    return folder / "run"


@pytest.mark.slow
def test_torchrun_trains_as_one_process_does(alone, class_folders, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [sys.executable, *torchrun, "--rdzv-endpoint=localhost:0", "-m", "vitreg", "train", "deit3", "--data"]
    command += [str(class_folders), *SETTINGS, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path / "run", alone, 20)


@pytest.mark.slow
def test_sharded_processes_train_as_one_and_one_goes_on_with_what_they_began(alone, class_folders, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    finish(
        ranks(2, "deit3", "--data", class_folders, *SETTINGS, "--sharding", "fsdp", "--out", run, told=tmp_path / "t")
    )
    assert_equal_runs(run, alone, 20)
    shutil.copytree(alone, whole)
    for folder in (run, whole):
        prolong(folder, 26)
        finish(ranks(1, "--resume", folder, "--workers", "0", "--device", "cpu", told=tmp_path / "again"))
    assert_equal_runs(run, whole, 26)


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch(class_folders, tmp_path):
    """Without stochastic depth, whose draws are those of a micro-batch."""
    args = ("deit3", "--data", class_folders, *SETTINGS, "--steps", "6", "--drop-path", "0", "--ema-decay", "0.9")
    parts = {
        "whole": (1, ()),
        "ddp": (2, ("--accumulation", "2")),
        "fsdp": (2, ("--accumulation", "2", "--sharding", "fsdp")),
    }
    for name, (number, options) in parts.items():
        finish(ranks(number, *args, *options, "--out", tmp_path / name, told=tmp_path / f"{name}-told"))
    for name in ("ddp", "fsdp"):
        assert_equal_runs(tmp_path / name, tmp_path / "whole", 6)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "sharding"), [("dinov2", "fsdp"), ("clip", "ddp")])
def test_the_other_recipes_train_as_one_process_does(recipe, sharding, test_data, class_folders, tmp_path):
    data = {"dinov2": class_folders, "clip": test_data / "flickr8k-1k"}[recipe]
    args = (recipe, "--data", data, "--smoke", *SIZES, "--workers", "0", "--steps", "4")
    finish(ranks(1, *args, "--out", tmp_path / "one", told=tmp_path / "one-told"))
    finish(ranks(2, *args, "--sharding", sharding, "--out", tmp_path / "two", told=tmp_path / "two-told"))
    assert len(losses(tmp_path / "one")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_all_stop_where_one_dies_and_one_process_can_go_on(class_folders, tmp_path):
    out = tmp_path / "run"
    args = (*SETTINGS, "--workers", "1", "--steps", "2000", "--checkpoint-every", "5")
    processes = ranks(2, "deit3", "--data", class_folders, *args, "--out", out, told=tmp_path / "told")
    processes[0].wait_for(lambda: (out / "log.jsonl").exists() and len(losses(out)) > 7, 120)
    processes[0].send(signal.SIGKILL)
    assert processes[1].wait(60) == 2
    assert "process 1 stops, because another one is gone; go on with --resume" in processes[1].told
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_steps": len(losses(out)) + 6}))
    finish(ranks(1, "--resume", out, "--workers", "0", "--device", "cpu", told=tmp_path / "again"))
    assert [entry["step"] for entry in log(out)] == list(range(1, len(losses(out)) + 1))


@pytest.mark.slow
def test_tars_are_scanned_by_the_first_process_alone(class_folders, tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for number, path in enumerate(sorted((class_folders / "train").rglob("*.jpg"))):
            (tmp_path / "label").write_text(str(number % 4))
            tar.add(path, f"{number:03}.jpg")
            tar.add(tmp_path / "label", f"{number:03}.cls")
    place = (2, free_port(), tmp_path / "set.tar", tmp_path)
    torch.multiprocessing.spawn(opening_ranks.run, place, nprocs=2)
    first, second = ((tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(2))
    assert (first[0], second[0]) == ("1", "0")
    assert first[1:] == second[1:]
    assert len(first) == 58  # a twentieth is held out


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--batch-size", "6"), "choose a multiple of 4"), (("--data", "nowhere"), "does not exist")],
)
def test_what_is_wrong_is_told_by_all_processes(options, message, class_folders, tmp_path):
    args = ("deit3", "--data", class_folders, *SETTINGS, *options, "--out", tmp_path / "run")
    for run in ranks(2, *args, told=tmp_path / "told"):
        assert run.wait(60) == 2
        assert message in run.told
