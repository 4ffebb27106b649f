"""Which device computes, and what it can."""

from __future__ import annotations

import os

import torch


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device of this name; `auto` takes an NVIDIA or AMD GPU, else Apple's, else the CPU.

    Raises:
        ValueError: this machine has none of this name.
    """
    if device == "auto":
        return torch.device(available_devices()[0])
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        names = ", ".join(available_devices())
        raise ValueError(f"cannot use device {str(device)!r}; give auto, or what this machine has: {names}") from error
    return found


def available_devices() -> list[str]:
    """The kinds of devices that this machine has, the fastest first."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return ["cuda"] * cuda + ["mps"] * mps + ["cpu"]


def precise(device: torch.device | str) -> torch.dtype:
    """float64, where the device has it: Apple's has not."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def summing_device(device: torch.device | str) -> torch.device:
    """Where sums in float64 are kept: on the device that is given where it has float64, else on the CPU."""
    return torch.device(device) if precise(device) == torch.float64 else torch.device("cpu")


def available_cores() -> int:
    """Cores that this process may use: a container or a batch system may grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
