"""What the tests of a GPU share. `pytest --device cpu tests/cuda` runs all that a CPU can show: none is untried."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitreg
from vitreg.common.devices import available_devices


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """A GPU, or what `--device` says."""
    asked = request.config.getoption("--device")
    if asked is None and available_devices()[0] != "cuda":
        pytest.skip("there is no GPU here; --device cpu runs what needs none")
    return torch.device(asked or "cuda")


@pytest.fixture
def gpu(device) -> torch.device:
    """The same for what only CUDA can show."""
    if device.type != "cuda":
        pytest.skip("only CUDA can show this")
    return device


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """`train/` and `val/` with four classes: photographs of noise around a color."""
    root, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for part, number in (("train", 12), ("val", 6)):
        for label, color in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60))):
            (root / part / f"class {label}").mkdir(parents=True)
            for i in range(number):
                noise = rng.normal(color, 40, (64, 64, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noise).save(root / part / f"class {label}" / f"{i}.png")
    return root


@pytest.fixture
def images(folders) -> torch.Tensor:
    """Ten of them, normalized."""
    preprocess = vitreg.Preprocess(size=(64, 64), crop_pct=1.0)
    return torch.stack([preprocess(Image.open(path)) for path in sorted((folders / "train").rglob("*.png"))[::3][:10]])
