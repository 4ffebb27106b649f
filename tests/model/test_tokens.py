"""`Tokens`: the only place where a token axis is sliced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitreg import Tokens

side, few = st.integers(1, 5), st.integers(0, 3)


@given(few, st.lists(side, max_size=2), side, side, st.booleans())
def test_every_token_gets_its_own_name(num_registers, batch, rows, columns, class_token):
    """A sequence that counts its own positions: no token is lost, doubled or under another's name."""
    length = class_token + num_registers + rows * columns
    sequence = torch.arange(length).float()[:, None].expand(*batch, length, 2)
    tokens = Tokens.split(sequence, class_token=class_token, grid=(rows, columns))
    assert torch.equal(tokens.sequence(), sequence)
    assert tokens.registers.shape == (*batch, num_registers, 2)
    if class_token:
        assert tokens.cls.shape == (*batch, 2)
        assert (tokens.cls == 0).all()
    else:
        assert tokens.cls is None
    assert (tokens.registers[..., 0] == torch.arange(num_registers) + class_token).all()
    assert (tokens.patches[..., 0] == torch.arange(rows * columns) + class_token + num_registers).all()
    image = tokens.patch_map()
    assert image.shape == (*batch, 2, rows, columns)
    for row in range(rows):  # row by row, as a patch embedding writes them
        for column in range(columns):
            assert torch.equal(image[..., row, column], tokens.patches[..., row * columns + column, :])


def test_a_grid_that_does_not_fit_is_refused():
    with pytest.raises((ValueError, RuntimeError)):
        Tokens.split(torch.zeros(1, 9, 2), class_token=True, grid=(3, 3))


def test_gradients_reach_all_parts():
    sequence = torch.zeros(2, 8, 3, requires_grad=True)
    tokens = Tokens.split(sequence, class_token=True, grid=(2, 3))
    (tokens.cls.sum() + 2 * tokens.registers.sum() + 3 * tokens.patch_map().sum()).backward()
    assert sequence.grad[0, :, 0].tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
