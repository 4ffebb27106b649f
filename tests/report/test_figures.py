"""The figures, read back from their pixels."""

import numpy as np
import pytest

from report.diagnoses import make_examples, make_summary
from vitreg.report import attention_figure, diagnosis_figure, overlay


def grey_photo(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


@pytest.mark.parametrize("grid", [(4, 4), (3, 6)])
def test_overlay_is_hottest_at_the_planted_patch(grid):
    attention = np.full(grid, 0.01)
    attention[2, 1] = 0.5
    photo = grey_photo(grid[0] * 16, grid[1] * 16)
    picture = overlay(photo, attention)
    assert picture.shape == photo.shape
    assert picture.dtype == np.uint8
    hottest = picture.sum(-1) == picture.sum(-1).max()
    expected = np.zeros_like(hottest)
    expected[32:48, 16:32] = True
    np.testing.assert_array_equal(hottest, expected)


def test_overlay_has_sharp_patches_where_they_do_not_divide_the_photo():
    picture = overlay(grey_photo(50, 70), np.arange(12.0).reshape(3, 4))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 12


def test_overlays_share_a_scale_on_request():
    weak, strong = np.full((2, 2), 0.1), np.full((2, 2), 0.4)
    photo = grey_photo(8, 8)
    np.testing.assert_array_equal(overlay(photo, weak), overlay(photo, strong))
    assert overlay(photo, weak, highest=0.4).sum() < overlay(photo, strong, highest=0.4).sum()


def test_overlay_of_no_attention_at_all():
    assert np.isfinite(overlay(grey_photo(8, 8), np.zeros((2, 2)))).all()


@pytest.mark.parametrize("heads", [1, 3, 6, 12, 16, 25])
def test_attention_figure_is_written_for_any_number_of_heads(tmp_path, read_png, heads):
    rng = np.random.default_rng(0)
    path = tmp_path / "made" / "attention.png"
    attention = rng.uniform(0, 0.1, (heads, 4, 4))
    assert attention_figure(grey_photo(64, 64), attention, title="cost: 5$ and 6$ _x", path=path) == path
    assert read_png(path).std() > 10


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 112), (112, 48)])
def test_attention_figure_keeps_the_aspect_of_the_photograph(tmp_path, read_png, height, width):
    photo = np.zeros((height, width, 3), np.uint8)
    photo[...] = (0, 255, 0)
    path = attention_figure(photo, np.ones((12, 2, 2)), title="", path=tmp_path / "a.png")
    rows, columns = np.nonzero((read_png(path) == (0, 255, 0)).all(-1))
    assert (np.ptp(rows) + 1) / (np.ptp(columns) + 1) == pytest.approx(height / width, rel=0.02)


def test_diagnosis_figure_draws_at_most_the_examples_asked_for(tmp_path, read_png):
    examples = make_examples(count=6)
    summary = make_summary(examples)
    wide = read_png(diagnosis_figure(summary, examples, tmp_path / "a.png"))
    narrow = read_png(diagnosis_figure(summary, examples, tmp_path / "b.png", max_examples=3))
    assert wide.shape[0] == narrow.shape[0]
    assert wide.shape[1] > narrow.shape[1]


def test_diagnosis_figure_outlines_the_outliers(tmp_path, read_png):
    def outlined(picture: np.ndarray) -> int:
        return int((np.abs(picture.astype(int) - (255, 90, 60)).max(-1) < 10).sum())

    examples = make_examples()
    with_outliers = diagnosis_figure(make_summary(examples), examples, tmp_path / "a.png")
    without = diagnosis_figure(make_summary(examples, threshold=None), examples, tmp_path / "b.png")
    assert outlined(read_png(with_outliers)) > 100 + outlined(read_png(without))


def test_diagnosis_figure_without_a_class_token_has_two_rows(tmp_path, read_png):
    with_attention, without = make_examples(), make_examples(queries=())
    tall = read_png(diagnosis_figure(make_summary(with_attention), with_attention, tmp_path / "a.png"))
    short = read_png(diagnosis_figure(make_summary(without), without, tmp_path / "b.png"))
    assert short.shape[0] < 0.8 * tall.shape[0]


def test_diagnosis_figure_needs_an_example(tmp_path):
    with pytest.raises(ValueError, match="at least one example"):
        diagnosis_figure(make_summary(make_examples()), [], tmp_path / "a.png")
