"""How much work a step is, and how fast the machine could do it."""

from __future__ import annotations

import copy
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitreg.training.method import Batch, Method


def flops_per_picture(method: Method, batch: Batch) -> float:
    """Floating-point operations of forward and backward for one picture, counted on two of a batch (on the CPU)."""
    pair = {name: rows[:2].cpu() for name, rows in batch.items()}
    trial = copy.deepcopy(method).cpu()
    # The counter does not know the CPU's fused attention; the plain one has the same operations.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        trial(pair, 0.0)["loss"].backward()
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
