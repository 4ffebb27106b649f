"""k-NN against scikit-learn's, with the same weights."""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

import vitreg
from probes.labeled import ALL_BLOCKS, images_of, small_stores
from probes.small import small_vit
from vitreg.probes import FeatureStore, extract
from vitreg.probes.tasks.knn import KNNConfig, knn, nearest

Stores = tuple[FeatureStore, FeatureStore]


@pytest.fixture(scope="module")
def stores(test_data, tmp_path_factory) -> Stores:
    return small_stores(test_data, tmp_path_factory.mktemp("stores"))


def peer(x, y, queries, k: int) -> np.ndarray:
    """Predictions of scikit-learn."""
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    return theirs.fit(np.asarray(x), np.asarray(y)).predict(np.asarray(queries))


def test_predictions_are_those_of_scikit_learn(stores):
    train, val = stores
    config = KNNConfig(k=(1, 10, 20, 100))
    result = knn(train, val, config)
    x, queries = train.cls(-1), val.cls(-1)
    assert x is not None
    assert queries is not None
    assert train.labels is not None
    assert val.labels is not None
    assert [score.subject for score in result.scores] == ["k = 1", "k = 10", "k = 20", "k = 100"]
    for k, score in zip(config.k, result.scores, strict=True):
        right = peer(x.double(), train.labels, queries.double(), k) == val.labels.numpy()
        assert score.sums[:, 0].tolist() == right.tolist()
        assert score.value == pytest.approx(100 * right.mean())
    assert len({score.value for score in result.scores}) > 1
    assert result.details["feature"] == "class token"


def test_many_classes_and_several_chunks(monkeypatch):
    monkeypatch.setattr(sys.modules[nearest.__module__], "_KEYS", 700)
    torch.manual_seed(0)
    means, y = torch.randn(40, 32), torch.arange(3000) % 40
    x, queries = (normalize(means[y] + 3 * torch.randn(3000, 32), dim=1) for _ in range(2))
    rows, similarity = nearest(x, queries[:500], 200)
    expected = (queries[:500] @ x.T).sort(dim=1, descending=True, stable=True)
    assert (rows == expected.indices[:, :200]).float().mean() > 0.999
    torch.testing.assert_close(similarity, expected.values[:, :200])


def test_of_equal_neighbors_the_first_count(monkeypatch):
    monkeypatch.setattr(sys.modules[nearest.__module__], "_KEYS", 7)
    x = normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]), dim=1).repeat(10, 1)
    rows, similarity = nearest(x, x[[1, 0]], 12)
    assert rows[0].tolist() == [*range(1, 30, 3), 2, 5]
    assert rows[1].tolist() == [*range(0, 30, 3), 1, 4]
    assert similarity[1, -1] == 0
    assert nearest(x, x[:1], 30)[1][0, -1] == pytest.approx(-math.sqrt(0.5))


def test_the_two_zeros_are_equal_neighbors():
    x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.0], [0.0, -1.0]])
    rows, similarity = nearest(x, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 4)
    assert rows.tolist() == [[0, 1, 2, 3]] * 2
    assert not similarity.any()


def test_more_neighbors_than_images_leave_an_empty_place(stores):
    scores = knn(*stores).scores
    assert [bool(score.missing) for score in scores] == [False, False, False, True]
    assert scores[3].missing == "there are only 120 training images"
    assert math.isnan(scores[3].value)


def test_without_class_token_the_pooled_feature(test_data, tmp_path):
    vit = vitreg.VisionTransformer(dataclasses.replace(small_vit().config, class_token=False, pool="mean"))
    images = images_of(test_data, "val", (3, 7), 8)
    store = extract(vit, images, tmp_path / "store", ALL_BLOCKS)
    result = knn(store, store, KNNConfig(k=(1,)))
    assert result.details["feature"] == "pooled"
    assert result.scores[0].value == 100


def test_classes_must_be_the_same(stores, test_data, tmp_path):
    train, val = stores
    few = extract(small_vit(), images_of(test_data, "train", (3, 7), 8), tmp_path / "few", ALL_BLOCKS)
    names = train.classes
    with pytest.raises(ValueError, match=rf"few holds no image of {names[20]}, {names[50]}, {names[99]}, of which"):
        knn(few, val)
    # The other way round it is no harm.
    assert knn(train, few).details["classes_without_val"] == [names[20], names[50], names[99]]
    one = extract(small_vit(), images_of(test_data, "train", (7,), 8), tmp_path / "one", ALL_BLOCKS)
    with pytest.raises(ValueError, match=f"one holds images of {names[7]} only; a classifier needs two"):
        knn(one, one)
    images = images_of(test_data, "val", (3, 7), 8)
    images.classes = (*names[:99], "something else")
    other = extract(small_vit(), images, tmp_path / "other", ALL_BLOCKS)
    with pytest.raises(ValueError, match=rf"lacks something else; .*other lacks {names[99]}$"):
        knn(train, other)
    images.labels = None
    unlabeled = extract(small_vit(), images, tmp_path / "unlabeled", ALL_BLOCKS)
    with pytest.raises(ValueError, match="unlabeled has no labels"):
        knn(train, unlabeled)


def test_stores_of_two_models_and_features_that_are_not_finite(stores, test_data, tmp_path, monkeypatch):
    train, val = stores
    other = extract(small_vit(1), images_of(test_data, "val", (3,), 8), tmp_path / "other", ALL_BLOCKS)
    with pytest.raises(ValueError, match="features of another model"):
        knn(train, other)
    spoilt = train.cls(-1)
    assert spoilt is not None
    spoilt[5] = torch.inf
    monkeypatch.setattr(FeatureStore, "cls", lambda _store, _block: spoilt)
    with pytest.raises(ValueError, match="not finite in row 5"):
        knn(train, val)


@pytest.mark.parametrize(("config", "sentence"), [({"k": ()}, "k is"), ({"temperature": 0.0}, "temperature is 0.0")])
def test_a_config_that_is_wrong(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        KNNConfig(**config)
