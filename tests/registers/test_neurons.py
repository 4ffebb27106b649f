"""`find_register_neurons` on units that were planted, against direct computation, and on the real ViT-Ti."""

from __future__ import annotations

import pytest
import torch

import vitreg
from registers.planting import photos, plant, random_vit, with_patches
from vitreg.registers.neurons import output_norms

FAMILIES = {
    "vit_base_patch16_224": {},
    "vit_giant_patch14_dinov2": dict(embed_dim=96, num_heads=3),  # SwiGLU, LayerScale
    "vit_base_patch16_clip_quickgelu_224": dict(embed_dim=96, num_heads=3),  # norm before the blocks
    "vit_small_patch16_dinov3_qkvb": dict(embed_dim=96, num_heads=3),  # four registers of its own, RoPE
    "vit_pwee_patch16_reg1_gap_256": dict(embed_dim=96, num_heads=3),  # parallel blocks
}


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_units_rank_first(family, photographs):
    vit = random_vit(family, **FAMILIES[family])
    images, marks = with_patches(photos(photographs, vit), vit.config.patch_size)
    plant(vit, 1, (7, 30, 41), images, marks)
    found = vitreg.find_register_neurons(vit, images)
    assert {(n.block, n.unit) for n in found[:3]} == {(1, 7), (1, 30), (1, 41)}
    assert all(n.on_outliers > 10 * n.elsewhere for n in found[:3])
    assert all(n.block <= 1 for n in found)


@torch.no_grad()
def test_means_equal_direct_computation(tiny_vit, photograph_batch):
    diagnosis = vitreg.diagnose(tiny_vit, photograph_batch)
    found = vitreg.find_register_neurons(tiny_vit, photograph_batch, most=50, diagnosis=diagnosis, batch_size=5)
    trace = tiny_vit.trace(photograph_batch, activations=True)
    outliers = (trace.patch_norms[diagnosis.block] >= diagnosis.threshold).flatten(1)
    on = trace.activations.patches[:, outliers].mean(1)
    off = trace.activations.patches[:, ~outliers].mean(1)
    for n in found:
        assert n.on_outliers == pytest.approx(float(on[n.block, n.unit]), rel=1e-4)
        assert n.elsewhere == pytest.approx(float(off[n.block, n.unit]), rel=1e-3, abs=1e-4)
    written = ((on - off) * output_norms(tiny_vit).float())[: diagnosis.onset_block + 1]
    best = [divmod(i, tiny_vit.config.mlp_dim) for i in written.flatten().topk(50).indices.tolist()]
    assert [(n.block, n.unit) for n in found] == best


def test_real_vit_names_the_known_unit_from_files_batches_and_loaders(tiny_vit, photographs, photograph_batch):
    found = vitreg.find_register_neurons(tiny_vit, photographs)
    assert (found[0].block, found[0].unit) == (7, 417)
    assert found[0].on_outliers > 100 > 1 > found[0].elsewhere
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(photograph_batch), batch_size=9)
    assert vitreg.find_register_neurons(tiny_vit, loader)[0].unit == 417


def test_progress_covers_both_passes(tiny_vit, photograph_batch):
    seen: list[tuple[int, int | None]] = []
    vitreg.find_register_neurons(
        tiny_vit, photograph_batch, batch_size=16, on_progress=lambda *state: seen.append(state)
    )
    assert [done for done, _ in seen] == [16, 32, 48, 64]


def test_a_clean_model_has_none(photographs):
    vit = random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3)
    assert vitreg.find_register_neurons(vit, photos(photographs, vit)) == []


def test_a_generator_cannot_be_gone_through_twice(tiny_vit, photograph_batch):
    with pytest.raises(ValueError, match="only once, but are needed twice: give a list or a DataLoader"):
        vitreg.find_register_neurons(tiny_vit, (b for b in photograph_batch.split(8)))
