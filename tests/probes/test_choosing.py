"""Chosen images are of each class alike, and those that are held out, too."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from probes.dense import squares
from vitreg.images import ImageSet, open_depth, open_image_set
from vitreg.probes.choosing import choose, hold_out


def test_chosen_images_are_of_each_class_alike(test_data):
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

    def image(self, index: int) -> Image.Image:
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
    assert len(names) == len(images), "no image is lost, and none in both"


def test_parts_keep_their_targets(tmp_path):
    train, _ = open_depth(str(squares(tmp_path)))
    some = choose(train, 5)
    assert len(some) == 5
    positions = [next(i for i in range(len(train)) if train.name(i) == some.name(j)) for j in range(5)]
    for j, i in enumerate(positions):
        np.testing.assert_array_equal(some.target(j), train.target(i))
