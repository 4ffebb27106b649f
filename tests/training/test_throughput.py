"""How much work a step is."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from training.small import small_config
from vitreg.training.throughput import flops_per_picture, matrix_rate


def test_the_work_of_a_picture_is_that_of_its_matrix_products():
    """Forward: twice the multiplications; backward: two products for each, but none for the pixels."""
    config = small_config()
    width, hidden, patches, classes = 32, 64, 4, 4
    tokens = patches + 1 + 4
    block = 2 * tokens * width * (3 * width + width + 2 * hidden) + 2 * 2 * tokens**2 * width
    embedding = 2 * patches * 3 * 16**2 * width
    expected = 3 * (2 * block + 2 * width * classes) + 2 * embedding
    batch = {"image": torch.randn(2, 3, 32, 32), "target": torch.rand(2, classes)}
    assert flops_per_picture(config, batch) == pytest.approx(expected, rel=0.03)


def test_registers_cost_what_their_tokens_do():
    batch = {"image": torch.randn(2, 3, 32, 32), "target": torch.rand(2, 4)}
    none, four, eight = (
        flops_per_picture(dataclasses.replace(c, model=dataclasses.replace(c.model, num_registers=number)), batch)
        for c in [small_config()]
        for number in (0, 4, 8)
    )
    assert none < four < eight
    # Linear but for the attention, whose work grows with the square of the tokens.
    attention = 3 * 2 * 2 * 2 * 32
    assert (eight - four) - (four - none) == pytest.approx(attention * (13**2 - 2 * 9**2 + 5**2), rel=1e-6)


def test_the_matrix_rate_is_a_rate():
    rate = matrix_rate(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e14
