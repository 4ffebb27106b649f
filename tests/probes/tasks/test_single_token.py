"""Classification from one token, on the real ViT-Ti, whose artifacts are the four corners."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from probes.labeled import ALL_BLOCKS, images_of, small_stores
from probes.small import small_vit
from vitreg.probes import FeaturesConfig, FeatureStore, extract
from vitreg.probes.heads.logistic import LogisticConfig
from vitreg.probes.tasks.single_token import SingleTokenConfig, _kinds, single_token

CONFIG = SingleTokenConfig(draws=3, min_images=5, logistic=LogisticConfig(C=(0.01,)))
Stores = tuple[FeatureStore, FeatureStore]


@pytest.fixture(scope="module")
def stores(test_data, tmp_path_factory) -> Stores:
    """Of a small random model with two registers, which has no artifacts."""
    return small_stores(test_data, tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def real(_tiny_vit, test_data, tmp_path_factory) -> Stores:
    folder = tmp_path_factory.mktemp("real")
    train, val = (
        extract(_tiny_vit, images_of(test_data, part, (3, 7, 20), each), folder / part, FeaturesConfig(dtype="float32"))
        for part, each in (("train", 10), ("val", 6))
    )
    return train, val


def test_kinds_of_tokens_of_a_real_model(real):
    train, val = real
    result = single_token(train, val, CONFIG)
    scores = {score.subject: score for score in result.scores}
    assert list(scores) == ["class token", "normal patch", "outlier patch"]
    for name, score in scores.items():
        details = result.details["tokens"][name]
        assert (details["num_train"], details["num_val"], details["C"]) == (30, 18, 0.01)
        assert score.value == pytest.approx(statistics.mean(details["accuracies"]))
        if name == "class token":
            assert score.deviation is None
        else:
            assert len(details["accuracies"]) == 3
            assert score.deviation == pytest.approx(statistics.stdev(details["accuracies"]))
    assert scores["class token"].value > 80


def test_the_class_token_is_that_of_scikit_learn(real):
    train, val = real
    cls, queries = train.cls(-1), val.cls(-1)
    theirs = LogisticRegression(C=0.01, tol=1e-6, max_iter=1000).fit(cls.numpy(), train.labels.numpy())
    right = theirs.predict(queries.numpy()) == val.labels.numpy()
    ours = single_token(train, val, CONFIG).scores[0]
    assert ours.sums.tolist() == np.stack([right, np.ones(18)], 1).tolist()


def test_every_patch_is_of_its_kind_and_draws_differ(real, monkeypatch):
    """Every patch token becomes its norm before the final norm: what is drawn then tells its kind."""
    train, _ = real
    assert train.threshold is not None
    norms, plain = train.norms[:, train.block].flatten(1), FeatureStore.patches

    def patches(store, block):
        for rows, tokens in plain(store, block):
            assert store.path == train.path
            yield rows, norms[rows][:, :, None] + 0 * tokens

    monkeypatch.setattr(FeatureStore, "patches", patches)
    kinds = _kinds(train, CONFIG, 0)
    normal, outlier = kinds["normal patch"].draws[:, :, 0], kinds["outlier patch"].draws[:, :, 0]
    assert normal.shape == outlier.shape == (3, 30)
    assert (normal < train.threshold).all()
    assert (outlier >= train.threshold).all()
    for drawn in (normal, outlier):
        assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(normal, _kinds(train, CONFIG, 0)["normal patch"].draws[:, :, 0])
    assert not torch.equal(normal, _kinds(train, dataclasses.replace(CONFIG, seed=1), 0)["normal patch"].draws[:, :, 0])


def test_images_without_an_outlier_count_for_nothing(real, monkeypatch):
    train, val = real
    has = torch.arange(18) % 3 > 0
    plain = FeatureStore.outliers
    monkeypatch.setattr(
        FeatureStore, "outliers", lambda store: plain(store) & (has[:, None, None] if store.path == val.path else True)
    )
    result = single_token(train, val, CONFIG)
    score = result.scores[2]
    assert result.details["tokens"]["outlier patch"]["num_val"] == 12
    assert score.sums[:, 1].tolist() == has.double().tolist()
    assert not score.sums[~has.numpy(), 0].any()
    assert score.value == pytest.approx(statistics.mean(result.details["tokens"]["outlier patch"]["accuracies"]))


def test_too_few_outliers_leave_an_empty_place_and_registers_have_one_each(stores):
    train, val = stores
    scores = {score.subject: score for score in single_token(train, val, CONFIG).scores}
    assert list(scores) == ["class token", "normal patch", "outlier patch", "register 1", "register 2"]
    assert scores["outlier patch"].missing == "only 0 training and 0 validation images have one"
    assert math.isnan(scores["outlier patch"].value)
    for name in ("normal patch", "register 1", "register 2"):
        assert scores[name].value > 20
    assert scores["register 1"].sums.tolist() != scores["register 2"].sums.tolist()


def test_a_class_without_outliers_counts_as_wrong(real, monkeypatch):
    train, val = real
    plain = FeatureStore.outliers
    monkeypatch.setattr(
        FeatureStore,
        "outliers",
        lambda store: plain(store) & ((store.labels != 20)[:, None, None] if store.path == train.path else True),
    )
    result = single_token(train, val, CONFIG)
    assert result.details["tokens"]["outlier patch"]["num_classes"] == 2
    assert val.labels is not None
    assert not result.scores[2].sums[val.labels.numpy() == 20, 0].any()
    assert result.scores[2].sums[:, 1].all()


def test_patches_of_some_images(stores, test_data, tmp_path):
    """All kinds are fitted and judged on them, so that they can be compared."""
    config = dataclasses.replace(ALL_BLOCKS, patches=30)
    train = extract(small_vit(), images_of(test_data, "train", (3, 7), 24), tmp_path / "train", config)
    result = single_token(train, train, CONFIG)
    assert {(kind["num_train"], kind["num_val"]) for kind in result.details["tokens"].values()} == {(30, 30), (0, 0)}
    assert result.scores[0].sums[:, 1].sum() == 30
    assert len(result.scores[0].sums) == 48
    none = dataclasses.replace(ALL_BLOCKS, patches=0)
    empty = extract(small_vit(), images_of(test_data, "train", (3, 7), 24), tmp_path / "none", none)
    with pytest.raises(ValueError, match="holds no patch tokens"):
        single_token(empty, empty, CONFIG)


def test_equal_seeds_give_equal_results_and_c_is_chosen_once(stores):
    train, val = stores
    config = dataclasses.replace(CONFIG, logistic=LogisticConfig(C=(1e-4, 1e-2, 1.0)))
    steps = []
    one, two = (
        single_token(train, val, config, on_progress=lambda *step: steps.append(step)),
        single_token(train, val, config),
    )
    assert one.details == two.details
    assert steps[-1] == (9, 9)
    assert one.details["tokens"]["normal patch"]["C"] in config.logistic.C
    other = single_token(train, val, dataclasses.replace(config, seed=1))
    assert other.details["tokens"]["normal patch"]["accuracies"] != one.details["tokens"]["normal patch"]["accuracies"]
    assert other.details["tokens"]["class token"]["accuracies"] == one.details["tokens"]["class token"]["accuracies"]


@pytest.mark.parametrize("config", [{"draws": 0}, {"min_images": 0}])
def test_a_config_that_is_wrong(config):
    with pytest.raises(ValueError, match=r"it must be at least 1"):
        SingleTokenConfig(**config)
