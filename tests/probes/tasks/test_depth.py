"""The depth probe against torchmetrics and literal formulas, and what it says of bad input."""

from __future__ import annotations

import copy
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from torchmetrics import MeanAbsolutePercentageError, MeanSquaredError

from peers import error
from probes.dense import all_patches, squares, stores
from vitreg.images import open_depth
from vitreg.probes import FeaturesConfig, extract
from vitreg.probes.store.dense_features import dense_preprocess
from vitreg.probes.tasks.depth import DepthConfig, depth_blocks, expected_depth, fit_depth, linear_depth
from vitreg.probes.tasks.depth_errors import depth_errors, sig_loss

SHORT = DepthConfig(bins=32, max_depth=5.0, steps=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def sets(folder):
    return open_depth(str(folder))


@pytest.fixture(scope="module")
def features(sets, tmp_path_factory):
    return stores(sets, tmp_path_factory.mktemp("stores"))


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, (2, 5, 8, 11)), (24, (4, 11, 17, 23)), (40, (9, 19, 29, 39)), (6, (0, 2, 3, 5))]
)
def test_blocks_of_lin_4_are_those_of_dinov2(depth, blocks):
    assert depth_blocks(depth, "lin.4") == blocks
    assert depth_blocks(depth, "lin.1") == (depth - 1,)


def test_too_few_blocks_for_lin_4():
    with pytest.raises(ValueError, match=r"the model has 3 blocks, but lin\.4 reads four; choose lin\.1"):
        depth_blocks(3, "lin.4")


def test_depth_of_logits_is_the_literal_formula():
    logits, config = torch.randn(2, 3, 256) * 2, DepthConfig()
    weights = torch.relu(logits) + 0.1
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("ijk,k->ij", weights, torch.linspace(0.001, 10, 256))
    assert error(expected_depth(logits, config), expected) < 1e-5


def test_the_loss_is_the_literal_formula():
    predicted, truth = torch.rand(50) + 0.5, torch.rand(50) + 0.5
    g = np.log(predicted.numpy() + 1e-3) - np.log(truth.numpy() + 1e-3)
    full = np.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)
    assert sig_loss(predicted, truth, mean_only=False).item() == pytest.approx(full, rel=1e-5)
    mean = np.sqrt(0.15 * g.mean() ** 2)
    assert sig_loss(predicted, truth, mean_only=True).item() == pytest.approx(mean, rel=1e-4)
    assert sig_loss(predicted[:0], truth[:0], mean_only=False) == 0


def test_errors_are_those_of_torchmetrics():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.5, 9, 1000).astype(np.float32)
    predicted = (truth * rng.uniform(0.7, 1.4, 1000)).astype(np.float32)
    rmse, relative, delta = depth_errors(predicted, truth)
    pair = torch.from_numpy(predicted), torch.from_numpy(truth)
    assert rmse == pytest.approx(MeanSquaredError(squared=False)(*pair).item(), rel=1e-5)
    assert relative == pytest.approx(MeanAbsolutePercentageError()(*pair).item(), rel=1e-5)
    ratio = predicted / truth
    assert delta == pytest.approx(((ratio < 1.25) & (ratio > 0.8)).mean())
    assert 0.5 < delta < 0.9


def test_squares_are_at_their_distances(sets, features):
    result = linear_depth(*features, sets, SHORT)
    rmse, relative, delta = (score.value for score in result.scores)
    mean = result.details["of_training_mean"]
    assert result.details["training_mean"] == pytest.approx(2, abs=0.1)
    assert mean["RMSE"] == pytest.approx((2 / 3) ** 0.5, abs=0.1)
    # Depth between two squares is in between, too.
    assert rmse < 0.65 * mean["RMSE"]
    assert relative < 0.5 * mean["AbsRel"]
    assert delta > 70
    assert [score.lower_is_better for score in result.scores] == [True, True, False]


def test_figures_are_means_over_images_of_the_predictions(sets, features):
    train, val = features
    estimator = fit_depth(train, sets[0], dataclasses.replace(SHORT, steps=3))
    result = estimator.evaluate(val, sets[1])
    found = []
    for number, meters in estimator.predict(val, sets[1], range(7)):
        truth = sets[1].target(number)
        assert meters.shape == truth.shape
        found.append(depth_errors(meters[truth > 0], truth[truth > 0]))
    assert (truth == 0).any() or len(found) == 7
    rmse, relative, delta = np.mean(found, 0)
    assert [score.value for score in result.scores] == pytest.approx([rmse, relative, 100 * delta])
    assert result.scores[0].sums.shape == (7, 2)


