"""The model and its converters on a GPU: what the CPU says in float32, within the precision; no waiting, no growth."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import timm
import torch

import vitreg
from cuda.models import DTYPES, FAMILIES, error, small

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_tokens_and_logits(device, dtype, family, images):
    vit, kind = small(family), getattr(torch, dtype)
    moved = copy.deepcopy(vit).to(device, kind)
    for x in (images, torch.nn.functional.interpolate(images, (96, 48))):
        expected, found = vit(x), moved(x.to(device, kind))
        assert (found.patches.device.type, found.patches.dtype) == (device.type, kind)
        assert found.grid == expected.grid
        assert error(found.sequence(), expected.sequence()) <= DTYPES[dtype]
        assert error(moved.classify(x.to(device, kind)), vit.classify(x)) <= 2 * DTYPES[dtype]
        assert found.patch_map().device.type == device.type


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_traces(device, dtype, family, images):
    vit, kind = small(family), getattr(torch, dtype)
    moved = copy.deepcopy(vit).to(device, kind)
    asked = {
        "attention_from": "cls" if vit.config.class_token else [(0, 1), (2, 3)],
        "facets": ("queries", "keys", "values"),
        "patches": True,
        "activations": True,
    }
    expected, found = vit.trace(images, **asked), moved.trace(images.to(device, kind), **asked)
    pairs = {
        "norms": (found.patch_norms, expected.patch_norms),
        "attention": (found.attention.to_patches, expected.attention.to_patches),
        "keys": (found.keys.patches, expected.keys.patches),
        "patches": (found.patches, expected.patches),
        "activations": (found.activations.patches, expected.activations.patches),
    }
    errors = {name: error(*pair) for name, pair in pairs.items()}
    assert max(errors.values()) <= 2 * DTYPES[dtype], errors


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(device, family, images, checkpointing):
    vit = small(family)
    moved = copy.deepcopy(vit).to(device).train()
    moved.gradient_checkpointing = checkpointing
    vit.classify(images).square().mean().backward()
    moved.classify(images.to(device)).square().mean().backward()
    for (name, ours), theirs in zip(moved.named_parameters(), vit.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        elif theirs.grad.norm() > 1e-6:
            assert error(ours.grad, theirs.grad) <= 5 * DTYPES["float32"], name


def test_adding_registers_on_the_device(device, images):
    vit = small("plain").to(device)
    more = vitreg.add_registers(vit, 3)
    assert more.registers.device.type == device.type
    assert more(images.to(device)).registers.shape[1] == 3


def test_load_and_save(device, tmp_path, images):
    vit = small().to(device, torch.bfloat16)
    for name in ("model.safetensors", "timm.safetensors"):
        vitreg.save(vit, tmp_path / name, format=name.partition(".")[0].replace("model", "vitreg"))
        again = vitreg.load(tmp_path / name, device=device, dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in again.parameters()} == {(device.type, torch.bfloat16)}
        x = images.to(device, torch.bfloat16)
        with torch.inference_mode():
            assert error(again(x).patches, vit(x).patches) <= 1e-3
    assert vitreg.load("vitreg_tiny", device=device).patch_embed.weight.device.type == device.type


def test_converters_leave_weights_where_they_are(device, images):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64).to(device).eval()
    for vit in (
        vitreg.from_timm(model),
        vitreg.from_state_dict(model.state_dict(), "vit_tiny_patch16_224", model_kwargs={"depth": 1}).to(device),
    ):
        assert {parameter.device.type for parameter in vit.parameters()} == {device.type}
        with torch.inference_mode():
            assert error(vit.classify(images.to(device)), model(images.to(device))) <= 1e-4


def test_transformers_converts_on_the_device(device, images):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=64, patch_size=16
    )
    model = transformers.ViTModel(config).to(device).eval()
    with torch.inference_mode():
        expected = model(images.to(device)).last_hidden_state
        assert error(vitreg.from_transformers(model)(images.to(device)).sequence(), expected) <= 1e-4


def test_open_clip_converts_on_the_device(device, images):
    open_clip = pytest.importorskip("open_clip")
    vision, text = dict(image_size=64, layers=1, width=64, patch_size=16), dict(width=8, heads=1, layers=1)
    model = open_clip.CLIP(24, vision, text).to(device).eval()
    with torch.inference_mode():
        expected = model.encode_image(images.to(device))
        assert error(vitreg.from_open_clip(model).classify(images.to(device)), expected) <= 1e-4


COMPILED = textwrap.dedent(
    """
    import sys, torch, vitreg
    from torch.nn.functional import interpolate

    device, dtype = torch.device(sys.argv[1]), getattr(torch, sys.argv[2])
    vit = vitreg.load("vitreg_tiny_reg4", device=device, dtype=dtype)
    compiled = torch.compile(vit, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    for size in (64, 96):
        x = torch.randn(2, 3, size, size).to(device, dtype)
        with torch.no_grad():
            ours, expected = compiled(x).sequence(), vit(x).sequence()
        error = (ours - expected).norm() / expected.norm()
        assert error < (1e-3 if dtype == torch.float32 else 5e-2), error
    """
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(device, dtype):
    """In a process of its own, as the tests' shape checks do not trace."""
    command = [sys.executable, "-c", COMPILED, str(device), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_waits_for_nothing(gpu, family, images):
    vit, x = small(family).to(gpu), images.to(gpu)
    larger = torch.nn.functional.interpolate(x, (96, 48))
    for batch in (x, larger):
        vit(batch)  # RoPE's table is made once for each grid
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.inference_mode():
                vit(batch)
                vit.classify(batch)
            vit.classify(batch).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_reads_no_number_back(family):
    """Without a GPU: on the device "meta" there is no number to be read."""
    vit = small(family).to("meta")
    for size in ((64, 64), (96, 48)):
        tokens = vit(torch.empty(2, 3, *size, device="meta"))
        assert tokens.patches.is_meta
        assert vit.classify(torch.empty(2, 3, *size, device="meta")).is_meta


@pytest.mark.parametrize("call", ["forward", "trace", "train"])
def test_memory_does_not_grow(gpu, call, images):
    vit, x = small().to(gpu), images.to(gpu)
    calls = {
        "forward": lambda: vit(x),
        "trace": lambda: vit.trace(x, attention_from="cls", facets=("keys",), activations=True),
        "train": lambda: vit.classify(x).sum().backward(),
    }
    used = []
    for _ in range(6):
        calls[call]()
        vit.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[1], used


def test_a_trace_takes_hardly_more_memory_than_a_forward(gpu):
    vit = vitreg.VisionTransformer(
        vitreg.ViTConfig(embed_dim=384, depth=12, num_heads=6, mlp_dim=1536, patch_size=14, image_size=(518, 518))
    ).to(gpu)
    x = torch.randn(2, 3, 518, 518, device=gpu)
    peaks = []
    for run in (lambda: vit(x), lambda: vit.trace(x, attention_from="cls")):
        with torch.inference_mode():
            run()
            torch.cuda.reset_peak_memory_stats()
            run()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.2 * peaks[0], peaks
