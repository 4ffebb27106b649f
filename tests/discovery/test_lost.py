"""LOST against its equations, and where they break down."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from discovery.literal import literal_lost
from vitreg.discovery.features import FACETS, condition
from vitreg.discovery.lost import lost


def assert_same(features, grid, **options):
    """The region is the literal one; with boxes in units of a patch."""
    found = lost(features, grid, **options)
    seed, mask, degree, box = literal_lost(features, grid, **options)
    assert found.seed == seed
    assert found.box(1, *grid) == box
    np.testing.assert_array_equal(found.mask, mask)
    np.testing.assert_array_equal(found.degree, degree)


@pytest.mark.parametrize("start", range(0, 200, 20))
def test_random_maps_are_as_the_equations_say(start):
    for number in range(start, start + 20):
        generator = torch.Generator().manual_seed(number)
        rows, columns, dim, k = (int(torch.randint(3, 30, (), generator=generator)) for _ in range(4))
        features = torch.randn(rows * columns, dim, generator=generator)
        # Neighbors alike, as in images, so that objects have more than one patch.
        features = features + 2 * features.roll(1, 0) + 2 * features.roll(columns, 0)
        bias = float(torch.randn((), generator=generator)) if number % 2 else 0.0
        assert_same(features, (rows, columns), bias=bias, k_patches=4 * k)


@pytest.mark.parametrize("facet", FACETS)
@pytest.mark.parametrize("conditioned", [False, True])
def test_maps_of_126_images_are_as_the_equations_say(feature_maps, facet, conditioned):
    assert len(feature_maps) == 126
    for features, grid in feature_maps:
        if conditioned:
            assert_same(condition(features[facet], normalize=True, center=True), grid, bias=0.05)
        else:
            assert_same(features[facet], grid)


@pytest.mark.parametrize("seed", range(20))
def test_ties_and_zeros_go_by_position(seed):
    """Small integers: products are exact, many are zero, and many degrees are equal."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(-1, 2, (19 * 31, 4), generator=generator).float()
    assert_same(features, (19, 31))


def test_equal_patches_are_one_object():
    """A constant image: every similarity is equal, and so is every degree."""
    found = lost(torch.ones(12, 5), (3, 4))
    assert found.seed == (0, 0)
    assert found.mask.all()
    assert (found.degree == 11).all()


def test_centered_equal_patches_are_no_object_but_a_result():
    features = condition(torch.full((12, 5), 0.1), normalize=True, center=True)
    assert not features.any()
    assert_same(features, (3, 4))
    assert lost(features, (3, 4)).box(1, 3, 4) == (0, 0, 1, 1)


def test_lost_code_raises_here_all_similarities_negative():
    """The reference raises when the seed is in component 0; that is where the expansion set is empty."""
    features = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    found = lost(features, (4, 5), bias=-1.5)
    assert found.seed == (0, 0)
    assert found.mask.sum() == 1
    assert found.mask[0, 0]
    assert not found.degree.any()


def test_more_candidates_than_patches_is_all_patches():
    features = torch.randn(20, 3)
    many, all_of_them = lost(features, (4, 5), k_patches=1000), lost(features, (4, 5), k_patches=20)
    assert many.seed == all_of_them.seed
    np.testing.assert_array_equal(many.mask, all_of_them.mask)
    assert lost(features, (4, 5), k_patches=1).mask.sum() != many.mask.sum()


def test_patches_that_are_not_allowed_take_no_part():
    features = torch.randn(40, 6)
    allowed = torch.ones(40, dtype=torch.bool)
    allowed[:8] = False
    found, alone = lost(features, (5, 8), allowed=allowed), lost(features[8:], (4, 8))
    assert found.seed == (alone.seed[0] + 1, alone.seed[1])
    np.testing.assert_array_equal(found.mask[1:], alone.mask)
    np.testing.assert_array_equal(found.degree[1:], alone.degree)
    assert not found.mask[0].any()
    assert not found.degree[0].any()


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (torch.ones(12, 2), {"grid": (3, 5)}, "12 features do not fill"),
        (torch.full((12, 2), torch.nan), {}, "NaN"),
        (torch.ones(12, 2), {"k_patches": 0}, "k_patches is 0"),
        (torch.ones(12, 2), {"allowed": torch.zeros(12, dtype=torch.bool)}, "no patch is left"),
    ],
)
def test_bad_input(features, options, message):
    with pytest.raises(ValueError, match=message):
        lost(features, **{"grid": (3, 4), **options})


def test_half_precision_is_compared_in_float32(feature_maps):
    features, grid = feature_maps[0]
    half = features["keys"].to(torch.bfloat16)
    np.testing.assert_array_equal(lost(half, grid).degree, lost(half.float(), grid).degree)


def test_memory_is_linear_in_patches():
    """The Gram matrix of 30000 patches has 3.6 GB."""
    code = (
        "import resource, torch\n"
        "from vitreg.discovery.lost import lost\n"
        "features = torch.randn(30000, 8)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "lost(features, (150, 200))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    kilobytes = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert kilobytes < 300_000
