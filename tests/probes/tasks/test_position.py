"""The position probe: against scikit-learn on the same tokens, and on a real model with artifacts."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from probes.small import Images, small_vit, spoil_first_value, validation
from vitreg.images import open_image_set
from vitreg.probes import FeaturesConfig, FeatureStore, extract
from vitreg.probes.protocols import PositionConfig
from vitreg.probes.tasks.patch_kinds import SUBJECTS
from vitreg.probes.tasks.position import position

STORED = FeaturesConfig(dtype="float32", shard_size=32)
NAMES = [subject.name for subject in SUBJECTS]


def training(data, number):
    images = open_image_set(data / "tiny-imagenet-100" / "train.parquet")
    return Images(images, range(0, number * 11, 11))


@pytest.fixture(scope="module")
def small(test_data, tmp_path_factory):
    """Training and validation features of a small random model, which has no outliers."""
    folder, vit = tmp_path_factory.mktemp("small"), small_vit()
    return (
        extract(vit, training(test_data, 200), folder / "train", STORED),
        extract(vit, validation(test_data, 100), folder / "val", STORED),
    )


@pytest.fixture(scope="module")
def tiny(_tiny_vit, test_data, tmp_path_factory):
    """Those of the real ViT-Ti, whose corners are outliers."""
    folder = tmp_path_factory.mktemp("tiny")
    return (
        extract(_tiny_vit, training(test_data, 40), folder / "train", STORED),
        extract(_tiny_vit, validation(test_data, 20), folder / "val", STORED),
    )


def tokens_of(store: FeatureStore, block: int = -1) -> np.ndarray:
    return torch.cat([tokens for _, tokens in store.patches(block)]).numpy()


def by_name(result):
    return {(score.name, score.subject): score for score in result.scores}


def test_it_equals_scikit_learns_logistic_regression(small):
    train, val = small
    x, y = tokens_of(train), np.tile(np.arange(16), train.num_images)
    mean, std = x.mean((0, 1)), x.std((0, 1))
    theirs = LogisticRegression(C=1, max_iter=1000).fit(((x - mean) / std).reshape(-1, 48), y)
    guess = theirs.predict(((tokens_of(val) - mean) / std).reshape(-1, 48)).reshape(-1, 16)
    places = list(itertools.product(range(4), range(4)))
    right = 100 * (guess == np.arange(16)).mean()
    distance = np.mean([[math.dist(places[p], places[i]) for i, p in enumerate(row)] for row in guess])

    found = by_name(position(train, val, PositionConfig(epochs=30, head_batch_size=128, learning_rate=1e-2)))
    assert 20 < right < 90  # neither chance nor certainty, where all would be equal
    assert found["position top-1", "all"].value == pytest.approx(right, abs=1.5)
    assert found["position distance", "all"].value == pytest.approx(distance, abs=0.05)


def test_artifacts_in_fixed_places(tiny):
    """Outliers are the four corners: being one is a position, so the probe is better on them, as is a blind guess."""
    train, val = tiny
    result = position(train, val, PositionConfig(epochs=3, learning_rate=1e-2))
    found, guess = by_name(result), result.details["constant guess"]
    assert list(found) == list(itertools.product(["position top-1", "position distance"], NAMES))
    outliers = val.outliers().flatten(1).sum(1)
    assert result.details["val"] == {"all": 20 * 196, "normal": 20 * 196 - outliers.sum(), "outlier": outliers.sum()}
    np.testing.assert_array_equal(found["position distance", "outlier"].sums[:, 1], outliers)
    for name in ("position top-1", "position distance"):
        together = found[name, "normal"].sums + found[name, "outlier"].sums
        np.testing.assert_allclose(together, found[name, "all"].sums)

    where = val.outliers().flatten(1).double().mean(0)
    where /= where.sum()
    assert guess["outlier"]["positions"] == pytest.approx(float((-where * where.clamp(min=1e-9).log()).sum().exp()))
    assert 3.5 < guess["outlier"]["positions"] < 5
    assert guess["outlier"]["top_1"] == pytest.approx(100 * float(where.max()), abs=2)
    assert guess["all"]["top_1"] == pytest.approx(100 / 196)
    middle = np.mean([math.dist((6, 6), place) for place in itertools.product(range(14), range(14))])
    assert guess["all"]["distance"] == pytest.approx(middle)
    assert found["position top-1", "outlier"].value >= guess["outlier"]["top_1"] - 1
    assert found["position top-1", "normal"].value < 10


def test_without_outliers_there_is_one_probe(small):
    result = position(*small, PositionConfig(epochs=1, head_batch_size=128))
    found = by_name(result)
    assert list(result.details["epochs"]) == ["all"]
    for subject in ("normal", "all but outliers"):
        np.testing.assert_array_equal(found["position top-1", subject].sums, found["position top-1", "all"].sums)
    for subject in ("outlier", "outlier, own probe"):
        score = found["position top-1", subject]
        assert math.isnan(score.value)
        assert score.missing == "the training images have 0 outliers; it takes 10"


def test_equal_seeds_give_equal_probes(small):
    config = PositionConfig(epochs=2, head_batch_size=128)
    one, same, other = (position(*small, replace(config, seed=seed)).scores[0].sums for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_training_ends_when_held_out_images_say_so(small):
    """A learning rate at which the loss rises; the weights from before are kept."""
    seen = []
    config = PositionConfig(epochs=30, head_batch_size=64, learning_rate=3.0, patience=2)
    result = position(*small, config, on_progress=lambda epoch, total: seen.append((epoch, total)))
    best = result.details["epochs"]["all"]
    assert seen == [(epoch, 30) for epoch in range(1, best + 3)]
    assert best < 28


def test_patches_of_some_images_only(test_data, tmp_path):
    vit = small_vit()
    some = replace(STORED, patches=12, shard_size=8)
    stores = [extract(vit, images, tmp_path / name, some) for name, images in (
        ("train", training(test_data, 40)), ("val", validation(test_data, 20)),
    )]  # fmt: skip
    result = position(*stores, PositionConfig(epochs=1, head_batch_size=64))
    assert result.scores[0].sums.shape == (12, 2)
    assert result.details["train"]["all"] == result.details["val"]["all"] == 12 * 16


def test_refusals(small, test_data, tmp_path):
    train, val = small
    few = extract(small_vit(), training(test_data, 9), tmp_path / "few", STORED)
    with pytest.raises(ValueError, match="has patch tokens of 9 images; the position probe takes 10"):
        position(few, val)
    other = extract(small_vit(seed=1), validation(test_data, 4), tmp_path / "other", STORED)
    with pytest.raises(ValueError, match="features of another model"):
        position(train, other)
    without = extract(small_vit(), validation(test_data, 4), tmp_path / "without", replace(STORED, patches=0))
    with pytest.raises(ValueError, match="holds no patch tokens"):
        position(train, without)
    with pytest.raises(ValueError, match="patience is 0; it must be above 0"):
        PositionConfig(patience=0)


def test_features_that_are_not_finite(small, tmp_path):
    train, val = small
    folder = shutil.copytree(val.path, tmp_path / "val")
    spoil_first_value(folder, "patches")
    with pytest.raises(ValueError, match="patch tokens of block -1 that are not finite"):
        position(train, FeatureStore.open(folder))
