"""Randomness by key."""

from __future__ import annotations

import contextlib
import inspect
import random

import numpy as np
import torch

from vitreg.training.engine import randomness

# Without type checks: beartype draws from Python's generator.
fixed_randomness = contextlib.contextmanager(inspect.unwrap(randomness.fixed_randomness))


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_a_key_decides_and_nothing_is_left_behind():
    before = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with fixed_randomness(3, 4):
        first = draw()
        with fixed_randomness(5):
            draw()
        second = draw()
    with contextlib.suppress(KeyError), fixed_randomness(3, 4):
        assert draw() == first
        assert draw() == second
        raise KeyError
    assert draw() == expected
    assert before != first


def test_keys_differ():
    found = set()
    for key in ((0, 1), (1, 1), (1, 2), (0, 0, 1), (0, 1, 1), (2**40, 1)):
        with fixed_randomness(*key):
            found |= set(draw())
    assert len(found) == 18


def test_steps_differ_and_micro_batches_too():
    found = set()
    for key in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)):
        randomness.seed_step(*key)
        found.add(float(torch.rand(1)))
        randomness.seed_step(*key)
        assert float(torch.rand(1)) in found
    assert len(found) == 4
