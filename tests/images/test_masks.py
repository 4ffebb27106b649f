"""Sets with masks: what the numbers mean in each, and what is said of files that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCSegmentation

from images.dense_folders import image, mask, mask_folder
from vitreg.images import IGNORED, ImageError, open_segmentation


@pytest.fixture
def folder(tmp_path):
    return mask_folder(tmp_path)


def test_camvid(test_data):
    train, val = open_segmentation(str(test_data / "camvid"), ignore=11)
    assert (len(train), len(val)) == (367, 101)
    assert train.class_names == val.class_names == tuple(map(str, range(11)))
    file = test_data / "camvid" / "val" / "masks" / "0016E5_07959.png"
    index = next(i for i in range(101) if val.target_name(i) == str(file))
    assert val.name(index).endswith("val/images/0016E5_07959.jpg")
    raw, target = np.asarray(Image.open(file)), val.target(index)
    assert target.dtype == np.uint8
    assert target.shape == raw.shape == (val.image(index).height, val.image(index).width)
    np.testing.assert_array_equal(target, np.where(raw == 11, IGNORED, raw))
    assert (raw == 11).any()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.csv", "label,name\n3,wall\n0,Void\n1,road\n"),
        ("classes.txt", "unlabeled\nroad\nignore\nwall\n"),
    ],
)
def test_a_file_says_what_numbers_mean(folder, file, text):
    (folder / file).write_text(text)
    mask(folder / "val/masks/e.png", (0, 1, 3, 255))
    _, val = open_segmentation(str(folder))
    assert val.class_names == ("road", "wall")
    assert val.target(0)[0, :4].tolist() == [IGNORED, 0, 1, IGNORED]


def test_without_names_classes_are_those_of_the_training_masks(folder):
    mask(folder / "train/masks/c.png", (0, 4, 9, 255))
    mask(folder / "val/masks/f.png", (4, 5))
    assert len(open_segmentation(str(folder))[0].class_names) == 10
    train, val = open_segmentation(str(folder), ignore=9)
    assert len(train.class_names) == 5
    assert train.target(2)[0, :4].tolist() == [0, 4, IGNORED, IGNORED]
    with pytest.raises(ImageError, match=r"val/masks/f\.png has the class number 5, but the 5 classes are 0 to 4"):
        val.target(1)
    assert val.with_classes(dict(enumerate(train.class_names))).class_names == train.class_names
    assert len(open_segmentation(str(folder), num_classes=30)[1].class_names) == 30


@pytest.mark.parametrize("ignored", [0, 1, 2, 3, 255])
def test_any_number_can_be_ignored_without_names(folder, ignored):
    mask(folder / "train/masks/c.png", (0, 1, 2, 3, 255))
    train, val = open_segmentation(str(folder), ignore=ignored)
    counted = [number for number in range(4) if number != ignored]
    assert train.class_names == val.class_names == tuple(map(str, counted))
    expected = [counted.index(number) if number in counted else IGNORED for number in (0, 1, 2, 3, 255)]
    assert train.target(2)[0, :5].tolist() == expected


@pytest.mark.parametrize("ignored", [-1, 256])
def test_a_number_that_no_mask_can_hold_cannot_be_ignored(folder, ignored):
    with pytest.raises(ValueError, match=f"ignore is {ignored}; numbers in masks are 0 to 255"):
        open_segmentation(str(folder), ignore=ignored)


def test_an_empty_line_does_not_shift_the_names_of_classes(folder):
    (folder / "classes.txt").write_text("road\n\nwall\n\n")
    mask(folder / "val/masks/e.png", (0, 2))
    _, val = open_segmentation(str(folder))
    assert val.class_names == ("road", "wall")
    assert val.target(0)[0, :2].tolist() == [0, 1]


def test_masks_of_palettes_two_colors_and_16_bits(folder):
    numbers = np.array([[0, 1], [1, 0]], np.uint8).repeat(15, 0).repeat(20, 1)
    palette = Image.fromarray(numbers, "P")
    palette.putpalette([200, 0, 0, 0, 200, 0])
    for name, made in (("a", palette), ("b", Image.fromarray(numbers * 255).convert("1"))):
        made.save(folder / f"train/masks/{name}.png")
    Image.fromarray(numbers.astype(np.uint16)).save(folder / "train/masks/c.png")
    Image.fromarray(numbers.astype(np.uint16) * 256).save(folder / "train/masks/d.png")
    train, _ = open_segmentation(str(folder), num_classes=2)
    for index in range(3):
        np.testing.assert_array_equal(train.target(index), numbers)
    with pytest.raises(ImageError, match=r"d\.png has the class number 256"):
        train.target(3)


def test_a_part_keeps_pairs_together(test_data):
    _, val = open_segmentation(str(test_data / "camvid"), num_classes=11, ignore=11)
    part = val.part([5, 2])
    assert len(part) == 2
    for mine, theirs in ((0, 5), (1, 2)):
        assert part.name(mine) == val.name(theirs)
        np.testing.assert_array_equal(part.target(mine), val.target(theirs))


def test_unpaired_files_are_named(folder):
    for name in "abcd":
        (folder / f"train/masks/{name}.png").unlink()
    mask(folder / "train/masks/x.png")
    with pytest.raises(ValueError, match=r"^images have no partner in .* \(4\): .*a\.jpg; .*c\.jpg; and 1 more$"):
        open_segmentation(str(folder))
    for name in "abcd":
        mask(folder / f"train/masks/{name}.png")
    with pytest.raises(ValueError, match=r"^files have no image in .*train/images \(1\): .*x\.png$"):
        open_segmentation(str(folder))
    (folder / "train/masks/x.png").unlink()
    image(folder / "train/images/a.png")
    with pytest.raises(ValueError, match=r"have the name of another \(1\): .*a\."):
        open_segmentation(str(folder))


def test_masks_that_do_not_fit_are_named(folder):
    mask(folder / "val/masks/e.png", size=(30, 40))
    Image.new("RGB", (40, 30)).save(folder / "val/masks/f.png")
    with pytest.raises(ValueError, match=r"^masks of .* \(2\)") as raised:
        open_segmentation(str(folder))
    assert "e.png is 30 x 40, its image 40 x 30 pixels" in str(raised.value)
    assert "f.png is of mode RGB, not one channel of class numbers" in str(raised.value)


def test_masks_that_cannot_be_read_are_named(folder):
    (folder / "val/masks/e.png").write_bytes(b"no mask")
    with pytest.raises(ValueError, match=r"e\.png cannot be read \(it is not an image\)"):
        open_segmentation(str(folder))
    mask(folder / "val/masks/e.png")
    whole = (folder / "train/masks/b.png").read_bytes()
    # The header is whole, the pixels are not.
    (folder / "train/masks/b.png").write_bytes(whole[:45] + b"\0" * 12)
    with pytest.raises(ValueError, match=r"masks of .*train cannot be used \(1\): .*b\.png is damaged"):
        open_segmentation(str(folder))
    train, _ = open_segmentation(str(folder), num_classes=2)
    with pytest.raises(ImageError, match=r"b\.png is damaged \(.*\); replace it"):
        train.target(1)


@pytest.mark.parametrize(
    ("names", "options", "sentence"),
    [
        ("", {"num_classes": 1}, "num_classes is 1; it must be 2 to 255"),
        ("label,name\n0,road\n1,wall\n", {"num_classes": 2}, "names its classes; leave out num_classes"),
        ("label,name\n0,road\n0,wall\n", {}, "classes.csv is malformed: label '0' is named twice"),
        (
            "number,name\n0,road\n",
            {},
            "classes.csv is malformed: its header has no label; expected rows of `label,name`",
        ),
        ("label,name\n0,road\n1,void\n", {}, "has 1 class; segmentation needs at least 2"),
    ],
)
def test_classes_that_are_wrong(folder, names, options, sentence):
    if names:
        (folder / "classes.csv").write_text(names)
    with pytest.raises(ValueError, match=sentence):
        open_segmentation(str(folder), **options)


def test_folders_that_are_not_there(folder, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder; give one with train/ and val/, or ade20k"):
        open_segmentation(str(tmp_path / "nowhere"))
    (folder / "val/masks").rename(folder / "val/labels")
    with pytest.raises(ValueError, match=r"val/masks is not a folder; expected images and masks side by side"):
        open_segmentation(str(folder))
    with pytest.raises(ValueError, match=r"ADEChallengeData2016 does not exist; give the folder that holds"):
        open_segmentation(f"ade20k:{folder}")
    with pytest.raises(ValueError, match=r"train\.txt does not exist; give the folder that holds VOCdevkit"):
        open_segmentation(f"voc2012:{folder}")


def test_ade20k_as_released(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for part, number in (("training", 2), ("validation", 1)):
        for i in range(number):
            image(root / "images" / part / f"ADE_{i}.jpg")
            mask(root / "annotations" / part / f"ADE_{i}.png", (0, 1, 150))
    train, val = open_segmentation(f"ade20k:{tmp_path}")
    assert (len(train), len(val), len(train.class_names)) == (2, 1, 150)
    assert val.target(0)[0, :3].tolist() == [IGNORED, 0, 149]
    rows = [f"{i}\t0.1\t10\t1\tthing {i}, other" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "\n".join(rows))
    assert open_segmentation(f"ade20k:{tmp_path}")[0].class_names[149] == "thing 150, other"
    mask(root / "annotations/validation/ADE_0.png", (151,))
    with pytest.raises(ImageError, match="has the class number 151, but the 150 classes are 1 to 150"):
        val.target(0)
    with pytest.raises(ValueError, match="ade20k has classes of its own"):
        open_segmentation(f"ade20k:{tmp_path}", num_classes=150)


def test_voc2012_as_torchvision_reads_it(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for part, names in (("train", ("2007_1", "2007_2")), ("val", ("2007_3",))):
        (root / f"ImageSets/Segmentation/{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            image(root / f"JPEGImages/{name}.jpg")
            numbers = Image.open(mask(root / f"SegmentationClass/{name}.png", (0, 20, 255)))
            numbers.putpalette([i // 3 for i in range(768)])
            numbers.save(root / f"SegmentationClass/{name}.png")
    for part, found in zip(("train", "val"), open_segmentation(f"voc2012:{tmp_path}"), strict=True):
        theirs = VOCSegmentation(str(tmp_path), "2012", part)
        assert [found.name(i) for i in range(len(found))] == theirs.images
        assert found.class_names[20] == "tvmonitor"
        for i, (_, target) in enumerate(theirs):
            np.testing.assert_array_equal(found.target(i), np.asarray(target))
    (root / "SegmentationClass/2007_2.png").unlink()
    with pytest.raises(ValueError, match=r"files of .*train\.txt do not exist \(1\): .*2007_2\.png"):
        open_segmentation(f"voc2012:{tmp_path}")
