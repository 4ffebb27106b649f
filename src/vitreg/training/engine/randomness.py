"""Randomness that depends on nothing but a key, so that it is the same in any process and after any interruption."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def fixed_randomness(*key: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's CPU generators seeded with a key; as they were before, afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first, second, third = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(first))
    np.random.seed(second)
    torch.default_generator.manual_seed(int(third))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_step(*key: int) -> None:
    """NumPy's generator and PyTorch's, of all devices, for one forward pass; the same in every process."""
    first, second = np.random.SeedSequence(key).generate_state(2)
    np.random.seed(first)
    torch.manual_seed(int(second))
