"""What is said when memory runs out."""

from __future__ import annotations

import dataclasses
import gc
import re
import resource

import pytest
import torch
from torch import nn

from training.commands import Run
from training.small import small_config
from vitreg.training.memory import out_of_memory, out_of_memory_elsewhere
from vitreg.training.method import Batch, Method
from vitreg.training.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """Collecting garbage among all that pytest holds takes long, and these trials leave none."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


class Greedy(Method):
    """A method for which so many pictures are too many, with the optimizer's moments or without."""

    def __init__(self, limit: int, words: str = "CUDA out of memory. Tried to allocate 2 GiB") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.limit, self.words, self.tried = limit, words, []

    def forward(self, batch: Batch, progress: float) -> dict[str, torch.Tensor]:
        size = len(batch["image"])
        self.tried.append(size)
        if size > self.limit:
            raise RuntimeError(self.words)
        return {"loss": self.weight.sum() * batch["image"].sum()}


def told(method: Greedy, size: int, processes=ALONE, accumulation=1) -> str:
    config = dataclasses.replace(small_config(), batch_size=size * accumulation, accumulation=accumulation)
    batch, optimizer = {"image": torch.ones(size, 1)}, torch.optim.AdamW(method.parameters())
    with (
        pytest.raises(ValueError, match="out of memory") as error,
        out_of_memory(method, optimizer, batch, config, processes),
    ):
        method(batch, 0.0)
    return str(error.value)


@pytest.mark.parametrize("limit", [2, 3, 8, 21, 46, 62, 63])
def test_the_largest_batch_that_fits_is_found(limit):
    method = Greedy(limit)
    largest = limit // 2 * 2
    assert told(method, 64).endswith(
        f"the largest that would fit is {largest}: choose --batch-size {largest}, or a larger --accumulation"
    )
    assert len(method.tried) <= 8
    assert method.weight.grad is None or method.weight.grad.numel() == 1


def test_every_batch_size_comes_to_an_end():
    for size in range(2, 40, 2):
        for limit in range(size):
            fits = re.search(r"would fit is (\d+)", told(Greedy(limit), size))
            assert int(fits[1] if fits else 0) == limit // 2 * 2


def test_micro_batches_count_towards_the_batch():
    assert "choose --batch-size 24," in told(Greedy(6), 8, accumulation=4)


def test_nothing_fits():
    assert "not even 2 would fit; choose a smaller model or --gradient-checkpointing" in told(Greedy(1), 8)


def test_several_processes_try_nothing():
    method = Greedy(4)
    message = told(method, 8, Processes(1, 2, torch.device("cpu")))
    assert "choose a smaller --batch-size, a larger --accumulation, or --sharding fsdp" in message
    assert method.tried == [8]


def test_other_errors_are_passed_on():
    with pytest.raises(RuntimeError, match="shapes differ"):
        told(Greedy(4, "shapes differ"), 8)
    with pytest.raises(RuntimeError, match="shapes differ"), out_of_memory_elsewhere():
        raise RuntimeError("shapes differ")


def test_memory_that_ends_elsewhere_is_a_sentence():
    words = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 25165824 bytes"
    with (
        pytest.raises(ValueError, match=r"out of memory \(.*25165824 bytes\); choose a smaller"),
        out_of_memory_elsewhere(),
    ):
        raise RuntimeError(words)


class Hoarder(Greedy):
    """Keeps what it computed in its frame when it fails, as every forward pass does."""

    alive = 0

    def forward(self, batch: Batch, progress: float) -> dict[str, torch.Tensor]:
        held = Held(self)
        if self.alive > 1:
            raise RuntimeError("out of memory: the failed step still holds its activations")
        values = super().forward(batch, progress)
        del held
        return values


class Held:
    def __init__(self, owner: Hoarder) -> None:
        self.owner = owner
        owner.alive += 1

    def __del__(self) -> None:
        self.owner.alive -= 1


def test_what_the_failed_step_computed_is_let_go_before_others_are_tried():
    """The caller holds the error, the error its frames, and these the activations that filled the memory."""
    assert "the largest that would fit is 4:" in told(Hoarder(4), 8)


@pytest.mark.slow
def test_the_batch_that_is_said_to_fit_does(class_folders, tmp_path):
    args = ("train", "deit3", "--data", class_folders, "--size", "micro", "--image-size", "224", "--patch-size", "16")
    args = (*args, "--workers", "0", "--steps", "2", "--diagnose-every", "0", "--device", "cpu")
    args = (*args, "--out", tmp_path / "run")
    limits = {resource.RLIMIT_AS: 600 * 2**20}
    failed = Run(*args, "--batch-size", "56", told=tmp_path / "failed.txt", limits=limits)
    assert failed.wait() == 2
    fits = re.search(r"choose --batch-size (\d+),", failed.told)
    assert fits, failed.told
    # The diagnosis at the end reads with two threads, whose stacks and arenas no trial of a step takes.
    limits[resource.RLIMIT_AS] += 2 * (8 + 64) * 2**20
    again = Run(*args, "--batch-size", fits[1], told=tmp_path / "again.txt", limits=limits)
    assert again.wait() == 0, again.told
    assert 2 <= int(fits[1]) < 56