def test_a_prediction_is_the_head_upsampled_twice(sets, features):
    """Logits by 4, then meters to the image's size; class tokens behind the patches of every block."""
    train, val = features
    estimator = fit_depth(train, sets[0], dataclasses.replace(SHORT, steps=3, blocks=(0, -1), batch_norm=True))
    classes = [token[2].expand(24, -1) for block in (0, -1) if (token := val.cls(block)) is not None]
    tokens = [all_patches(val, 0)[2], all_patches(val, -1)[2], *classes]
    logits = estimator.head(torch.cat(tokens, -1)[None]).mT.unflatten(-1, (4, 6))
    upsampled = functional.interpolate(logits, scale_factor=4, mode="bilinear").movedim(1, -1)
    expected = functional.interpolate(expected_depth(upsampled, SHORT)[None], (80, 120), mode="bilinear")[0, 0]
    ((number, meters),) = estimator.predict(val, sets[1], [2])
    assert number == 2
    assert error(torch.from_numpy(meters), expected) < 1e-5


def test_holes_and_what_is_beyond_the_range_do_not_count(sets, features, folder, tmp_path):
    """Filling the holes with 65 m, as sensors do that mark them so, changes nothing."""
    whole = shutil.copytree(folder, tmp_path / "data")
    for part in ("train", "val"):
        for file in (whole / part / "depth").iterdir():
            steps = np.asarray(Image.open(file))
            Image.fromarray(np.where(steps == 0, 65535, steps).astype(np.uint16)).save(file)
    filled = open_depth(str(whole))
    config = dataclasses.replace(SHORT, steps=10)
    one, other = linear_depth(*features, sets, config), linear_depth(*stores(filled, tmp_path), filled, config)
    for ours, theirs in zip(one.scores, other.scores, strict=True):
        np.testing.assert_array_equal(ours.sums, theirs.sums)


def test_equal_seeds_give_equal_heads(sets, features):
    config = dataclasses.replace(SHORT, steps=10)
    fitted = [fit_depth(features[0], sets[0], dataclasses.replace(config, seed=seed)) for seed in (1, 1, 2)]
    weights = [estimator.head.linear.weight for estimator in fitted]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_kitchen_is_better_known_than_by_its_mean(tiny_vit, test_data, tmp_path):
    sets = open_depth(str(test_data / "kitchen-depth"))
    sets = sets[0].part(range(0, 140, 4)), sets[1].part(range(0, 60, 8))
    preprocess = dense_preprocess(tiny_vit.preprocess, 96, 128)
    train, val = (
        extract(tiny_vit, images, tmp_path / str(i), FeaturesConfig(blocks=(2, 5, 8, 11)), preprocess=preprocess)
        for i, images in enumerate(sets)
    )
    config = DepthConfig(blocks=depth_blocks(12, "lin.4"), bins=64, steps=200)
    result = linear_depth(train, val, sets, config)
    assert result.scores[0].value < 0.9 * result.details["of_training_mean"]["RMSE"]
    cropped = linear_depth(train, val, sets, dataclasses.replace(config, steps=5, eigen_crop=True))
    whole = linear_depth(train, val, sets, dataclasses.replace(config, steps=5))
    assert cropped.details["of_training_mean"] != whole.details["of_training_mean"]


def test_bad_depth(sets, features, folder, tmp_path):
    train, val = features
    with pytest.raises(ValueError, match=r"00\.png is 80 x 120, but the Eigen crop is one of 480 x 640"):
        linear_depth(train, val, sets, dataclasses.replace(SHORT, steps=1, eigen_crop=True))
    custom = [copy.copy(one) for one in sets]
    custom[1].eigen_crop = True
    with pytest.raises(ValueError, match=r"00\.png is 80 x 120, but the Eigen crop"):
        linear_depth(train, val, (custom[0], custom[1]), dataclasses.replace(SHORT, steps=1))
    with pytest.raises(ValueError, match=r"no depth from 4\.0 to 5\.0 m; a step .* 0\.001 m: check the scale"):
        linear_depth(train, val, sets, dataclasses.replace(SHORT, min_depth=4.0))
    with pytest.raises(ValueError, match=r"min_depth 2\.0 and max_depth 1\.0 must be above 0 and rise"):
        DepthConfig(min_depth=2.0, max_depth=1.0)
    whole = shutil.copytree(folder, tmp_path / "data")
    for name in ("02", "05"):
        Image.fromarray(np.zeros((80, 120), np.uint16)).save(whole / f"val/depth/{name}.png")
    holes = open_depth(str(whole))
    sentence = r"depth maps of .*val cannot be used \(2\): .*02\.png is all holes .*05\.png is all holes"
    with pytest.raises(ValueError, match=sentence):
        linear_depth(*stores(holes, tmp_path), holes, SHORT, on_progress=lambda *_: pytest.fail("trained"))
