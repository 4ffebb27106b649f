"""The pair of small ViTs that comes with the package."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

import vitreg
from vitreg.checkpoints import registry

PAIR = [row for row in registry.MODELS if row.bundled]


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Nothing else to find them in."""
    monkeypatch.delenv("VITREG_CHECKPOINTS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_they_are_alike_in_everything_but_registers():
    without, registers = (vitreg.load(row.name) for row in PAIR)
    assert [without.config.name, registers.config.name] == ["vitreg_tiny", "vitreg_tiny_reg4"]
    changed = dataclasses.replace(registers.config, name="vitreg_tiny", num_registers=0)
    assert changed == without.config
    assert registers.num_registers == 4
    shapes = {key: value.shape for key, value in registers.state_dict().items() if key != "registers"}
    assert shapes == {key: value.shape for key, value in without.state_dict().items()}


@pytest.mark.parametrize("row", PAIR, ids=lambda row: row.name)
def test_what_the_table_says_is_what_they_are(row):
    vit = vitreg.load(row.name)
    assert (vit.config.patch_size, vit.num_registers) == (row.patch_size, row.num_registers)
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(row.million_parameters, abs=0.05)
    assert next(vit.parameters()).dtype == torch.float32


def test_files_are_small_and_in_half_precision():
    for row in PAIR:
        with safe_open(row.bundled, "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    assert sum(row.bundled.stat().st_size for row in PAIR) < 25e6


def test_the_card_lies_beside_them_and_names_both():
    card = (PAIR[0].bundled.parent / "README.md").read_text()
    assert all(f"`{row.name}`" in card for row in PAIR)


def test_a_folder_of_checkpoints_comes_first(tmp_path, monkeypatch):
    vit = vitreg.load("vitreg_tiny")
    with torch.no_grad():
        vit.head.weight.fill_(7)
    vitreg.save(vit, tmp_path / "vitreg_tiny.safetensors")
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(tmp_path))
    assert (vitreg.load("vitreg_tiny").head.weight == 7).all()


@pytest.fixture(scope="module")
def unseen(test_data):
    """Photographs of which neither has seen a crop."""
    return sorted((test_data / "coco128" / "images").iterdir())[:48]


def test_one_has_its_teachers_artifacts_and_the_other_has_none(unseen):
    without, registers = (vitreg.diagnose(vitreg.load(row.name), unseen, max_examples=0) for row in PAIR)
    assert without.has_artifacts
    assert 0.01 < without.outlier_fraction < 0.1
    last = without.blocks[-1]
    assert last.max > 5 * last.median
    assert float(without.position_frequency.max()) < 0.5, "they depend on what is in the image"
    assert registers.has_artifacts is False
    assert all(block.outlier_fraction == 0 for block in registers.blocks)
    assert max(block.attention_on_outliers or 0 for block in without.blocks) > 0.2


def test_a_test_time_register_removes_them(unseen):
    vit = vitreg.load("vitreg_tiny")
    fixed = vitreg.add_test_time_registers(vit, unseen)
    assert vitreg.compare(vit, fixed, unseen).outcome == "removed"


def test_loading_does_not_import_dynamo():
    """Random registers were drawn for the empty model; on the meta device that imports a compiler, in 1.2 s."""
    code = "import sys, vitreg; vitreg.load('vitreg_tiny_reg4'); assert 'torch._dynamo' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
