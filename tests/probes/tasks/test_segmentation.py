"""The segmentation probe against scikit-learn, torchmetrics and interpolate, and what it says of bad input."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from peers import error
from probes.dense import CONFIG, all_patches, squares, stores, with_patches
from probes.small import small_vit, spoil_first_value
from vitreg.images import IGNORED, open_segmentation
from vitreg.probes import FeaturesConfig, extract
from vitreg.probes.heads.dense_head import LinearHead, Upsampling
from vitreg.probes.store.dense_features import DenseFeatures, dense_preprocess, read_targets
from vitreg.probes.tasks.segmentation import SegmentationConfig, Segmenter, fit_segmentation, linear_segmentation

SHORT = SegmentationConfig(steps=150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def sets(folder):
    return open_segmentation(str(folder))


@pytest.fixture(scope="module")
def features(sets, tmp_path_factory):
    return stores(sets, tmp_path_factory.mktemp("stores"))


def test_squares_are_found_where_they_are(sets, features):
    """Rows and columns, and the unknown pixels, would all show if image and target were not aligned."""
    seen = []
    result = linear_segmentation(*features, sets, SHORT, on_progress=lambda *done: seen.append(done))
    assert result.scores[0].value > 85
    assert result.scores[1].value > 92
    assert seen[-1] == (150, 150)
    assert result.details["classes_not_in_training"] == []
    assert [entry["class"] for entry in result.details["IoU"]] == ["0", "1", "2"]


def test_figures_are_those_of_torchmetrics_on_the_predictions(sets, features):
    train, val = features
    segmenter = fit_segmentation(train, sets[0], dataclasses.replace(SHORT, steps=5))
    result = segmenter.evaluate([val], sets[1])
    macro = MulticlassJaccardIndex(3, ignore_index=IGNORED)
    each = MulticlassJaccardIndex(3, average="none", ignore_index=IGNORED)
    accuracy = MulticlassAccuracy(3, average="micro", ignore_index=IGNORED)
    numbers = []
    for number, classes in segmenter.predict([val], sets[1], range(7)):
        numbers.append(number)
        truth = torch.from_numpy(sets[1].target(number)).long()
        assert classes.shape == truth.shape
        for metric in (macro, each, accuracy):
            metric.update(torch.from_numpy(classes), truth)
    assert numbers == list(range(7))
    miou, pixels = result.scores
    assert miou.value == pytest.approx(100 * macro.compute().item(), abs=1e-3)
    assert pixels.value == pytest.approx(100 * accuracy.compute().item(), abs=1e-3)
    ious = [entry["IoU"] for entry in result.details["IoU"]]
    assert ious == pytest.approx(each.compute().tolist(), abs=1e-5)
    assert 1 < miou.value < 99
    assert miou.sums.shape == (7, 3, 3)


def test_at_least_as_good_as_logistic_regression_on_the_same_patches(tiny_vit, test_data, tmp_path):
    """On real streets; scikit-learn learns each patch's most frequent class, and is judged at the same pixels."""
    camvid = open_segmentation(str(test_data / "camvid"), num_classes=11, ignore=11)
    sets = camvid[0].part(range(0, 360, 18)), camvid[1].part(range(0, 100, 12))
    preprocess = dense_preprocess(tiny_vit.preprocess, 144, 192)
    train, val = (extract(tiny_vit, images, tmp_path / str(i), preprocess=preprocess) for i, images in enumerate(sets))
    patches = all_patches(train, -1)
    labels = np.concatenate([_most_frequent(sets[0].target(i), 9, 12) for i in range(len(sets[0]))])
    counted = labels != IGNORED
    scaled = StandardScaler()
    known = scaled.fit_transform(patches.flatten(0, 1).numpy()[counted].astype(np.float64))
    peer = LogisticRegression(max_iter=100, tol=1e-3).fit(known, labels[counted])
    weight = peer.coef_ / scaled.scale_
    head = LinearHead(192, 11, batch_norm=False, seed=0)
    with torch.no_grad():
        head.linear.weight[:] = 0
        head.linear.bias[:] = -1e4
        head.linear.weight[peer.classes_] = torch.from_numpy(weight).float()
        head.linear.bias[peer.classes_] = torch.from_numpy(peer.intercept_ - weight @ scaled.mean_).float()
    theirs = Segmenter(head, sets[1].class_names, SHORT, {}).evaluate([val], sets[1]).scores[0].value
    ours = linear_segmentation(train, val, sets, dataclasses.replace(SHORT, steps=300)).scores[0].value
    assert theirs > 25
    assert ours > theirs - 1


