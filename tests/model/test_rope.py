"""The rotation table, against timm's two kinds of rotary embedding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, apply_rot_embed_cat

from peers import error, random_images, timm_model
from vitreg import from_timm
from vitreg.model import RopeConfig
from vitreg.model.rope import _table, rotate, rotation

side, CPU = st.integers(1, 30), torch.device("cpu")
DIM = 16


def ours(rope: RopeConfig, grid, x):
    return rotate(x, rotation(rope, grid, 0, CPU), interleaved=rope.interleaved)


@given(side, side)
def test_centered_coordinates_are_dinov3s(rows, columns):
    frequencies = tuple(2 * math.pi / 100 ** (2 * j / (DIM // 2)) for j in range(DIM // 4))
    x = torch.randn(1, 2, rows * columns, DIM)
    table = RotaryEmbeddingDinoV3(DIM, temperature=100.0).get_embed([rows, columns])
    expected = apply_rot_embed_cat(x, table, half=True)
    assert error(ours(RopeConfig(frequencies), (rows, columns), x), expected) <= 1e-5


@given(side, side, st.sampled_from([None, (16, 16), (7, 24)]), st.sampled_from(["ij", "xy"]))
def test_patch_numbers_are_evas(rows, columns, reference, indexing):
    frequencies = tuple((1 / 10000 ** (torch.arange(DIM // 4) / (DIM // 4))).tolist())
    rope = RopeConfig(frequencies, "index", 0.0, reference, interleaved=True, swap_axes=indexing == "xy")
    theirs = RotaryEmbeddingCat(DIM, in_pixels=False, feat_shape=None, ref_feat_shape=reference, grid_indexing=indexing)
    x = torch.randn(1, 2, rows * columns, DIM)
    expected = apply_rot_embed_cat(x, theirs.get_embed([rows, columns]))
    assert error(ours(rope, (rows, columns), x), expected) <= 1e-4


@pytest.mark.parametrize("interleaved", [True, False])
def test_products_depend_on_the_distance_of_patches_alone(interleaved):
    rope = RopeConfig((1.0, 0.3, 0.1, 0.01), "index", interleaved=interleaved)
    q, k = torch.randn(DIM), torch.randn(DIM)
    turned = [ours(rope, (5, 6), v.expand(1, 1, 30, DIM))[0, 0].unflatten(0, (5, 6)) for v in (q, k)]
    near, far = (turned[0][r, c] @ turned[1][r + 2, c + 1] for r, c in ((0, 0), (2, 4)))
    assert near == pytest.approx(float(far), abs=1e-4)
    assert abs(near - turned[0][0, 0] @ turned[1][1, 2]) > 1e-3  # and rows differ from columns


def test_prefix_tokens_are_never_rotated():
    x = torch.randn(1, 1, 3 + 12, DIM)
    rope = RopeConfig((1.0, 0.3, 0.1, 0.01))
    turned = rotate(x, rotation(rope, (3, 4), 3, CPU), interleaved=False)
    assert torch.equal(turned[:, :, :3], x[:, :, :3])
    assert error(turned[:, :, 3:], x[:, :, 3:]) > 0.1
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)


def test_half_precision_is_rotated_in_float32():
    x = torch.randn(1, 1, 12, DIM).bfloat16()
    rope = RopeConfig((1.0, 0.3, 0.1, 0.01))
    assert torch.equal(ours(rope, (3, 4), x), ours(rope, (3, 4), x.float()).bfloat16())


def test_a_look_in_inference_mode_does_not_spoil_training():
    """The cached table would be an inference tensor, which autograd refuses to save."""
    vit = from_timm(timm_model("vit_small_patch16_dinov3_qkvb"))
    images = random_images(16 * 11, 16 * 13)  # a grid that no other test has
    with torch.inference_mode():
        vit(images)
    vit.train()(images).patches.sum().backward()
    assert vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_the_default_dtype_does_not_reach_the_table():
    rope = RopeConfig((1.0, 0.3, 0.1, 0.07))
    expected = rotation(rope, (3, 4), 1, CPU)
    try:
        torch.set_default_dtype(torch.float16)
        found = _table(rope, (3, 4), 1, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    for table, other in zip(found, expected, strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table, other)
