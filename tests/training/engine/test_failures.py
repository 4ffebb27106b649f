"""What is said when memory, a worker or another process is gone."""

from __future__ import annotations

import resource

import pytest
import torch

from training.commands import Run
from vitreg.training.engine.failures import failures_in_words


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 25165824 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_a_sentence(error):
    told = r"out of memory with 8 images at a time .*; choose a smaller --batch-size"
    with pytest.raises(ValueError, match=told), failures_in_words(8):
        raise error


def test_other_errors_are_passed_on():
    with pytest.raises(RuntimeError, match="shapes differ"), failures_in_words(8):
        raise RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="gloo"), failures_in_words(8):  # without other processes
        raise RuntimeError("gloo")


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_a_sentence(class_folders, tmp_path):
    args = ("train", "deit3", "--data", class_folders, "--arch", "micro", "--size", "224", "--patch-size", "16")
    args = (*args, "--workers", "0", "--steps", "2", "--diagnose-every", "0", "--device", "cpu")
    limits = {resource.RLIMIT_AS: 600 * 2**20}
    run = Run(*args, "--batch-size", "56", "--out", tmp_path / "run", told=tmp_path / "told.txt", limits=limits)
    assert run.wait() == 2
    assert "vitreg: out of memory with 56 images at a time" in run.told
    assert "Traceback" not in run.told
