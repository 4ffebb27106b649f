"""Files that version 0.1 wrote load as before, under the names of today."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitreg
from vitreg import training

WRITTEN = Path(__file__).parent / "v0_1"


def test_a_saved_model_of_0_1_gives_what_it_gave():
    vit = vitreg.load(WRITTEN / "model.safetensors")
    images = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    with torch.inference_mode():
        logits = vit.classify(images)
    # Printed by 0.1.
    expected = torch.tensor([[0.5585721135139465, -0.13291054964065552, 0.8839952945709229]])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert vit.config.fc_norm
    assert vit.preprocess.crop_pct == 0.9
    assert vit.config.register_neurons == ((0, 3),)


def test_a_run_of_0_1_is_a_model_and_goes_on(tmp_path: Path):
    random = np.random.default_rng(0)
    for label in range(4):
        (tmp_path / "images" / f"c{label}").mkdir(parents=True)
        for number in range(15):
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"c{label}" / f"{number}.png")
    run = shutil.copytree(WRITTEN / "run", tmp_path / "run")
    assert vitreg.load(run).num_registers == 4
    assert training.resume(run, data=tmp_path / "images", device="cpu", num_workers=0)
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    # The last two are of steps that 0.1 took from the same checkpoint.
    assert losses == pytest.approx(
        [0.695084810256958, 0.6915622353553772, 0.6957155466079712, 0.6953819990158081], rel=1e-5
    )
