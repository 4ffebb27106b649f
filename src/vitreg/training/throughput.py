"""How much work a step is, and how fast the machine could do it."""

from __future__ import annotations

import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitreg.training.config import TrainingConfig
from vitreg.training.method import Batch
from vitreg.training.randomness import fixed_randomness


def flops_per_picture(config: TrainingConfig, batch: Batch) -> float:
    """Floating-point operations of forward and backward for one picture.

    Counted on a method of its own, on the CPU.

    Args:
        config: of the run.
        batch: two pictures.
    """
    with fixed_randomness(config.seed):
        method = config.method.build(config.model)
        # The counter does not know the CPU's fused attention; the plain one has the same operations.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            method(batch, 0.0)["loss"].backward()
    return counter.get_total_flops() / 2


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Floating-point operations a second of a large matrix product: what a step is measured against."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        _wait(device)
        before = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - before)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
