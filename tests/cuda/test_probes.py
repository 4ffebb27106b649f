"""The feature pass and every probe on a GPU: scores that the CPU gives."""

from __future__ import annotations

import copy

import pytest
import torch

from cuda.models import DTYPES, error
from probes.dense import squares, stores
from probes.small import small_vit
from vitreg.images import open_depth, open_image_set, open_segmentation
from vitreg.probes import FeaturesConfig, FeatureStore, extract

pytestmark = pytest.mark.cuda
KEPT = FeaturesConfig(blocks=(0, 1, 2), dtype="float32", shard_size=8)


@pytest.fixture(scope="session")
def classes(folders, tmp_path_factory) -> tuple[FeatureStore, FeatureStore]:
    """Features of the four classes, from the CPU."""
    out = tmp_path_factory.mktemp("stores")
    train, val = (extract(small_vit(), open_image_set(folders / part), out / part, KEPT) for part in ("train", "val"))
    return train, val


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_feature_pass(device, dtype, folders, classes, tmp_path):
    vit = copy.deepcopy(small_vit()).to(device, getattr(torch, dtype))
    store = extract(vit, open_image_set(folders / "val"), tmp_path, KEPT)
    for (_, ours), (_, theirs) in zip(store.patches(-1), classes[1].patches(-1), strict=True):
        assert error(ours, theirs) <= DTYPES[dtype]


def top(result) -> list[float]:
    return [score.value for score in result.scores if score.value is not None]


@pytest.mark.parametrize("probe", ["knn", "linear", "tokens", "position"])
def test_probes_of_images(device, probe, classes):
    from vitreg.probes.protocols import (
        KNNConfig,
        LinearConfig,
        LogisticConfig,
        PositionConfig,
        SingleTokenConfig,
    )
    from vitreg.probes.tasks.knn import knn
    from vitreg.probes.tasks.linear import linear
    from vitreg.probes.tasks.position import position
    from vitreg.probes.tasks.single_token import single_token

    run = {
        "knn": lambda where: knn(*classes, KNNConfig(k=(5,)), device=where),
        "linear": lambda where: linear(
            *classes, LinearConfig(learning_rates=(0.01, 0.1), epochs=2, epoch_length=20), device=where
        ),
        "tokens": lambda where: single_token(
            *classes, SingleTokenConfig(draws=1, min_images=5, logistic=LogisticConfig(C=(0.1, 1.0))), device=where
        ),
        "position": lambda where: position(*classes, PositionConfig(epochs=2), device=where),
    }[probe]
    ours, theirs = top(run(device)), top(run("cpu"))
    assert ours
    assert ours == pytest.approx(theirs, rel=0.05, abs=6, nan_ok=True)


def test_reconstruction(device, folders, classes):
    from vitreg.probes.tasks.reconstruction import reconstruction

    sets = [open_image_set(folders / part) for part in ("train", "val")]
    ours, theirs = (top(reconstruction(*classes, *sets, device=where)) for where in (device, "cpu"))
    assert ours == pytest.approx(theirs, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("kind", ["masks", "depth"])
def test_dense_probes(device, kind, tmp_path):
    from vitreg.probes.protocols import DepthConfig, SegmentationConfig
    from vitreg.probes.tasks.depth import linear_depth
    from vitreg.probes.tasks.segmentation import linear_segmentation

    root = str(squares(tmp_path / "squares"))
    sets = open_segmentation(root) if kind == "masks" else open_depth(root)
    train, val = stores(sets, tmp_path / "stores")
    if kind == "masks":
        runs = [
            linear_segmentation(train, val, sets, SegmentationConfig(steps=40), device=where)
            for where in (device, "cpu")
        ]
    else:
        runs = [linear_depth(train, val, sets, DepthConfig(steps=40), device=where) for where in (device, "cpu")]
    ours, theirs = map(top, runs)
    assert ours == pytest.approx(theirs, rel=0.1, abs=3)
