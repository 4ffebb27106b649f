"""Faithfulness and sinks, against attention that is computed in full, on models whose heads are known."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

import vitreg
from peers import perturb
from vitreg.artifacts.measures.sinks import gram, stable_rank

SMALL = dict(img_size=112, depth=3, embed_dim=96, num_heads=3, num_classes=0)


def small(family: str = "vit_small_patch14_reg4_dinov2") -> vitreg.VisionTransformer:
    return vitreg.from_timm(perturb(timm.create_model(family, **SMALL)))


def test_faithfulness_is_that_of_a_softmax_over_the_patches():
    vit, images = small(), torch.randn(5, 3, 112, 112)
    found = vitreg.diagnose(vit, images, batch_size=3).faithfulness
    with torch.inference_mode():
        trace = vit.trace(images, facets=("queries", "keys", "values"))
    for block, of_block in zip(found.blocks, vit.blocks, strict=True):
        q, k, v = (
            torch.cat(
                [facet.cls[block.block].unsqueeze(1), facet.registers[block.block], facet.patches[block.block]], 1
            )
            .unflatten(-1, (3, -1))
            .transpose(1, 2)
            for facet in (trace.queries, trace.keys, trace.values)
        )
        scores = q[:, :, :1] @ k.mT * 32**-0.5
        weights = scores.softmax(-1)
        assert block.to_cls == pytest.approx(weights[..., 0].mean().item(), rel=1e-4)
        assert block.to_registers == pytest.approx(weights[..., 1:5].sum(-1).mean().item(), rel=1e-4)
        assert block.to_patches == pytest.approx(weights[..., 5:].sum(-1).mean().item(), rel=1e-4)
        masked = scores.clone()
        masked[..., :5] = -torch.inf
        with torch.inference_mode():
            true, alone = (of_block.attn.proj((w @ v)[:, :, 0].flatten(1)) for w in (weights, masked.softmax(-1)))
        assert block.cosine == pytest.approx(F.cosine_similarity(true, alone).mean().item(), abs=1e-4)


@pytest.mark.parametrize(("scale", "kind"), [(0.01, "no-op"), (2.0, "broadcast")], ids=["no-op", "broadcast"])
def test_a_planted_sink_is_of_its_kind(scale, kind):
    """All queries of head 1 of block 1 meet the class token's key; its value is almost nothing, or told to all."""
    vit = small("vit_small_patch16_224")
    qkv, head = vit.blocks[1].attn.qkv, slice(32, 64)

    def plant(module, args, output):
        q, k, v = output.chunk(3, dim=-1)
        q[..., head], k[..., head] = 0.0, 0.0
        q[..., 32], k[:, 0, 32] = 30.0, 32**0.5
        v[:, 0, head] = v[:, 1:, head].norm(dim=-1).mean() * scale * F.normalize(torch.ones(32), dim=0)

    handle = qkv.register_forward_hook(plant)
    sinks = vitreg.diagnose(vit, torch.randn(4, 3, 112, 112)).sinks
    handle.remove()
    found = next(h for h in sinks.heads if (h.block, h.head) == (1, 1))
    assert (found.tokens, found.kind) == ("class token", kind)
    assert found.attention > 0.9
    assert found.value_norm == pytest.approx(scale, rel=0.1)
    assert sinks.blocks[1][kind] >= 1
    assert "sink" in sinks.sentences[0]


def test_stable_rank_is_that_of_the_singular_values():
    heads = torch.randn(2, 3, 50, 16) * torch.logspace(0, -1, 16)
    squares = torch.linalg.svdvals(heads).square()
    torch.testing.assert_close(stable_rank(gram(heads)), squares.sum(-1) / squares[..., 0], rtol=0.02, atol=0)
    assert stable_rank(gram(torch.ones(1, 1, 9, 16))).item() == pytest.approx(1, abs=1e-4)


def test_the_real_vit_tiny_and_its_fix(tiny_vit, photograph_batch):
    """The patches that the class token reads for nothing are the register that it reads for nothing after the fix."""
    fixed = vitreg.add_test_time_registers(tiny_vit, neurons=[(7, 417), (6, 189)])
    before, after = (vitreg.diagnose(vit, photograph_batch[:4]) for vit in (tiny_vit, fixed))
    late = [{h.tokens for h in d.sinks.heads if h.block >= 8} for d in (before, after)]
    assert late == [{"outlier patches"}, {"registers"}]
    assert {h.kind for d in (before, after) for h in d.sinks.heads if h.block >= 8} == {"no-op"}
    assert before.faithfulness.blocks[-1].to_registers == 0
    assert after.faithfulness.blocks[-1].to_registers > 0.1
    assert "to registers" in after.faithfulness.sentences[0]


def test_what_cannot_be_seen_is_not_said(tiny_vit, photograph_batch):
    no_cls = small("vit_medium_patch16_reg4_gap_256")
    seen = vitreg.observe(tiny_vit)
    for vit, images in ((no_cls, torch.randn(2, 3, 112, 112)), (seen, photograph_batch[:2])):
        diagnosis = vitreg.diagnose(vit, images)
        assert (diagnosis.faithfulness, diagnosis.sinks) == (None, None)
