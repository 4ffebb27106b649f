"""How large values become, against the values themselves, and half precision that really overflows."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import vitreg
from vitreg.artifacts.measures.ranges import FLOAT16_MAX, probe_images, say_ranges, say_ranges_changed


def all_tokens(facet: vitreg.Tokens, block: int) -> torch.Tensor:
    parts = [] if facet.cls is None else [facet.cls[block].unsqueeze(1)]
    return torch.cat([*parts, facet.registers[block], facet.patches[block]], dim=1)


def test_what_is_said_is_what_the_values_are(tiny_vit, photograph_batch):
    images = photograph_batch[:6]
    ranges = vitreg.diagnose(tiny_vit, images, batch_size=4).ranges
    probes, probe_names = probe_images(tiny_vit.preprocess, (224, 224))
    with torch.inference_mode():
        traces = [tiny_vit.trace(images, activations=True, hidden=True) for images in (images, probes)]
    for block in ranges.blocks:
        i = block.block
        for found, kept in ((block.stream, "hidden"), (block.activations, "activations")):
            values, probed = (all_tokens(getattr(trace, kept), i) for trace in traces)
            largest = torch.cat([values, probed]).abs().amax((1, 2))
            assert found.largest == pytest.approx(largest.max().item(), rel=1e-5)
            names = [*(f"image {i + 1}" for i in range(len(images))), *probe_names]
            assert found.image == names[int(largest.argmax())]
            for steps, error in (
                (values.abs().max() / 127, found.int8_per_tensor),
                (values.abs().amax((0, 1)) / 127, found.int8_per_channel),
            ):
                rounded = (values / steps).round() * steps
                real = ((rounded - values).norm(dim=-1) / values.norm(dim=-1)).median().item()
                assert error == pytest.approx(real, rel=0.2) or error > max(real, 0.05)
        squares = all_tokens(traces[0].hidden, i).square().sum(-1).max().item()
        assert block.sum_of_squares >= squares * (1 - 1e-5)


def test_half_precision_that_only_a_checkerboard_overflows(tiny_vit, photograph_batch):
    """A planted overflow (llama.cpp #17534, ollama #18070): it is found in float32, in its block, before it happens."""
    tiny_vit = copy.deepcopy(tiny_vit)
    with torch.no_grad():
        tiny_vit.blocks[0].mlp.fc2.weight[48] *= 25000
        tiny_vit.blocks[0].mlp.fc2.bias[48] *= 25000
    ranges = vitreg.diagnose(tiny_vit, photograph_batch[:6]).ranges
    assert not ranges.float16
    assert ranges.overflowing[0] == 0
    assert ranges.blocks[0].mlp.largest > FLOAT16_MAX
    assert "MLP's output of block 0 (checkerboard of 56 pixels)" in say_ranges(ranges)[0]
    probes, _ = probe_images(tiny_vit.preprocess, (224, 224))
    with torch.inference_mode():
        half = tiny_vit.half()
        assert half(photograph_batch[:6].half()).patches.isfinite().all()
        assert not half(probes[-1:].half()).patches.isfinite().all()
        found = vitreg.diagnose(half, photograph_batch[:6].half()).ranges
    assert not found.float16
    assert found.overflowing[0] == 0


def test_no_alarm_where_half_precision_works(tiny_vit, photograph_batch):
    ranges = vitreg.diagnose(tiny_vit, photograph_batch[:6]).ranges
    assert ranges.float16
    assert ranges.overflowing == ()
    assert "float16 holds every value" in say_ranges(ranges)[0]
    assert "squares in float16" in say_ranges(ranges)[0]  # 342000, which PyTorch's norms add up in float32
    probes, _ = probe_images(tiny_vit.preprocess, (224, 224))
    with torch.inference_mode():
        assert copy.deepcopy(tiny_vit).half()(torch.cat([photograph_batch[:6], probes]).half()).patches.isfinite().all()


def test_models_that_are_observed_have_the_range_of_their_stream(tiny_vit, photograph_batch):
    whole = vitreg.diagnose(tiny_vit, photograph_batch[:3]).ranges
    seen = vitreg.diagnose(vitreg.observe(tiny_vit, preprocess=tiny_vit.preprocess), photograph_batch[:3]).ranges
    for one, other in zip(whole.blocks, seen.blocks, strict=True):
        assert other.stream.largest == pytest.approx(one.stream.largest, rel=1e-4)
        assert other.activations is None
        assert other.mlp is None
    assert say_ranges(seen)[1] == say_ranges(whole)[1]


def test_a_change_is_told(tiny_vit, photograph_batch):
    ranges = vitreg.diagnose(tiny_vit, photograph_batch[:3]).ranges
    worse = dataclasses.replace(ranges, float16=False)
    assert "float16" not in say_ranges_changed(ranges, ranges)[0]
    assert "which float16 does not hold" in say_ranges_changed(ranges, worse)[0]
    assert "which float16 holds" in say_ranges_changed(worse, ranges)[0]
