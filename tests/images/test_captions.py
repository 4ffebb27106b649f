"""captions.csv, on Flickr8k."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest

from vitreg.images import ImageError, open_image_set, read_image


@pytest.fixture
def flickr(test_data, tmp_path):
    """A copy of three images; a row of the first comes last."""
    with (test_data / "flickr8k-1k/captions.csv").open(newline="") as file:
        rows = [(row["image"], row["caption"]) for row in csv.DictReader(file)][:15]
    rows.append(rows.pop(2))
    (tmp_path / "images").mkdir()
    for name in {name for name, _ in rows}:
        shutil.copy(test_data / "flickr8k-1k/images" / name, tmp_path / "images")
    return write(tmp_path, rows)


def write(folder, rows, header=("image", "caption")):
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
    found = open_image_set(write(flickr, rows))
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
        open_image_set(write(tmp_path, rows, header))
