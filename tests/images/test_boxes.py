"""Data sets with boxes: what each format means, and what is wrong with bad files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCDetection

from vitreg.images import image_size, open_box_set

VOC_OBJECT = (
    "<object><name>dog</name><truncated>{truncated}</truncated><difficult>{difficult}</difficult>"
    "<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"
)


def image(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/trainval.txt").write_text("000005\n000007\n")
    objects = [
        VOC_OBJECT.format(1, 2, 40, 30, truncated=0, difficult=0),
        VOC_OBJECT.format(5, 6, 7.5, 8, truncated=1, difficult=1),
    ]
    for name, body in (("000005", "".join(objects)), ("000007", "")):
        image(root / "JPEGImages" / f"{name}.jpg")
        (root / f"Annotations/{name}.xml").write_text(f"<annotation><filename>{name}.jpg</filename>{body}</annotation>")
    return tmp_path


def test_voc_counts_difficult_and_truncated_objects_from_pixel_0(voc):
    found = open_box_set(f"voc2007:{voc}")
    assert [image.path.name for image in found.images] == ["000005.jpg", "000007.jpg"]
    np.testing.assert_array_equal(found.images[0].boxes, [[0, 1, 40, 30], [4, 5, 7.5, 8]])
    assert found.images[1].boxes.shape == (0, 4)
    assert [str(image.path) for image in found.images] == VOCDetection(str(voc), "2007", "trainval").images


def test_voc_says_where_it_looks(voc):
    with pytest.raises(
        ValueError, match=r"VOC2012.*trainval\.txt does not exist; give the folder that holds VOCdevkit"
    ):
        open_box_set(f"voc2012:{voc}")
    (voc / "VOCdevkit/VOC2007/Annotations/000005.xml").write_text("<annotation><obj")
    with pytest.raises(ValueError, match=r"000005\.xml is malformed"):
        open_box_set(f"voc2007:{voc}")


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "annotations").mkdir()
    names = [f"COCO_train2014_{number:012}.jpg" for number in (9, 25, 30)]
    annotations = {
        "images": [{"id": int(name[-16:-4]), "file_name": name} for name in names],
        "annotations": [
            {"image_id": 25, "bbox": [1.4, 2.6, 10.2, 20.0], "iscrowd": 0},
            {"image_id": 25, "bbox": [0, 0, 40, 30], "iscrowd": 1},
            {"image_id": 9, "bbox": [0, 0, 1, 1], "iscrowd": 0},
        ],
    }
    (tmp_path / "annotations/instances_train2014.json").write_text(json.dumps(annotations))
    (tmp_path / "coco_20k_filenames.txt").write_text(f"train2014/{names[1]}\n30\n")
    for name in names:
        image(tmp_path / "train2014" / name)
    return tmp_path


def test_coco20k_takes_the_listed_images_without_crowds(coco):
    found = open_box_set(f"coco20k:{coco}")
    assert [image.path.name[-6:] for image in found.images] == ["25.jpg", "30.jpg"]
    np.testing.assert_array_equal(found.images[0].boxes, [[1, 3, 12, 23]])
    assert found.images[1].boxes.shape == (0, 4)


def test_coco20k_errors(coco):
    (coco / "coco_20k_filenames.txt").write_text("train2014/COCO_train2014_000000000031.jpg")
    with pytest.raises(ValueError, match=r"000000000031\.jpg', which instances_train2014"):
        open_box_set(f"coco20k:{coco}")
    (coco / "coco_20k_filenames.txt").unlink()
    with pytest.raises(ValueError, match="does not exist; it comes with the code of LOST"):
        open_box_set(f"coco20k:{coco}")
    (coco / "annotations/instances_train2014.json").write_text('{"images": [{}]}')
    with pytest.raises(ValueError, match="is malformed: KeyError"):
        open_box_set(f"coco20k:{coco}")


@pytest.fixture
def yolo(tmp_path):
    for name in ("a.jpg", "b.png", "sub/c.jpg"):
        image(tmp_path / "images" / name)
    (tmp_path / "labels/sub").mkdir(parents=True)
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 1 1\n\n3 0.25 0.5 0.5 0.2\n")
    (tmp_path / "labels/sub/c.txt").write_text("")
    (tmp_path / "labels/classes.txt").write_text("dog\ncat\n")
    return tmp_path


def test_yolo_boxes_are_relative_to_the_image(yolo):
    found = open_box_set(f"yolo:{yolo}")
    assert [image.path.name for image in found.images] == ["a.jpg", "b.png", "c.jpg"]
    np.testing.assert_allclose(found.images[0].boxes, [[0, 0, 40, 30], [0, 12, 20, 18]])
    assert all(image.boxes.shape == (0, 4) for image in found.images[1:])
    assert found.missing == ()


def test_yolo_labels_without_a_image_are_missing(yolo):
    (yolo / "labels/gone.txt").write_text("0 0.5 0.5 1 1")
    found = open_box_set(f"yolo:{yolo}")
    assert len(found.images) == 3
    assert [path.stem for path in found.missing] == ["gone"]


def test_yolo_errors(yolo):
    (yolo / "labels/a.txt").write_text("0 0.5 0.5 1\n")
    with pytest.raises(ValueError, match=r"a\.txt is malformed: row '0 0.5 0.5 1' is not `class cx cy w h`"):
        open_box_set(f"yolo:{yolo}")
    with pytest.raises(ValueError, match="images is not a folder; a YOLO folder holds images/ and labels/"):
        open_box_set(f"yolo:{yolo / 'labels'}")


def test_coco128_of_the_real_data(coco128):
    found = open_box_set(f"yolo:{coco128}")
    assert len(found.images) == 128
    assert sum(len(image.boxes) > 0 for image in found.images) == 126
    # This copy has labels of two images that it lacks.
    assert len(found.missing) == 2
    for image in found.images[:10]:
        height, width = image_size(image.path)
        assert (image.boxes >= -1).all()
        assert (image.boxes <= [width + 1, height + 1, width + 1, height + 1]).all()


def test_json(tmp_path):
    image(tmp_path / "p/a.jpg")
    file = tmp_path / "set.json"
    file.write_text(json.dumps([{"image": "p/a.jpg", "boxes": [[1, 2, 3, 4.5]]}, {"image": "p/gone.jpg"}]))
    found = open_box_set(f"json:{file}")
    np.testing.assert_array_equal(found.images[0].boxes, [[1, 2, 3, 4.5]])
    assert found.missing == (tmp_path / "p/gone.jpg",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is malformed: JSONDecodeError"),
        ("{}", "expected a list"),
        ('[{"boxes": []}]', 'entry 0 has no "image"'),
        ('[{"image": "a.jpg", "boxes": [[1, 2], [3, 4]]}]', "entry 0 is malformed: boxes must be rows of four"),
        ('[{"image": "a.jpg", "boxes": [[1, 2, 3, NaN]]}]', "four finite numbers"),
        ('[{"image": "a.jpg", "boxes": 3}]', "four finite numbers"),
        ('[{"image": "a.jpg", "boxes": [[3, 3, 1, 9]]}]', "entry 0 is malformed: a box ends before it begins"),
        ('[{"image": "a.jpg"}, {"image": "a.jpg"}]', "names an image twice"),
        ('[{"image": "b.jpg"}]', r"has no images; .*b\.jpg does not exist"),
        ("[]", "has no images$"),
    ],
)
def test_json_errors(tmp_path, content, message):
    image(tmp_path / "a.jpg")
    (tmp_path / "set.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_box_set(f"json:{tmp_path / 'set.json'}")


@pytest.mark.parametrize("source", ["coco128", "voc2010:x", "/some/folder"])
def test_unknown_kind(source):
    with pytest.raises(ValueError, match="is unknown; give one of voc2007:PATH"):
        open_box_set(source)


def test_missing_file():
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
        open_box_set("json:nowhere.json")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_image_size_is_that_of_the_upright_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    from vitreg.images import read_image

    upright = read_image(tmp_path / "a.jpg")
    assert image_size(tmp_path / "a.jpg") == (upright.height, upright.width)
