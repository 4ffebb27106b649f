"""All probes read one feature pass, and what was answered is not asked again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from probes.dense import COLUMNS, ROWS, squares
from probes.labelled import pictures_of
from probes.small import small_vit
from vitreg.images import ImageSet, open_depth, open_image_set, open_segmentation
from vitreg.model import Preprocess
from vitreg.probes.catalogue import PROBES
from vitreg.probes.evaluation import Data, choose, evaluate, hold_out, preprocessing
from vitreg.probes.linear import LinearConfig
from vitreg.probes.position_fit import PositionConfig
from vitreg.probes.reconstruction import ReconstructionConfig
from vitreg.probes.score import ProbeResult
from vitreg.probes.segmentation import SegmentationConfig
from vitreg.probes.single_token import SingleTokenConfig

LABELS = (3, 7, 20)
SIZE = (16 * ROWS, 16 * COLUMNS)
SHORT = {
    "knn": PROBES["knn"].config,
    "linear": LinearConfig(learning_rates=(0.1,), epochs=1, epoch_length=20, head_batch_size=8),
    "tokens": SingleTokenConfig(draws=1),
    "position": PositionConfig(),
    "reconstruction": ReconstructionConfig(),
}


@contextlib.contextmanager
def silent(title):
    yield lambda *_: None


@pytest.fixture(scope="module")
def classification(test_data):
    return Data("classification", pictures_of(test_data, "train", LABELS, 10), pictures_of(test_data, "val", LABELS, 6))


@pytest.fixture
def counted():
    """The small model, and how many pictures of which size went through its first block."""
    vit, seen = small_vit(), Counter()
    vit.blocks[0].register_forward_hook(lambda _, inputs, __: seen.update({inputs[0].shape[1]: inputs[0].shape[0]}))
    return vit, seen


def test_every_picture_goes_through_the_model_once(classification, counted, tmp_path):
    """Whatever the number of probes: exactly one forward pass per model and data set."""
    vit, seen = counted
    once = len(classification.train) + len(classification.val)
    found = evaluate(vit, "small", classification, {"knn": SHORT["knn"]}, tmp_path, stage=silent)
    assert set(found) == {"knn"}
    assert seen.total() == once
    found = evaluate(vit, "small", classification, SHORT, tmp_path, stage=silent)
    assert set(found) == set(SHORT)
    assert seen.total() == once
    assert {path.name.split("-")[2] for path in (tmp_path / "features").iterdir()} == {"training", "validation"}


def test_answers_are_kept(classification, tmp_path, monkeypatch):
    vit = small_vit()
    probes = {"knn": SHORT["knn"]}
    first = evaluate(vit, "small", classification, probes, tmp_path, stage=silent)["knn"]
    asked = []
    probe = PROBES["knn"]
    monkeypatch.setitem(
        PROBES, "knn", dataclasses.replace(probe, ask=lambda *args: asked.append(args) or probe.ask(*args))
    )
    again = evaluate(vit, "small", classification, probes, tmp_path, stage=silent)["knn"]
    assert not asked
    assert again.details == first.details
    for one, other in zip(first.scores, again.scores, strict=True):
        np.testing.assert_array_equal(one.sums, other.sums)
    # Other settings are another question, and so are other weights.
    evaluate(vit, "small", classification, {"knn": dataclasses.replace(SHORT["knn"], k=(3,))}, tmp_path, stage=silent)
    evaluate(small_vit(1), "small", classification, probes, tmp_path, stage=silent)
    assert len(asked) == 2


def test_several_sizes_are_passes_of_their_own(counted, tmp_path):
    """+ms reads four blocks, and the validation pictures in two more sizes."""
    vit, seen = counted
    train, val = open_segmentation(str(squares(tmp_path / "data")))
    data = Data("segmentation", train, val, SIZE)
    config = SegmentationConfig(steps=60)
    found = evaluate(
        vit, "small", data, {"segmentation": config, "segmentation-ms": config}, tmp_path / "out", stage=silent
    )
    extra = 1 + vit.num_registers
    assert seen == {
        ROWS * COLUMNS + extra: len(train) + len(val),
        **{round(ROWS * s) * round(COLUMNS * s) + extra: len(val) for s in (1.32, 1.73)},
    }
    assert found["segmentation"].details["sizes"] == [list(SIZE)]
    assert found["segmentation-ms"].details["sizes"] == [[64, 96], [80, 128], [112, 160]]
    assert found["segmentation-ms"].details["blocks"] == [0, 1, 2]
    assert sorted(found["segmentation"].predictions) == [0, 1, 2, 4, 5, 6], "six of seven, evenly spread"
    assert all(result.scores[0].value > 60 for result in found.values()), "colours are told apart"


def asked(data: Data, out: Path, **settings: Any) -> ProbeResult:
    """What the probe of a dense task says of the small model."""
    config = dataclasses.replace(PROBES[data.task].config, steps=5, **settings)
    return evaluate(small_vit(), "small", data, {data.task: config}, out, stage=silent)[data.task]


def test_another_scale_is_not_answered_with_the_figures_of_the_first(tmp_path):
    root, out = str(squares(tmp_path / "data", train=4, val=2)), tmp_path / "out"
    first, other = (asked(Data("depth", *open_depth(root, scale=scale), SIZE), out) for scale in (0.001, 0.0005))
    assert first.details["training_mean"] == pytest.approx(2 * other.details["training_mean"])
    assert first.scores[0].value != other.scores[0].value
    again = asked(Data("depth", *open_depth(root), SIZE), out)
    assert again.scores[0].value == first.scores[0].value
    assert len(list((out / "features").iterdir())) == 2, "features do not depend on targets"


def test_another_ignored_class_is_not_answered_with_the_figures_of_the_first(tmp_path):
    root, out = str(squares(tmp_path / "data", train=4, val=2)), tmp_path / "out"
    first, other = (
        asked(Data("segmentation", *open_segmentation(root, ignore=ignore), SIZE), out) for ignore in (None, 2)
    )
    assert [len(result.details["IoU"]) for result in (first, other)] == [3, 2]


@pytest.mark.parametrize("part", ["train", "val"])
def test_replaced_masks_are_not_answered_with_the_figures_of_the_first(part, tmp_path):
    """By files of the same size, at the same time."""
    root, out = squares(tmp_path / "data", train=4, val=2), tmp_path / "out"
    for path in (root / part / "masks").iterdir():
        mask = np.asarray(Image.open(path))
        path.unlink()
        Image.fromarray(mask).save(path.with_suffix(".bmp"))
    first = asked(Data("segmentation", *open_segmentation(str(root)), SIZE), out)
    for path in (root / part / "masks").iterdir():
        before, mask = path.stat(), np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 0, 1, mask)).save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
    other = asked(Data("segmentation", *open_segmentation(str(root)), SIZE), out)
    assert other.details["IoU"] != first.details["IoU"]


def test_replaced_images_are_computed_again(tmp_path):
    root, out = squares(tmp_path / "data", train=4, val=2), tmp_path / "out"
    first = asked(Data("depth", *open_depth(str(root)), SIZE), out)
    for path in (root / "val" / "images").iterdir():
        Image.fromarray(np.asarray(Image.open(path))[::-1]).save(path)
    assert asked(Data("depth", *open_depth(str(root)), SIZE), out).scores[0].value != first.scores[0].value


def test_sizes_are_whole_patches():
    vit = small_vit()
    found = preprocessing(vit, (100.0, 33.0))
    assert (found.size, found.crop, found.crop_fraction) == ((96, 32), "squash", 1.0)
    assert preprocessing(vit, (3.0, 3.0)).size == (16, 16)
    assert isinstance(preprocessing(vit, None), Preprocess)
    assert preprocessing(vit, None) == vit.preprocess


def test_chosen_pictures_are_of_each_class_alike(test_data):
    images = open_image_set(test_data / "tiny-imagenet-100" / "val.parquet")
    some = choose(images, 300)
    assert len(some) == 300
    assert set(Counter(some.labels).values()) == {3}
    assert choose(images, None) is images
    assert choose(images, 10**6) is images
    one = choose(images, 7)
    assert len(set(one.labels)) == 7


class Unequal(ImageSet):
    """Classes of 1, 2, 3, 50 and 1000 images, mixed."""

    source, classes = "unequal", tuple("abcde")

    def __init__(self) -> None:
        sizes = (1, 2, 3, 50, 1000)
        self.labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), sizes)).tolist()

    def __len__(self) -> int:
        return 1056

    def picture(self, index: int) -> Image.Image:
        raise AssertionError

    def name(self, index: int) -> str:
        return str(index)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(3, {1}), (5, {1}), (10, {1, 2, 3}), (20, {1, 2, 3, 7}), (156, {1, 2, 3, 50, 100}), (1055, {1, 2, 3, 50, 999})],
)
def test_as_many_of_each_class_are_chosen_not_a_share_of_each(count, expected):
    some = choose(Unequal(), count)
    counts = Counter(some.labels)
    assert len(some) == count == len({some.name(i) for i in range(count)})
    assert set(counts.values()) == expected
    names = [int(some.name(i)) for i in range(count)]
    assert names == sorted(names)
    if count > 100:  # those of a large class are from all over the set
        large = np.array([n for n, label in zip(names, some.labels, strict=True) if label == 4])
        assert np.diff(large).max() < 3 * 1056 / len(large) + 10


def test_no_class_loses_its_only_image_to_validation():
    train, val = hold_out(Unequal())
    assert Counter(train.labels) == {0: 1, 1: 2, 2: 2, 3: 40, 4: 800}
    assert Counter(val.labels) == {2: 1, 3: 10, 4: 200}
    assert len({part.name(i) for part in (train, val) for i in range(len(part))}) == 1056


def test_every_fifth_is_held_out(test_data):
    images = open_image_set(test_data / "tiny-imagenet-100" / "val.parquet")
    train, val = hold_out(images)
    assert len(val) * 4 == len(train)
    assert set(Counter(val.labels).values()) == {len(images) // 500}
    names = {part.name(i) for part in (train, val) for i in range(len(part))}
    assert len(names) == len(images), "no picture is lost, and none in both"


def test_parts_keep_their_targets(tmp_path):
    train, _ = open_depth(str(squares(tmp_path)))
    some = choose(train, 5)
    assert len(some) == 5
    positions = [next(i for i in range(len(train)) if train.name(i) == some.name(j)) for j in range(5)]
    for j, i in enumerate(positions):
        np.testing.assert_array_equal(some.target(j), train.target(i))
