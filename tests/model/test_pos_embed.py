"""Resizing of learned positions, against timm's function and the official repositories' call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed

from peers import error
from vitreg.model import PositionInterpolation
from vitreg.model.pos_embed import resize_positions

grids = st.tuples(st.integers(1, 40), st.integers(1, 40))


def table(grid: tuple[int, int]) -> torch.Tensor:
    return torch.randn(1, grid[0] * grid[1], 3)


@given(grids, grids)
def test_the_default_rule_is_timms(old, new):
    positions = table(old)
    expected = resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=0)
    assert error(resize_positions(positions, old, new, PositionInterpolation()), expected) <= 1e-6


@given(grids, grids)
def test_the_offset_rule_is_that_of_dino_and_dinov2(old, new):
    """`F.interpolate(scale_factor=(new + 0.1) / old)`, whose result must have the grid that was meant."""
    positions = table(old)
    rule = PositionInterpolation("bicubic", antialias=False, offset=0.1)
    resized = resize_positions(positions, old, new, rule)
    if old == new:
        assert resized is positions
        return
    image = positions.reshape(1, *old, 3).permute(0, 3, 1, 2)
    scale = (float(new[0] + 0.1) / old[0], float(new[1] + 0.1) / old[1])
    expected = F.interpolate(image, scale_factor=scale, mode="bicubic")
    assert expected.shape[-2:] == new
    assert error(resized, expected.permute(0, 2, 3, 1).reshape(1, -1, 3)) <= 1e-6


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
def test_every_part_of_a_rule_matters_and_is_used(mode, antialias):
    positions, old, new = table((9, 7)), (9, 7), (5, 4)
    image = positions.reshape(1, *old, 3).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=new, mode=mode, antialias=antialias, align_corners=False)
    resized = resize_positions(positions, old, new, PositionInterpolation(mode, antialias))
    assert error(resized, expected.permute(0, 2, 3, 1).reshape(1, -1, 3)) <= 1e-6
    other = PositionInterpolation(mode, not antialias)
    assert error(resized, resize_positions(positions, old, new, other)) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tables_are_resized_in_float32(dtype):
    positions = table((8, 8)).to(dtype)
    resized = resize_positions(positions, (8, 8), (5, 6), PositionInterpolation())
    exact = resize_positions(positions.float(), (8, 8), (5, 6), PositionInterpolation())
    assert torch.equal(resized, exact.to(dtype))
