"""TokenCut against the dense eigenproblem."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from discovery.literal import literal_cut
from vitreg.discovery import tokencut as module
from vitreg.discovery.tokencut import EPS, TAU, Graph, cut_coordinates, tokencut


def sides(features: torch.Tensor) -> np.ndarray:
    cut = cut_coordinates(Graph(torch.nn.functional.normalize(features, dim=1), TAU))
    assert cut is not None
    return cut > cut.mean()


def test_partition_of_100_maps_is_that_of_the_dense_problem(feature_maps):
    same = 0
    for features, _ in feature_maps[:50]:
        for facet in ("keys", "values"):
            ours, theirs = sides(features[facet]), literal_cut(features[facet], TAU, EPS)
            same += bool((ours == theirs).all() or (ours == ~theirs).all())
    assert same >= 99


@pytest.fixture
def planted() -> torch.Tensor:
    """Two kinds of patches on a grid of 8 x 10; the kind with fewer fills rows 2 to 4, columns 3 to 6."""
    features = torch.zeros(8, 10, 4)
    features[..., 0] = 1
    features[2:5, 3:7] = torch.tensor([0.0, 1, 0, 0])
    return (features + 0.05 * torch.randn(8, 10, 4)).reshape(80, 4)


def test_planted_object_is_found(planted):
    found = tokencut(planted, (8, 10))
    assert found.box(16, 128, 160) == (48, 32, 112, 80)
    assert found.mask[found.seed]
    assert found.degree[2, 3] == 11
    assert found.degree[0, 0] == 67


def test_a_graph_that_is_not_kept_gives_the_same(planted, feature_maps, monkeypatch):
    features, grid = feature_maps[0]
    kept = tokencut(planted, (8, 10)), tokencut(features["keys"], grid)
    monkeypatch.setattr(module, "_KEPT_ENTRIES", 0)
    for before, after in zip(kept, (tokencut(planted, (8, 10)), tokencut(features["keys"], grid)), strict=True):
        assert before.seed == after.seed
        np.testing.assert_array_equal(before.mask, after.mask)


def test_equal_coordinates_seed_at_the_first_patch():
    """Opposite corners that are alike have equal coordinates, and rounding must not choose between them."""
    features = torch.zeros(35, 3)
    features[:, 0] = 1
    for corner in (0, 6, 28, 34):
        features[corner] = torch.tensor([0.0, 1, 0])
    found = tokencut(features, (5, 7))
    assert found.seed == (0, 0)
    assert found.mask.sum() == 1


@pytest.mark.parametrize("features", [torch.ones(12, 3), torch.zeros(12, 3), torch.eye(12)])
def test_where_every_cut_is_equal_the_object_is_everything(features):
    found = tokencut(features, (3, 4))
    assert found.mask.all()
    assert found.seed == (0, 0)


def test_bias_moves_the_threshold(planted):
    joined = tokencut(planted, (8, 10), bias=0.9)
    assert (joined.degree == 79).all()


def test_bad_input():
    with pytest.raises(ValueError, match="do not fill"):
        tokencut(torch.ones(12, 3), (5, 5))
    with pytest.raises(ValueError, match="NaN"):
        tokencut(torch.full((12, 3), torch.inf), (3, 4))
