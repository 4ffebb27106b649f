"""The pictures of object discovery, read back from their pixels."""

import numpy as np
import pytest

from vitreg.report import discovery_overlay, sweep_figure
from vitreg.report.discovery import BOX, SEED


def overlay(photo, **changes):
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 2:4] = True
    degree = np.full((4, 5), 10)
    degree[2, 3] = 1
    options = {"boxes": [(32, 16, 64, 48)], "seed": (2, 3), "mask": mask, "degree": degree} | changes
    return np.array(discovery_overlay(photo, patch_size=16, title="title", **options))


def test_box_seed_mask_and_degree_are_where_they_belong():
    photo = np.full((64, 80, 3), 128, np.uint8)
    sheet = overlay(photo)
    top = 26
    left, right = sheet[top : top + 64, :80], sheet[top : top + 64, 86:166]
    for side in (left, right):
        assert (side[16, 32:64] == BOX).all()
        assert (side[47, 32:64] == BOX).all()
        assert (side[16:48, 32] == BOX).all()
        assert (side[16:48, 63] == BOX).all()
        assert tuple(side[40, 56]) == SEED
    assert (left[:16] == 128).all()
    inside = left[20:30, 36:46]
    assert (inside[..., 2] > inside[..., 0]).all()
    # The lowest degree is the brightest patch.
    assert right[33, 50].sum() > 600 > right[4, 4].sum()
    assert len(np.unique(right[:16, :80].reshape(-1, 3), axis=0)) == 1


def test_patches_reach_beyond_the_photograph():
    assert overlay(np.zeros((60, 70, 3), np.uint8)).shape == (60 + 52, 2 * 70 + 6, 3)


def test_large_photographs_are_drawn_smaller():
    degree = np.arange(200 * 220).reshape(200, 220)
    options = {"mask": np.ones((200, 220), bool), "degree": degree, "seed": (100, 100), "boxes": [(0, 0, 3520, 3200)]}
    assert overlay(np.zeros((3200, 3520, 3), np.uint8), **options).shape == (1067 + 52, 2 * 1174 + 6, 3)


def test_equal_degrees_are_drawn():
    assert overlay(np.zeros((64, 80, 3), np.uint8), degree=np.full((4, 5), 19)).any()


@pytest.mark.parametrize("num_models", [1, 3])
@pytest.mark.parametrize("num_settings", [0, 1, 100])
def test_sweep_figure_is_written(tmp_path, read_png, num_models, num_settings):
    share = {"corloc": 40.0, "interval": [31.0, 48.0], "num_images": 100}
    entry = {"name": "keys of block -1, raw", "corloc": 100.0, "interval": [100.0, 100.0]}
    model = {"model": "a_$b$", "protocol": share, "mean": share, "settings": [entry] * num_settings}
    summary = {
        "data": "yolo:$x_y$",
        "num_images": 100,
        "whole_picture": share,
        "models": [model if num_settings else {"model": "m", "protocol": share}] * num_models,
    }
    assert read_png(sweep_figure(summary, tmp_path / "made" / "sweep.png")).std() > 10
