"""One function chooses the device, and sums are right where it has no float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vitreg
from vitreg.common.devices import available_devices, precise, resolve_device, summing_device
from vitreg.probes.heads import logistic

SOURCES = Path(__file__).parents[2] / "src" / "vitreg"


@pytest.mark.parametrize(
    ("cuda", "mps", "first"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_an_apple_gpu_where_there_is_no_other(monkeypatch, cuda, mps, first):
    """It knew only CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device() == resolve_device("auto") == torch.device(first)
    assert available_devices()[-1] == "cpu"


def test_a_device_that_is_not_there_is_refused_in_one_sentence():
    for device in ("tpu9", "cuda:99", "mps:7", "", torch.device("cuda:99")):
        with pytest.raises(ValueError, match=r"^cannot use device '.*'; give auto, or what this machine has: .*cpu$"):
            resolve_device(device)
    with pytest.raises(ValueError, match="cannot use device 'cuda:99'"):
        vitreg.load("vitreg_tiny", device="cuda:99")
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


def test_load_takes_auto():
    assert vitreg.load("vitreg_tiny", device="auto").patch_embed.weight.device.type == available_devices()[0]


def test_no_other_code_chooses_a_device():
    choosing = [file.name for file in SOURCES.rglob("*.py") if ".is_available()" in file.read_text(encoding="utf-8")]
    assert set(choosing) <= {"devices.py", "memory.py"}


def test_float64_is_asked_for_where_it_exists():
    assert (precise("cpu"), precise("cuda"), precise(torch.device("mps"))) == (*[torch.float64] * 2, torch.float32)
    assert [summing_device(name).type for name in ("cpu", "cuda", "mps")] == ["cpu", "cuda", "cpu"]


def test_logistic_regression_without_float64_finds_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 8, generator=generator) + torch.eye(8)[labels]
    expected = logistic.fit_logistic(features, labels, 3, C=0.1)
    monkeypatch.setattr(logistic, "precise", lambda device: torch.float32)
    found = logistic.fit_logistic(features, labels, 3, C=0.1)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-3, atol=1e-3)
