"""Registers by self-distillation: the targets against shifts written out, and what is trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vitreg
from peers import error, perturb, random_images
from registers.planting import photos, plant, random_vit, with_patches
from vitreg.registers.distilled import SHIFT, mean_of_views


@torch.no_grad()
def test_targets_are_means_of_what_every_patch_was_seen_as():
    vit = random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3, depth=2)
    images = random_images(112, batch=2)
    found = mean_of_views(vit, images, 6, torch.Generator().manual_seed(3)).patch_map()
    generator, reach = torch.Generator().manual_seed(3), round(SHIFT * 7)
    seen = [[[list(image)] for image in row] for row in vit(images).patch_map().permute(2, 3, 0, 1)]
    for _ in range(5):
        rows, columns = ((2 * torch.rand(2, generator=generator) - 1) * reach).round().int().tolist()
        flip = bool(torch.rand((), generator=generator) < 0.5)
        view = torch.zeros_like(images)
        places = [(r, c) for r in range(7) for c in range(7) if 0 <= r + rows < 7 and 0 <= c + columns < 7]
        for r, c in places:
            to = (slice(16 * (r + rows), 16 * (r + rows + 1)), slice(16 * (c + columns), 16 * (c + columns + 1)))
            view[:, :, *to] = images[:, :, 16 * r : 16 * (r + 1), 16 * c : 16 * (c + 1)]
        features = vit(view.flip(-1) if flip else view).patch_map()
        for r, c in places:
            seen[r][c].append(list(features[:, :, r + rows, 6 - (c + columns) if flip else c + columns]))
    for r in range(7):
        for c in range(7):
            expected = torch.stack([torch.stack(of_view) for of_view in seen[r][c]]).mean(0)
            assert error(found[:, :, r, c], expected) < 1e-5


def planted(photographs):
    vit = perturb(random_vit("deit3_small_patch16_224", embed_dim=96, num_heads=3))
    images, marks = with_patches(photos(photographs, vit), 16)
    plant(vit, 1, (7, 30), images, marks)
    return vit, images


@pytest.mark.parametrize(("count", "num_views"), [(4, 3), (4, 1), (0, 3)])
def test_it_learns_and_changes_no_more_than_it_says(count, num_views, photographs):
    """With both parts, and with registers or means of views alone."""
    vit, images = planted(photographs)
    options = dict(count=count, num_views=num_views, batch_size=8)
    short, long = (vitreg.distill_registers(vit, images, num_steps=steps, **options) for steps in (1, 40))
    target = mean_of_views(vit, images, num_views, torch.Generator().manual_seed(5)).patches
    with torch.no_grad():
        first, last = (F.cosine_similarity(vit(images).patches, target, dim=-1).mean() for vit in (short, long))
    assert last > first
    assert long.num_registers == count
    assert f"means of {num_views} shifted view" in long.config.changes[-1]
    before, after = vit.state_dict(), long.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"pos_embed", "patch_embed.weight", "blocks.3.mlp.fc2.weight"} <= changed
    assert all(name.startswith(("pos_embed", "patch_embed.", "blocks.3.")) for name in changed)
    assert all(parameter.requires_grad for parameter in long.parameters())


def test_what_it_cannot_do_is_said(photographs):
    clean = random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3)
    assert (
        "Nothing was distilled. No artifacts"
        in vitreg.distill_registers(clean, photos(photographs, clean)).config.changes[-1]
    )
    for options, message in (
        ({"count": -1}, "count is -1; give at least 0"),
        ({"num_views": 0}, "num_views is 0; give at least 1"),
        ({"num_steps": 0}, "num_steps is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            vitreg.distill_registers(clean, random_images(112), **options)
    with pytest.raises(ValueError, match="only once, but are needed again"):
        vitreg.distill_registers(clean, (p for p in random_images(112, batch=8)[:, None]))