def _most_frequent(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    cells = mask.reshape(rows, mask.shape[0] // rows, columns, mask.shape[1] // columns).swapaxes(1, 2)
    counts = np.stack([(cells == number).sum((2, 3)) for number in range(11)])
    return np.where(counts.any(0), counts.argmax(0), IGNORED).reshape(-1)


def test_upsampling_is_that_of_interpolate():
    maps = torch.randn(2, 15, 7)
    theirs = functional.interpolate(maps.mT.unflatten(-1, (3, 5)), (14, 20), mode="bilinear", align_corners=False)
    assert error(Upsampling((3, 5), (14, 20), "cpu")(maps).movedim(-1, 1), theirs) < 1e-6


def test_equal_seeds_give_equal_heads(sets, features):
    train, _ = features
    config = dataclasses.replace(SHORT, steps=20)
    fitted = [fit_segmentation(train, sets[0], dataclasses.replace(config, seed=seed)) for seed in (3, 3, 4)]
    heads = [segmenter.head.linear.weight for segmenter in fitted]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_several_blocks_and_several_sizes(sets, features, tmp_path):
    """The +ms variant: probabilities of all sizes are averaged at the image's resolution."""
    train, val = features
    _, larger = stores(sets, tmp_path, scale=2)
    segmenter = fit_segmentation(train, sets[0], dataclasses.replace(SHORT, steps=30, blocks=(0, -1)))
    assert segmenter.head.linear.in_features == 96
    probabilities = 0
    for store, grid in ((val, (4, 6)), (larger, (8, 12))):
        tokens = torch.cat([all_patches(store, 0), all_patches(store, -1)], -1)[4:5]
        logits = segmenter.head(tokens).mT.unflatten(-1, grid)
        probabilities = probabilities + functional.interpolate(logits, (80, 120), mode="bilinear").softmax(1)
    ((number, classes),) = segmenter.predict([val, larger], sets[1], [4])
    assert number == 4
    np.testing.assert_array_equal(classes, probabilities.argmax(1)[0].numpy())
    config = dataclasses.replace(SHORT, steps=30)
    assert linear_segmentation(train, [val, larger], sets, config).details["sizes"] == [[64, 96], [128, 192]]
    with pytest.raises(ValueError, match="another preprocessing"):
        linear_segmentation(train, [larger, val], sets, config)


def test_logits_of_a_whole_image_in_all_sizes_are_never_held(sets, features, tmp_path, monkeypatch):
    train, val = features
    _, larger = stores(sets, tmp_path, scale=2)
    segmenter = fit_segmentation(train, sets[0], dataclasses.replace(SHORT, steps=30))
    ((_, whole),) = segmenter.predict([val, larger], sets[1], [4])
    made = []

    def spied(self, maps, rows):
        made.append(upsampled := upsample(self, maps, rows))
        return upsampled

    upsample = Upsampling.__call__
    monkeypatch.setattr(Upsampling, "__call__", spied)
    monkeypatch.setattr("vitreg.probes.tasks.segmentation.AT_ONCE", 3 * 120 * 7)
    ((_, classes),) = segmenter.predict([val, larger], sets[1], [4])
    np.testing.assert_array_equal(classes, whole)
    assert len(made) == 2 * 12, "seven rows of 80 at a time, of two sizes"
    assert max(maps.numel() for maps in made) == 3 * 120 * 7


def test_a_head_that_has_diverged_has_no_figures(sets, features):
    """The largest of logits that are no numbers would be the first class."""
    with pytest.raises(ValueError, match="the head is not finite after 5 steps; train it with a lower lr"):
        fit_segmentation(features[0], sets[0], dataclasses.replace(SHORT, steps=5, lr=1e37))


def test_masks_without_a_pixel_that_counts_have_no_figures(sets, features, monkeypatch):
    segmenter = fit_segmentation(features[0], sets[0], dataclasses.replace(SHORT, steps=5))
    monkeypatch.setattr(type(sets[1]), "target", lambda *_: np.full((80, 120), IGNORED, np.uint8))
    with pytest.raises(ValueError, match="has no pixel that counts"):
        segmenter.evaluate([features[1]], sets[1])


def test_patches_in_any_order_are_those_of_the_store(sets, features, tmp_path):
    train, _ = features
    read = DenseFeatures(train, (0, -1), with_cls=True)
    rows = [23, 4, 5, 0, 23]
    cls = train.cls(0), train.cls(-1)
    assert cls[0] is not None
    assert cls[1] is not None
    expected = [all_patches(train, 0)[rows], all_patches(train, -1)[rows]]
    expected += [tokens[rows][:, None].expand(-1, 24, -1) for tokens in cls if tokens is not None]
    assert torch.equal(read.read(rows), torch.cat(expected, -1))
    assert read.channels == 4 * 48
    some, _ = stores(sets, tmp_path, config=with_patches(CONFIG, 4))
    few = DenseFeatures(some, (-1,), with_cls=True)
    assert few.numbers == [0, 8, 15, 23]
    assert torch.equal(few.read([3, 1]), DenseFeatures(train, (-1,), with_cls=True).read([23, 8]))


def test_classes_that_are_missing(sets, features, folder, tmp_path):
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\nviolet\n")
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(folder / part)
    named = open_segmentation(str(tmp_path))
    result = linear_segmentation(*stores(named, tmp_path), named, SHORT)
    assert result.details["classes_not_in_training"] == ["violet"]
    assert result.details["IoU"][3] == {"class": "violet", "IoU": None}
    plain = linear_segmentation(*features, sets, SHORT)
    assert result.scores[0].value == pytest.approx(plain.scores[0].value, abs=5)


def test_one_class_only(folder, tmp_path):
    whole = shutil.copytree(folder, tmp_path / "data")
    for file in (whole / "train/masks").iterdir():
        Image.fromarray(np.ones((80, 120), np.uint8)).save(file)
    sets = open_segmentation(str(whole), num_classes=3)
    with pytest.raises(ValueError, match="train has pixels of 1 class; a head needs at least 2 to train on"):
        linear_segmentation(*stores(sets, tmp_path), sets, SHORT)


def test_bad_masks_are_named_before_training(folder, tmp_path):
    whole = shutil.copytree(folder, tmp_path / "data")
    sets = open_segmentation(str(whole))
    train, val = stores(sets, tmp_path)
    for number in range(5):
        Image.fromarray(np.full((80, 120), 7, np.uint8)).save(whole / f"val/masks/{number:02}.png")
    sentence = r"masks of .*val cannot be used \(5\): .*00\.png has the class number 7, .*02\.png .*; and 2 more$"
    with pytest.raises(ValueError, match=sentence):
        linear_segmentation(train, val, sets, SHORT, on_progress=lambda *_: pytest.fail("trained"))


def test_features_that_are_not_of_these_images(sets, features, folder, tmp_path):
    train, val = features
    with pytest.raises(ValueError, match=r"features of .*train \(24 images.*\), not of .*val \(7 images"):
        linear_segmentation(train, val, (sets[1], sets[0]), SHORT)
    other_order = sets[1].part(reversed(range(7)))
    with pytest.raises(ValueError, match=r"features of .*val \(7 images.*\), not of .*val \(7 images"):
        linear_segmentation(train, val, (sets[0], other_order), SHORT)
    vit = small_vit()
    cropped = extract(vit, sets[0], tmp_path / "cropped", CONFIG)
    with pytest.raises(ValueError, match=r"cropped images \(crop 'center', size 64 x 64\); every pixel needs"):
        fit_segmentation(cropped, sets[0], SHORT)
    odd = extract(vit, sets[0], tmp_path / "odd", preprocess=dataclasses.replace(
        dense_preprocess(vit.preprocess, 64, 88), multiple_of=16))  # fmt: skip
    with pytest.raises(ValueError, match=r"multiples of the patch size"):
        fit_segmentation(odd, sets[0], SHORT)
    without = extract(vit, sets[0], tmp_path / "without", FeaturesConfig(patches=0), preprocess=train.preprocess)
    with pytest.raises(ValueError, match="holds no patch tokens"):
        fit_segmentation(without, sets[0], SHORT)
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1, or None for 32 epochs"):
        fit_segmentation(train, sets[0], dataclasses.replace(SHORT, steps=0))


def test_features_that_are_not_finite(sets, features, tmp_path):
    train, _ = stores(sets, tmp_path)
    spoil_first_value(train.path, "patches_2")
    with pytest.raises(ValueError, match="train-1 holds features that are not finite; run the feature pass again"):
        fit_segmentation(train, sets[0], SHORT)


def test_targets_are_resized_to_the_nearest_pixel(sets):
    read = read_targets(sets[1], [3, 0], (33, 50))
    for found, number in zip(read, (3, 0), strict=True):
        whole = torch.from_numpy(sets[1].target(number))[None, None].float()
        theirs = functional.interpolate(whole, (33, 50), mode="nearest-exact")[0, 0]
        np.testing.assert_array_equal(found, theirs.numpy().astype(np.uint8))


def test_the_learning_rate_rises_and_falls_to_zero(sets, features, monkeypatch):
    """Warm-up times decay, as mmsegmentation's poly schedule of power 1."""
    rates, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    fit_segmentation(features[0], sets[0], dataclasses.replace(SHORT, steps=20, warmup=0.2))
    expected = [1e-3 * min(1, (i + 1) / 4) * (1 - i / 20) for i in range(20)]
    assert rates == pytest.approx(expected)
