"""Attention and its rows, against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from peers import error, perturb
from vitreg import VisionTransformer, ViTConfig
from vitreg.model import attention
from vitreg.model.attention import Attention, attention_rows
from vitreg.model.differential import DifferentialAttention, differential_rows

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


@torch.no_grad()
def test_differential_attention_is_the_difference_of_two_softmaxes_normed_per_head():
    """Equations 1 to 3 of arXiv 2410.05258, in float64, for the fourth block."""
    layer = DifferentialAttention(ViTConfig(**CONFIG, differential=True), 3)
    layer.reset_lambdas()
    perturb(layer)
    x, seen = torch.randn(2, 9, 24), {}
    output = layer(x, record=seen.__setitem__)
    vectors = [getattr(layer, f"lambda_{name}").double() for name in ("q1", "k1", "q2", "k2")]
    initial = 0.8 - 0.6 * math.exp(-0.3 * 3)
    weight = (vectors[0] @ vectors[1]).exp() - (vectors[2] @ vectors[3]).exp() + initial
    first, second = (
        definition(q, k) for q, k in zip(*(seen[f].chunk(2, -1) for f in ("queries", "keys")), strict=True)
    )
    weights = first - weight * second
    mixed = weights @ seen["values"].double()
    normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.sub_norm.weight.double()
    expected = layer.double().proj(((1 - initial) * normed).transpose(1, 2).flatten(2))
    assert error(output, expected) <= 1e-5
    chosen = torch.tensor([8, 0, 3])
    rows = differential_rows(seen["queries"], seen["keys"], chosen, seen["lambda"])
    assert error(rows, weights[:, :, chosen]) <= 1e-5
    assert error(rows.sum(-1), (1 - weight).expand(2, 3, 3)) <= 1e-5


def test_a_new_model_starts_with_the_papers_lambdas():
    vit = VisionTransformer(ViTConfig(**CONFIG | {"depth": 12}, differential=True))
    lambdas = torch.stack([block.attn.lambda_full().detach() for block in vit.blocks])
    expected = 0.8 - 0.6 * torch.exp(-0.3 * torch.arange(12))
    assert torch.allclose(lambdas, expected, atol=0.2)
    assert lambdas[0] < 0.4 < 0.6 < lambdas[-1]
    assert vit.blocks[0].attn.lambda_q1.std() > 0.01
    assert torch.equal(vit.blocks[0].attn.sub_norm.weight, torch.ones(8))
