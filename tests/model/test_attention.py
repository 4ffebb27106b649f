"""Attention and its rows, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from peers import error, perturb
from vitreg import ViTConfig
from vitreg.model import attention
from vitreg.model.attention import Attention, attention_rows

CONFIG = dict(embed_dim=24, depth=1, num_heads=3, mlp_dim=8, patch_size=8, image_size=(32, 32))


def definition(queries, keys):
    scores = queries.double() @ keys.double().transpose(-1, -2) / queries.shape[-1] ** 0.5
    return scores.softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [2**24, 1, 100])
def test_rows_are_those_of_the_whole_matrix(monkeypatch, dtype, budget):
    monkeypatch.setattr(attention, "ROW_BUDGET", budget)
    queries, keys = (3 * torch.randn(2, 3, 17, 8).to(dtype) for _ in range(2))
    chosen = torch.tensor([16, 0, 5, 5])
    rows = attention_rows(queries, keys, chosen)
    assert rows.dtype == torch.float32
    assert error(rows, definition(queries, keys)[:, :, chosen]) <= 1e-6


def test_large_logits_do_not_overflow():
    rows = attention_rows(torch.full((1, 1, 4, 8), 1e3), torch.full((1, 1, 4, 8), 1e3), torch.tensor([0]))
    assert torch.equal(rows, torch.full((1, 1, 1, 4), 0.25))


@torch.no_grad()
def test_the_module_is_softmax_of_products_times_values():
    layer = perturb(Attention(ViTConfig(**CONFIG)))
    x, seen = torch.randn(2, 9, 24), {}
    output = layer(x, record=seen.__setitem__)
    mixed = definition(seen["queries"], seen["keys"]) @ seen["values"].double()
    expected = layer.double().proj(mixed.transpose(1, 2).flatten(2))
    assert error(output, expected) <= 1e-5


@torch.no_grad()
def test_dinov3_masks_the_bias_of_the_keys_alone():
    layer = perturb(Attention(ViTConfig(**CONFIG, key_bias=False)))
    x, before, after = torch.randn(1, 5, 24), {}, {}
    expected = layer(x, record=before.__setitem__)
    layer.qkv.bias[24:48] += 10
    assert torch.equal(layer(x, record=after.__setitem__), expected)
    assert torch.equal(before["keys"], after["keys"])
    layer.qkv.bias[:24] += 10
    assert not torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [5, 16, 201])
def test_padding_to_tiles_changes_nothing(dtype, tokens, monkeypatch):
    """The path for CPUs with AMX, on any CPU: padded keys receive no attention."""
    q, k, v = (torch.randn(2, 3, tokens, 32).to(dtype) for _ in range(3))
    plain = attention._attend(q, k, v)
    monkeypatch.setattr(attention, "TILED_CPU", True)
    padded = attention._attend(q, k, v)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    scale = exact.norm()
    assert (padded.double() - exact).norm() / scale <= max(2 * (plain.double() - exact).norm() / scale, 1e-3)
