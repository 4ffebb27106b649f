"""Folders of images, with and without classes, and captions.csv on Flickr8k."""

from __future__ import annotations

import csv
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from vitreg.images import ImageError, open_image_set, read_image


@pytest.fixture
def tree(tmp_path, photographs):
    """Eight ImageNet photographs in ImageNet's layout: four classes, one of them nested deeper."""
    for number, path in enumerate(photographs[:8]):
        folder = tmp_path / "tree" / f"n{number % 4:02}" / ("deeper" if number % 4 == 1 else "")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    (tmp_path / "tree" / "readme.txt").write_text("no image")
    return tmp_path / "tree"


def test_class_folders_have_torchvisions_labels_and_images(tree):
    found, peer = open_image_set(tree), ImageFolder(str(tree), is_valid_file=lambda path: path.endswith(".jpg"))
    assert found.classes == ("n00", "n01", "n02", "n03")
    assert found.labels is not None
    ours = sorted((found.name(i), found.labels[i]) for i in range(len(found)))
    assert ours == sorted(peer.samples)
    for index in (0, 3, 7):
        expected = Image.open(found.name(index)).convert("RGB")
        np.testing.assert_array_equal(np.asarray(found.image(index)), np.asarray(expected))


def test_numbered_classes_are_sorted_as_text_like_torchvisions(tree, tmp_path):
    for number in (2, 10, 1):
        shutil.copytree(tree / "n00", tmp_path / "numbered" / str(number))
    found = open_image_set(tmp_path / "numbered")
    assert list(found.classes) == ImageFolder(str(tmp_path / "numbered")).classes == ["1", "10", "2"]


def test_hidden_folders_are_no_classes(tree):
    (tree / ".cache").mkdir()
    assert open_image_set(tree).classes == ("n00", "n01", "n02", "n03")


def test_linked_class_folders_are_followed(tree):
    os.symlink(tree / "n00", tree / "n04", target_is_directory=True)
    found = open_image_set(tree)
    assert found.classes[-1] == "n04"
    assert len(found) == 10


def test_empty_class_folder_is_named(tree):
    (tree / "n02b").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*n02b holds no image; put some in it or remove the folder"):
        open_image_set(tree)


def test_images_without_class_folders_have_no_labels(test_data, photographs, tmp_path):
    found = open_image_set(test_data / "imagenet-samples")
    assert (len(found), found.classes, found.labels) == (1000, (), None)
    assert found.captions(0) == ()
    np.testing.assert_array_equal(np.asarray(found.image(999)), np.asarray(read_image(found.name(999))))
    for folder in ("one", "mixed/a", "mixed/b"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(photographs[0], tmp_path / folder)
    shutil.copy(photographs[0], tmp_path / "mixed")
    assert open_image_set(tmp_path / "one").labels is None
    mixed = open_image_set(tmp_path / "mixed")
    assert (len(mixed), mixed.labels) == (3, None)


def test_names_that_are_not_utf_8_are_read(tmp_path, photographs):
    name = os.fsencode(tmp_path) + b"/\xff\xe9.jpg"
    shutil.copy(photographs[0], name)
    found = open_image_set(tmp_path)
    assert os.fsencode(found.name(0)) == name
    assert found.image(0).mode == "RGB"


def test_broken_image_is_named_when_it_is_read(tree):
    found = open_image_set(tree)
    with open(found.name(5), "r+b") as file:
        file.truncate(1000)
    assert found.image(4).mode == "RGB"
    with pytest.raises(ImageError, match=r"n02.*\.jpg is damaged"):
        found.image(5)
    with pytest.raises(IndexError):
        found.image(8)


def test_folder_without_images_says_what_it_could_hold(tmp_path):
    with pytest.raises(ValueError, match=r"holds no image; expected class folders, .*captions\.csv"):
        open_image_set(tmp_path)


@pytest.fixture
def flickr(test_data, tmp_path):
    """A copy of three images; a row of the first comes last."""
    with (test_data / "flickr8k-1k/captions.csv").open(newline="") as file:
        rows = [(row["image"], row["caption"]) for row in csv.DictReader(file)][:15]
    rows.append(rows.pop(2))
    (tmp_path / "images").mkdir()
    for name in {name for name, _ in rows}:
        shutil.copy(test_data / "flickr8k-1k/images" / name, tmp_path / "images")
    return write_captions(tmp_path, rows)


def write_captions(folder, rows, header=("image", "caption")):
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


def test_every_image_has_its_captions(test_data):
    found = open_image_set(test_data / "flickr8k-1k")
    expected: dict[str, list[str]] = {}
    with (test_data / "flickr8k-1k/captions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            expected.setdefault(row["image"], []).append(row["caption"].strip())
    assert len(found) == 1000
    assert (found.classes, found.labels) == ((), None)
    assert [list(found.captions(i)) for i in range(1000)] == list(expected.values())
    names = [test_data / "flickr8k-1k/images" / name for name in expected]
    assert [found.name(i) for i in range(1000)] == list(map(str, names))
    np.testing.assert_array_equal(np.asarray(found.image(77)), np.asarray(read_image(names[77])))


def test_rows_of_a_image_need_not_follow_each_other_and_the_file_may_be_named(flickr):
    folder, file = open_image_set(flickr), open_image_set(flickr / "captions.csv")
    assert len(folder) == len(file) == 3
    assert [len(folder.captions(i)) for i in (0, 1, 2)] == [5, 5, 5]
    assert folder.captions(0) == file.captions(0)
    assert folder.captions(-1) == folder.captions(2)


def test_images_may_be_relative_to_the_file(flickr):
    (flickr / "images").rename(flickr / "photos")
    with (flickr / "captions.csv").open(newline="") as file:
        rows = [(f"photos/{row['image']}", row["caption"]) for row in csv.DictReader(file)]
    found = open_image_set(write_captions(flickr, rows))
    assert found.image(0).mode == "RGB"


def test_missing_images(flickr):
    found = open_image_set(flickr)
    names = [found.name(i) for i in range(3)]
    for name in names[1:]:
        (flickr / "images" / name).unlink()
    found = open_image_set(flickr)
    assert found.image(0).mode == "RGB"
    with pytest.raises(ImageError, match=r"images/.*\.jpg cannot be read"):
        found.image(1)
    (flickr / "images" / names[0]).unlink()
    with pytest.raises(ValueError, match=r"none of the 3 images of .*captions\.csv exists \(1000268201_693b08cb0e"):
        open_image_set(flickr)


def test_captions_in_latin_1(flickr):
    text = (flickr / "captions.csv").read_text() + "a.jpg,un café\n"
    (flickr / "captions.csv").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"captions\.csv is not in UTF-8 \(it has the byte 0xe9\); save it as UTF-8$"):
        open_image_set(flickr)
    (flickr / "captions.csv").write_text(text, encoding="utf-8-sig")
    assert len(open_image_set(flickr)) == 4


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([("a.jpg", "x")], ("file", "caption"), "its header has no image"),
        ([("a.jpg", "x"), ("b.jpg", " ")], ("image", "caption"), "line 3 has no image or no caption"),
        ([("a.jpg", "a dog", " a cat")], ("image", "caption"), "line 2 has too many fields"),
        ([], ("image", "caption"), "has no rows"),
    ],
)
def test_malformed_rows_are_named(tmp_path, rows, header, message):
    with pytest.raises(ValueError, match=message):
        open_image_set(write_captions(tmp_path, rows, header))
