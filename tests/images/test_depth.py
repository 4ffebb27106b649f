"""Sets with depth: meters and holes, and what is said of files that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from images.dense_folders import depth_folder, depth_map, image
from vitreg.images import ImageError, open_depth


def test_kitchen_in_meters(test_data):
    train, val = open_depth(str(test_data / "kitchen-depth"))
    assert (len(train), len(val)) == (140, 60)
    raw, meters = np.asarray(Image.open(val.target_name(7))), val.target(7)
    assert meters.dtype == np.float32
    assert meters.shape == (480, 640)
    np.testing.assert_allclose(meters, raw / 1000, rtol=1e-6)
    assert np.median(meters[meters > 0]) == pytest.approx(1.7, abs=0.5)
    assert (meters == 0).any()


def test_another_scale(tmp_path):
    train, _ = open_depth(str(depth_folder(tmp_path)), scale=1 / 256)
    assert train.target(0)[1, 1] == pytest.approx(1500 / 256)
    assert train.target(0)[0, 0] == 0
    assert train.part([1]).scale == 1 / 256
    with pytest.raises(ValueError, match=r"scale is 1000.0; it must be the meters in one step, such as 0.001"):
        open_depth(str(tmp_path), scale=1000.0)


def test_maps_that_do_not_fit_are_named(tmp_path):
    folder = depth_folder(tmp_path)
    Image.new("L", (40, 30)).save(folder / "train/depth/a.png")
    with pytest.raises(ValueError, match=r"depth maps of .* \(1\): .*a\.png is of mode L, not one channel of 16 bits$"):
        open_depth(str(folder))
    depth_map(folder / "train/depth/a.png", size=(41, 30))
    with pytest.raises(ValueError, match=r"a\.png is 41 x 30, its image 40 x 30 pixels"):
        open_depth(str(folder))
    (folder / "train/depth/a.png").unlink()
    with pytest.raises(ValueError, match=r"images have no partner in .*train/depth \(1\): .*a\.jpg$"):
        open_depth(str(folder))


def test_a_map_that_is_all_holes_is_named(tmp_path):
    folder = depth_folder(tmp_path)
    Image.fromarray(np.zeros((30, 40), np.uint16)).save(folder / "val/depth/c.png")
    _, val = open_depth(str(folder))
    with pytest.raises(ImageError, match=r"c\.png is all holes \(0 everywhere\); leave it and its image out"):
        val.target(0)


def test_nyu_as_exported_for_bts(tmp_path):
    lines = {"train": ["/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579"], "test": []}
    lines["test"] = ["bathroom/rgb_00001.jpg bathroom/sync_depth_00001.png 518.8579"]
    for part, listed in lines.items():
        (tmp_path / f"nyu_{part}.txt").write_text("\n".join(listed))
    image(tmp_path / "kitchen_0028b/rgb_00045.jpg")
    depth_map(tmp_path / "kitchen_0028b/sync_depth_00045.png", 2500)
    image(tmp_path / "bathroom/rgb_00001.jpg")
    with pytest.raises(ValueError, match=r"files of .*nyu_test.txt do not exist \(1\): .*sync_depth_00001\.png$"):
        open_depth(f"nyu:{tmp_path}")
    depth_map(tmp_path / "bathroom/sync_depth_00001.png")
    train, val = open_depth(f"nyu:{tmp_path}")
    assert train.eigen_crop
    assert val.part([0]).eigen_crop
    assert train.name(0) == str(tmp_path / "kitchen_0028b/rgb_00045.jpg")
    assert train.target(0)[1, 1] == 2.5
    assert len(val) == 1
    (tmp_path / "nyu_train.txt").write_text("alone.jpg\n")
    with pytest.raises(ValueError, match=r"nyu_train.txt is malformed: 'alone.jpg' is not an image and its depth"):
        open_depth(f"nyu:{tmp_path}")
    (tmp_path / "nyu_train.txt").unlink()
    with pytest.raises(ValueError, match=r"nyu_train.txt does not exist; give the folder that holds the scenes"):
        open_depth(f"nyu:{tmp_path}")
