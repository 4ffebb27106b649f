"""Diagnosis, comparison, fix and object discovery on a GPU: what the CPU finds."""

from __future__ import annotations

import copy
import inspect

import pytest
import timm
import torch

import vitreg
from cuda.models import DTYPES, error, small
from vitreg.artifacts.planted import plant_artifacts

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="session")
def planted(folders) -> vitreg.VisionTransformer:
    """A model with artifacts in the corners, on the CPU."""
    vit = vitreg.load("vitreg_tiny")
    return plant_artifacts(vit, some_images(vit, folders))


def some_images(vit, folders) -> torch.Tensor:
    from PIL import Image

    return torch.stack([vit.preprocess(Image.open(path)) for path in sorted((folders / "train").rglob("*.png"))[:24]])


# The planted vectors overflow float16.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_diagnose(device, dtype, planted, folders):
    images, kind = some_images(planted, folders), getattr(torch, dtype)
    expected = vitreg.diagnose(planted, images)
    found = vitreg.diagnose(copy.deepcopy(planted).to(device, kind), images)
    assert expected.has_artifacts
    assert (found.has_artifacts, found.onset_block) == (True, expected.onset_block)
    assert found.outlier_fraction == pytest.approx(expected.outlier_fraction, abs=1e-3)
    for ours, theirs in zip(found.blocks, expected.blocks, strict=True):
        assert ours.median == pytest.approx(theirs.median, rel=DTYPES[dtype])
    assert (found.position_frequency == expected.position_frequency).mean() > 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fix_and_compare(device, dtype, planted, folders, tmp_path):
    images, kind = some_images(planted, folders), getattr(torch, dtype)
    moved = copy.deepcopy(planted).to(device, kind)
    neurons = vitreg.find_register_neurons(moved, images)
    expected = vitreg.find_register_neurons(planted, images)
    assert [(n.block, n.unit) for n in neurons][:1] == [(n.block, n.unit) for n in expected][:1]
    fixed = vitreg.add_test_time_registers(moved, images)
    assert {(p.device.type, p.dtype) for p in fixed.parameters()} == {(device.type, kind)}
    comparison = vitreg.compare(moved, fixed, images)
    assert comparison.before.has_artifacts
    assert not comparison.after.has_artifacts
    comparison.save(tmp_path)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("method", ["lost", "tokencut"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_discover_objects(device, dtype, method, folders):
    vit = vitreg.load("vitreg_tiny_reg4")
    images, kind = some_images(vit, folders)[:6], getattr(torch, dtype)
    # A square of another color: an object that any features find.
    images[:, :, 16:40, 24:48] = torch.tensor([2.0, 2.0, -2.0])[:, None, None]
    expected = vitreg.discover_objects(vit, images, method=method)
    found = vitreg.discover_objects(copy.deepcopy(vit).to(device, kind), images, method=method)
    same = [ours.box == theirs.box for ours, theirs in zip(found, expected, strict=True)]
    assert sum(same) >= (6 if dtype == "float32" else 4), same


def test_a_diagnosis_does_not_keep_memory(gpu, planted, folders):
    vit, images = copy.deepcopy(planted).to(gpu), some_images(planted, folders)
    used = []
    for _ in range(5):
        vitreg.diagnose(vit, images, batch_size=4)
        vitreg.compare(vit, vit, images, batch_size=4)
        vitreg.discover_objects(vit, images[:4])
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[1], used


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_many_batches(device, dtype, folders):
    vit = small()
    images = some_images(vit, folders)
    expected = vitreg.diagnose(vit, images, batch_size=5)
    found = vitreg.diagnose(copy.deepcopy(vit).to(device, getattr(torch, dtype)), images, batch_size=3)
    for ours, theirs in zip(found.blocks, expected.blocks, strict=True):
        assert ours.median == pytest.approx(theirs.median, rel=DTYPES[dtype])
    assert error(torch.tensor(found.register_norms), torch.tensor(expected.register_norms)) < DTYPES[dtype]


def test_what_overflows_float16_is_said(device, planted, folders):
    with pytest.raises(ValueError, match=r"not finite after block .* use bfloat16 or float32"):
        vitreg.diagnose(copy.deepcopy(planted).to(device, torch.float16), some_images(planted, folders))


def test_a_module_that_is_not_converted_is_observed(device):
    model = timm.create_model("cait_xxs24_224", img_size=64, depth=2, embed_dim=48, num_heads=2)
    images = torch.randn(2, 3, 64, 64)
    on_cpu = vitreg.observe(model).trace(images).patch_norms
    observed = vitreg.observe(copy.deepcopy(model).to(device))
    torch.testing.assert_close(observed.trace(images.to(device)).patch_norms.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


def test_every_public_function_that_computes_is_tried_here():
    tried = "".join(
        inspect.getsource(__import__(f"cuda.{name}", fromlist=["_"])) for name in ("test_model", "test_analysis")
    )
    elsewhere = {"list_models", "open_store"}  # a list; files
    elsewhere |= {"export", "push_to_hub", "install_registers"}  # these are tried on a CPU only
    elsewhere |= {"add_prefix", "bake_registers", "distill_registers", "repair_singular_defects", "extract"}
    functions = [name for name in vitreg.__all__ if inspect.isfunction(inspect.unwrap(getattr(vitreg, name)))]
    assert len(functions) > 10
    assert [name for name in functions if f"vitreg.{name}(" not in tried and name not in elsewhere] == []
