"""The reconstruction probe: against scikit-learn on the same tokens and pixels, and on a real model with artifacts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from probes.small import Images, small_vit, validation
from vitreg.images import open_image_set
from vitreg.model.preprocess import IMAGENET_MEAN, IMAGENET_STD
from vitreg.probes import FeaturesConfig, extract
from vitreg.probes.heads.least_squares import Moments, fit_linear
from vitreg.probes.tasks.patch_kinds import SUBJECTS
from vitreg.probes.tasks.reconstruction import NAME, reconstruction

STORED = FeaturesConfig(dtype="float32", shard_size=32)


def training(data, number):
    images = open_image_set(data / "tiny-imagenet-100" / "train.parquet")
    return Images(images, range(0, number * 11, 11))


def samples(num, features=7, targets=5):
    """A linear relation under noise, of features with very different scales and means."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num, features)) * 10.0 ** np.linspace(-2, 2, features) + 30
    y = x @ rng.normal(size=(features, targets)) + 40 * rng.normal(size=(num, targets)) - 3
    return x, y


@pytest.mark.parametrize("num", [400, 9, 5])
def test_least_squares_are_scikit_learns_ridge(num):
    x, y = samples(num)
    parts = [Moments.of(torch.tensor(x[i::3]), torch.tensor(y[i::3])) for i in range(3)]
    ours = fit_linear(parts[0] + parts[1] + parts[2])
    alpha = ours.penalty * num * x.var(0).mean()
    theirs = Ridge(alpha=alpha, solver="cholesky").fit(x, y)
    np.testing.assert_allclose(ours.weight.T, theirs.coef_, atol=1e-8)
    np.testing.assert_allclose(ours.bias, theirs.intercept_, atol=1e-6)


@pytest.mark.parametrize("num", [400, 9])
def test_the_penalty_is_that_of_generalized_cross_validation(num):
    """From the hat matrix, as Golub, Heath and Wahba write it."""
    x, y = samples(num)
    x0, y0 = x - x.mean(0), y - y.mean(0)
    criteria = {}
    for exponent in range(-8, 3):
        scale = 10.0**exponent * num * x.var(0).mean()
        hat = x0 @ np.linalg.solve(x0.T @ x0 + scale * np.eye(7), x0.T) + 1 / num
        criteria[exponent] = np.square(y0 - hat @ y0).sum() / np.trace(np.eye(num) - hat) ** 2
    best = min(criteria, key=criteria.__getitem__)
    assert fit_linear(Moments.of(torch.tensor(x), torch.tensor(y))).penalty == pytest.approx(10.0**best)
    assert -8 < best < 2


def patches_of(images, vit, grid=4, patch=16):
    """Normalized pixels [images, patches, values], cut out one by one."""
    found = []
    for index in range(len(images)):
        pixels = vit.preprocess.pixels(images.image(index)).numpy() / 255
        pixels = (pixels - np.array(IMAGENET_MEAN)[:, None, None]) / np.array(IMAGENET_STD)[:, None, None]
        cut = [
            pixels[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].ravel()
            for row in range(grid)
            for column in range(grid)
        ]
        found.append(np.stack(cut))
    return np.stack(found)


def test_errors_are_those_of_scikit_learns_regression(test_data, tmp_path):
    vit = small_vit()
    train_images, val_images = training(test_data, 80), validation(test_data, 40, broken=(5,))
    train = extract(vit, train_images, tmp_path / "train", STORED)
    val = extract(vit, val_images, tmp_path / "val", STORED)
    seen = []
    result = reconstruction(train, val, train_images, val_images, on_progress=lambda *done: seen.append(done))
    assert seen[-1] == (119, 119)

    x, y = (np.concatenate(parts) for parts in (_tokens(train), patches_of(train_images, vit)))
    alpha = result.details["all"]["penalty"] * len(x) * x.var(0).mean()
    theirs = Ridge(alpha=alpha).fit(x, y)
    readable = Images(val_images, [i for i in range(40) if i != 5])
    truth = patches_of(readable, vit)
    errors = truth - np.stack([theirs.predict(tokens) for tokens in _tokens(val)])
    norms = np.linalg.norm(errors, axis=2)
    score = result.scores[0]
    assert (score.name, score.subject, score.lower_is_better) == (NAME, "all", True)
    np.testing.assert_allclose(score.sums[:, 0], norms.sum(1), rtol=1e-4)
    baseline = np.linalg.norm(truth - y.mean(0), axis=2)
    details = result.details["all"]
    assert details["error of the mean patch"] == pytest.approx(baseline.mean(), rel=1e-5)
    assert details["explained variance"] == pytest.approx(1 - (norms**2).sum() / (baseline**2).sum(), rel=1e-4)
    assert 0.1 < details["explained variance"] < 1

    for score in result.scores:  # there are no outliers
        if score.subject.startswith("outlier"):
            assert math.isnan(score.value)
            assert score.missing == "the training images have 0 outliers; it takes 10"
        else:
            np.testing.assert_array_equal(score.sums, result.scores[0].sums)


def _tokens(store):
    return torch.cat([tokens for _, tokens in store.patches(-1)]).double().numpy()


def test_a_model_with_artifacts(tiny_vit, test_data, tmp_path):
    """They hold less of their pixels, and what they hold is in a code of their own."""
    train_images, val_images = training(test_data, 40), validation(test_data, 20)
    train = extract(tiny_vit, train_images, tmp_path / "train", STORED)
    val = extract(tiny_vit, val_images, tmp_path / "val", STORED)
    result = reconstruction(train, val, train_images, val_images)
    found = {score.subject: score for score in result.scores}
    assert list(found) == [subject.name for subject in SUBJECTS]
    np.testing.assert_array_equal(found["outlier"].sums[:, 1], val.outliers().flatten(1).sum(1))
    np.testing.assert_allclose(found["normal"].sums + found["outlier"].sums, found["all"].sums)
    assert found["normal"].value < found["outlier"].value
    explained = {name: result.details[name]["explained variance"] for name in found}
    assert explained["all but outliers"] > 0.3 > explained["outlier"]


def test_other_images_are_refused(test_data, tmp_path):
    vit, images = small_vit(), validation(test_data, 4)
    store = extract(vit, images, tmp_path / "store", STORED)
    with pytest.raises(ValueError, match=r"store holds features of .*\(4 images.* not of .*\(5 images"):
        reconstruction(store, store, images, validation(test_data, 5))
    other = extract(small_vit(seed=1), images, tmp_path / "other", STORED)
    with pytest.raises(ValueError, match="features of another model"):
        reconstruction(store, other, images, images)
