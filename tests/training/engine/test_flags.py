"""Flags that change nothing but speed or memory do what they are for."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from training.small import small_config
from vitreg.images import open_image_set
from vitreg.training.data import samples
from vitreg.training.engine.distributed import Distributed
from vitreg.training.engine.train_state import TrainState

ALONE = Distributed(0, 1, torch.device("cpu"))


def batch() -> dict[str, torch.Tensor]:
    return {"image": torch.randn(8, 3, 32, 32), "target": torch.rand(8, 4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_products(dtype):
    train_state = TrainState(small_config(dtype=str(dtype).removeprefix("torch.")), ALONE)
    seen = []
    for module in train_state.method.vit.blocks[1].modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    train_state.advance([batch()])
    assert seen == [dtype] * 4
    assert {parameter.dtype for parameter in train_state.method.parameters()} == {torch.float32}


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_checkpointing_runs_blocks_again_instead_of_keeping_what_they_computed(recompute):
    train_state = TrainState(small_config(gradient_checkpointing=recompute, drop_path=0.0), ALONE)
    calls, kept = [], []
    train_state.method.vit.blocks[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train_state.advance([batch()])
    assert len(calls) == 1 + recompute
    hidden = (8, 9, train_state.config.model.mlp_dim)
    assert (hidden in kept) != recompute


def test_images_for_a_gpu_are_put_into_pinned_memory(class_folders, monkeypatch):
    loader, given = samples.DataLoader, {}

    def spy(*args, **options):
        given[len(given)] = options["pin_memory"]
        return loader(*args, **{**options, "pin_memory": False})

    monkeypatch.setattr(samples, "DataLoader", spy)
    config, images = small_config(), open_image_set(class_folders / "train")
    stream = samples.SampleStream(images, config.method.augmentation(config.model, images), 0)
    for device in ("cpu", "cuda"):
        processes = dataclasses.replace(ALONE, device=torch.device(device))
        samples.fetch(stream, processes, batch_size=8, accumulation=1, steps=range(1), num_workers=0).close()
    assert given == {0: False, 1: True}


# In a process of its own, because dynamo cannot trace the shape checks that tests install.
COMPILED = """
import functools, torch
from torch._dynamo.utils import counters
from training.small import small_config
from vitreg.training.engine.train_state import TrainState
from vitreg.training.engine.distributed import Distributed

torch.compile = functools.partial(torch.compile, backend="aot_eager")
losses = []
for compile in (False, True):
    train_state = TrainState(small_config(compile=compile, drop_path=0.4), Distributed(0, 1, torch.device("cpu")))
    torch.manual_seed(0)
    batch = {"image": torch.randn(8, 3, 32, 32), "target": torch.rand(8, 4)}
    losses.append([float(train_state.advance([batch])["loss"]) for _ in range(4)])
    names = list(train_state.method.state_dict())
    print(bool(counters["stats"]["unique_graphs"]), len(counters["graph_break"]), names[-1])
print(max(abs(a - b) for a, b in zip(*losses)) < 1e-4)
"""


def test_compile_compiles_whole_blocks_and_renames_nothing():
    place = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd=place, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["False 0 vit.head.bias", "True 0 vit.head.bias", "True"]
