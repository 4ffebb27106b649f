"""The images of object discovery, read back from their pixels."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import ImageDraw

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
    assert overlay(np.zeros((60, 70, 3), np.uint8)).shape == (60 + 78, 334, 3)


def test_large_photographs_are_drawn_smaller():
    degree = np.arange(200 * 220).reshape(200, 220)
    options = {"mask": np.ones((200, 220), bool), "degree": degree, "seed": (100, 100), "boxes": [(0, 0, 3520, 3200)]}
    assert overlay(np.zeros((3200, 3520, 3), np.uint8), **options).shape == (1067 + 78, 2 * 1174 + 6, 3)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (32, 320), (320, 32)])
def test_captions_of_portraits_were_clipped(monkeypatch, height, width):
    """What is written lies within the sheet, and each line in a strip of its own, however narrow the photograph is."""
    written = []
    write = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda draw, *at, **how: (written.append((draw, *at, how)), write(draw, *at, **how)),
    )
    grid = height // 16, width // 16
    photo, degree = np.zeros((height, width, 3), np.uint8), np.arange(grid[0] * grid[1]).reshape(grid)
    sheet = discovery_overlay(
        photo,
        boxes=[(0, 0, width, height), (0, 0, 16, 16)],
        seed=(0, 0),
        mask=np.ones(grid, bool),
        degree=degree,
        patch_size=16,
        title="a name that nobody would read to its end " * 3 + ": x 0 to 10, y 0 to 20",
    )
    boxes = [draw.textbbox(at, text, font=how["font"]) for draw, at, text, how in written]
    assert len(boxes) == 3
    assert all(x0 >= 0 and x1 <= sheet.width and y1 <= sheet.height for x0, _, x1, y1 in boxes)
    (_, _, _, title), (_, first, _, second), (_, third, _, _) = boxes
    assert title <= 26
    assert sheet.height - 52 <= first
    assert second <= third
    assert written[0][2].endswith("x 0 to 10, y 0 to 20")
    assert sheet.width < 350, "a panorama's map lies below it"


def test_the_seed_of_a_patch_that_reaches_beyond_the_photograph_is_in_it():
    sheet = overlay(np.zeros((50, 80, 3), np.uint8), seed=(3, 1))
    rows, _ = np.nonzero((sheet == SEED).all(-1))
    assert 26 + 49 in rows


@pytest.mark.parametrize("num_models", [1, 2, 3])
@pytest.mark.parametrize("num_settings", [0, 1, 12])
def test_the_default_discovery_figure_was_cut_at_the_frame(tmp_path, monkeypatch, num_models, num_settings):
    """With one row the models' marks lay on the frame or outside of it."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    share = {"corloc": 40.0, "interval": [31.0, 48.0], "num_images": 1}
    entry = {"name": "keys", "corloc": 38.0, "interval": [30.0, 46.0]}
    model = {"model": "/a/long/path" * 12, "protocol": share, "mean": share, "settings": [entry] * num_settings}
    summary = {
        "data": "yolo:/a/long/path" * 12,
        "num_images": 1,
        "whole_image": share,
        "models": [model] * num_models,
    }
    sweep_figure(summary, tmp_path / "sweep.png", most=8)
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    bottom, top = axes.get_ylim()
    for container in axes.containers:
        places = container[0].get_ydata()
        assert top + 0.2 < places.min() <= places.max() < bottom - 0.2
    texts = [axes.title, axes.xaxis.label, *axes.get_yticklabels(), *figure.legends[0].get_texts()]
    for text in texts:
        box = text.get_window_extent()
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.width, text
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.height, text
    assert axes.get_title().endswith(": 1 image, the best 8 of 12 settings" if num_settings == 12 else ": 1 image")


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
        "whole_image": share,
        "models": [model if num_settings else {"model": "m", "protocol": share}] * num_models,
    }
    assert read_png(sweep_figure(summary, tmp_path / "made" / "sweep.png")).std() > 10
