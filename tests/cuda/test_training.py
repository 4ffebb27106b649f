"""Training on a GPU: the recipes, what their flags do there, and two processes where there are two devices."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

import vitreg
from training.small import small_config
from vitreg.training import train

pytestmark = pytest.mark.cuda


def losses(run) -> list[float]:
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


SETTINGS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "recomputing blocks": {"gradient_checkpointing": True, "drop_path": 0.0},
    "accumulation": {"accumulation": 2},
    "averaged weights": {"ema_decay": 0.9},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_deit3(device, setting, folders, tmp_path):
    config = small_config(steps=6, **SETTINGS[setting])
    on_cpu = dataclasses.replace(config, dtype="float32")
    assert train(config, str(folders), tmp_path / "here", device=str(device), num_workers=0)
    assert train(on_cpu, str(folders), tmp_path / "cpu", device="cpu", num_workers=0)
    ours, theirs = losses(tmp_path / "here"), losses(tmp_path / "cpu")
    assert len(ours) == 6
    # Not the same weights after some steps: LAMB divides tiny gradients by their own size.
    assert ours[0] == pytest.approx(theirs[0], rel=0.02)
    assert all(map(math.isfinite, ours))
    assert ours[-1] == pytest.approx(theirs[-1], rel=0.2)
    model = vitreg.load(tmp_path / "here", device=device)
    assert (model.num_registers, model.patch_embed.weight.device.type) == (4, device.type)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dinov2(device, dtype, folders, tmp_path):
    pytest.importorskip("lightly")
    from vitreg.training import dinov2

    config = dinov2(num_images=36, size="micro", image_size=32, patch_size=16, batch_size=6)
    config = short(config, dtype=dtype)
    assert train(config, str(folders), tmp_path / "run", device=str(device), num_workers=0)
    assert all(map(math.isfinite, losses(tmp_path / "run")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clip(device, dtype, folders, tmp_path):
    pytest.importorskip("open_clip")
    from vitreg.training import clip

    files = sorted((folders / "train").rglob("*.png"))
    rows = [f"{file.relative_to(folders / 'train')},an image of {file.parent.name}" for file in files]
    (tmp_path / "data" / "images").mkdir(parents=True)
    for number, file in enumerate(files):
        (tmp_path / "data" / "images" / f"{number}.png").write_bytes(file.read_bytes())
        rows[number] = f"{number}.png,an image of {file.parent.name}"
    (tmp_path / "data" / "captions.csv").write_text("image,caption\n" + "\n".join(rows) + "\n", encoding="utf-8")
    config = clip(num_images=30, size="micro", image_size=32, patch_size=16, batch_size=6)
    config = short(config, dtype=dtype)
    assert train(config, str(tmp_path / "data"), tmp_path / "run", device=str(device), num_workers=0)
    assert all(map(math.isfinite, losses(tmp_path / "run")))


def short(config, **changes):
    model = dataclasses.replace(config.model, depth=2)
    return dataclasses.replace(
        config, model=model, num_steps=3, checkpoint_every=3, log_every=1, diagnose_every=0, num_diagnosed=4, **changes
    )


COMPILED = textwrap.dedent(
    """
    import dataclasses, sys
    from training.small import small_config
    from vitreg.training import train

    if __name__ == "__main__":
        config = small_config(steps=3, compile=True, dtype="bfloat16", drop_path=0.0)
        assert train(config, sys.argv[1], sys.argv[2], device=sys.argv[3], num_workers=0)
    """
)


def environment(**more: str) -> dict[str, str]:
    tests = os.path.dirname(os.path.dirname(__file__))
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **more}


def test_compiled_blocks(device, folders, tmp_path):
    command = [sys.executable, "-c", COMPILED, str(folders), str(tmp_path / "run"), str(device)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(map(math.isfinite, losses(tmp_path / "run")))


DISTRIBUTED = textwrap.dedent(
    """
    import sys
    from training.small import small_config
    from vitreg.training import train

    config = small_config(steps=4, dtype=sys.argv[4], sharding=sys.argv[5], drop_path=0.0)
    assert train(config, sys.argv[1], sys.argv[2], device=sys.argv[3], num_workers=0)
    """
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes(device, sharding, dtype, folders, tmp_path):
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU; two processes need two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DISTRIBUTED, str(folders), str(tmp_path / "two"), device.type, dtype, sharding]
    runs = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(**shared, RANK=r, LOCAL_RANK=r))
        for r in ("0", "1")
    ]
    told = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    config = small_config(steps=4, dtype=dtype, drop_path=0.0)
    assert train(config, str(folders), tmp_path / "one", device=str(device), num_workers=0)
    rel = 1e-3 if dtype == "float32" else 0.05
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=rel)


def test_memory_does_not_grow(gpu, folders, tmp_path):
    used = []
    config = small_config(steps=12)
    train(
        config, str(folders), tmp_path / "run", device=str(gpu), num_workers=0,
        on_log=lambda *_: used.append(torch.cuda.memory_allocated()),
    )  # fmt: skip
    assert max(used[6:]) <= 1.05 * max(used[2:6]), used
