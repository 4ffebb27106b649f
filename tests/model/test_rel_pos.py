"""The bias on attention, pair by pair."""

from __future__ import annotations

import itertools

import pytest
import torch

from peers import error, perturb
from vitreg import ViTConfig
from vitreg.model.rel_pos import RelPosBias

SMALL = dict(embed_dim=8, depth=1, num_heads=2, mlp_dim=8, patch_size=8, image_size=(16, 24))
GRID = (2, 3)


def bias(**options) -> RelPosBias:
    return perturb(RelPosBias(ViTConfig(**{**SMALL, "num_registers": 2, **options})))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["table", "mlp"])
def test_it_is_of_the_offset_and_zero_for_registers_and_their_copies(kind):
    counted = dict(num_test_time_registers=1, register_weight=3, register_neurons=((0, 1),))
    rel_pos = bias(rel_pos=kind, rel_pos_dim=5 * (kind == "mlp"), **counted)
    found = rel_pos(GRID, torch.zeros(1))[0]
    patches = [*itertools.product(*map(range, GRID))]
    names = ["copy", "copy", "cls", "register", "register", *patches]
    assert found.shape == (2, len(names), len(names))
    for (i, query), (j, key) in itertools.product(enumerate(names), repeat=2):
        expected = torch.zeros(2)
        if isinstance(query, tuple) and isinstance(key, tuple):
            down, right = query[0] - key[0], query[1] - key[1]
            if kind == "table":
                expected = rel_pos.table[(down + 1) * 5 + right + 2]
            else:
                logs = torch.tensor([float(down), float(right)])
                expected = rel_pos.fc2(rel_pos.fc1(logs.sign() * (1 + logs.abs()).log()).relu())
        elif kind == "table" and "cls" in (query, key) and not {query, key} & {"copy", "register"}:
            expected = rel_pos.table[-1 if query == key else -3 if query == "cls" else -2]
        assert error(found[:, i, j] + 1, expected + 1) < 1e-6, (query, key)


@torch.no_grad()
def test_another_grid_keeps_the_class_tokens_entries_and_the_dtype():
    rel_pos = bias(rel_pos="table")
    larger = rel_pos((4, 5), torch.zeros(1, dtype=torch.bfloat16))[0]
    assert larger.dtype == torch.bfloat16
    assert torch.equal(larger[:, 0, 3], rel_pos.table[-3].bfloat16())
    assert not torch.equal(larger[:, 3, 4], larger[:, 4, 3])


def test_it_trains_and_its_index_may_be_made_in_inference_mode():
    rel_pos = bias(rel_pos="table")
    with torch.inference_mode():
        rel_pos((3, 3), torch.zeros(1))
    rel_pos((3, 3), torch.zeros(1)).square().sum().backward()
    assert rel_pos.table.grad.abs().min() > 0
