"""The figures, read back from their pixels."""

from pathlib import Path

import numpy as np
import pytest

from report.comparisons import make_comparison, make_pair, renamed
from report.diagnoses import make_examples, make_summary
from report.layout import check_texts
from vitreg.report import attention_figure, comparison_figure, diagnosis_figure, overlay, write_attention

LONG = "WWW a name that nobody would read to its end but which exists all the same " * 4


def grey_photo(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


@pytest.mark.parametrize("grid", [(4, 4), (3, 6)])
def test_overlay_is_hottest_at_the_planted_patch(grid):
    attention = np.full(grid, 0.01)
    attention[2, 1] = 0.5
    photo = grey_photo(grid[0] * 16, grid[1] * 16)
    image = overlay(photo, attention)
    assert image.shape == photo.shape
    assert image.dtype == np.uint8
    hottest = image.sum(-1) == image.sum(-1).max()
    expected = np.zeros_like(hottest)
    expected[32:48, 16:32] = True
    np.testing.assert_array_equal(hottest, expected)


def test_overlay_has_sharp_patches_where_they_do_not_divide_the_photo():
    image = overlay(grey_photo(50, 70), np.arange(12.0).reshape(3, 4))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) == 12


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


@pytest.mark.parametrize(
    ("heads", "height", "width"),
    [(1, 64, 64), (12, 64, 64), (3, 64, 96), (16, 96, 64), (1, 32, 320), (12, 32, 320), (3, 320, 32), (16, 320, 32)],
)
def test_attention_figures_of_any_shape_are_not_cut(tmp_path, drawn, heads, height, width):
    """A title went out of the image, and so did the color bar of a panorama, whose numbers lay on each other."""
    attention = np.random.default_rng(0).uniform(0, 0.1, (heads, height // 16, width // 16))
    attention_figure(grey_photo(height, width), attention, title=f"{LONG}, block 11", path=tmp_path / "a.png")
    assert check_texts(drawn[0]) == heads + 8
    sheet = drawn[0].get_size_inches()
    assert sheet.min() > 2
    assert sheet.max() < 20


def test_the_queried_patch_is_marked(tmp_path, read_png):
    """In the photograph and in every map, at its row and column."""
    black = np.zeros((64, 96, 3), np.uint8)
    attention = np.full((1, 4, 6), 1e-9)
    attention[0, 3, 0] = 1.0
    options = {"block": 2, "name": "x", "folder": tmp_path}
    marked, plain = (
        write_attention(black, attention, query=query, **options) for query in ("patch (1, 4)", "class token")
    )
    white = (read_png(Path(marked["overlay"])) == 255).all(-1)
    rows, columns = np.nonzero(white)
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == [17, 30, 65, 78]
    assert not white[18:30, 66:78].any(), "a box, through which the patch is seen"
    assert not (read_png(Path(plain["overlay"])) == 255).all(-1).any()
    boxes = [(read_png(Path(paths["heads"])) == 255).all(-1) for paths in (marked, plain)]
    new = boxes[0] & ~boxes[1]
    # Title and labels differ, the photograph and the two maps lie below them: 1.25 inches of height and the square root
    # of 1.5 as much of width for a head, twice that and a label for the other two.
    top, tall, small = 0.59, 2 * 1.25 / 1.5**0.5 + 0.24, 1.25 * 1.5**0.5
    for x, y, width, height in (
        (0.12, top, 1.5 * tall, tall),
        (0.21 + 1.5 * tall, top, 1.5 * tall, tall),
        (0.3 + 3 * tall, top, small, small / 1.5),
    ):
        place = new[
            round(160 * (y + height / 4)) - 2 : round(160 * (y + height / 2)) + 3,
            round(160 * (x + width * 4 / 6)) - 2 : round(160 * (x + width * 5 / 6)) + 3,
        ]
        assert place.sum() > 40
        new[
            round(160 * (y + height / 4)) - 3 : round(160 * (y + height / 2)) + 4,
            round(160 * (x + width * 4 / 6)) - 3 : round(160 * (x + width * 5 / 6)) + 4,
        ] = False
    assert not new[round(160 * top) :].any(), "and nowhere else"


@pytest.mark.parametrize(("count", "grid"), [(1, (4, 4)), (3, (3, 6)), (12, (6, 3)), (1, (2, 20)), (3, (20, 2))])
def test_figures_with_long_names_are_not_cut(tmp_path, drawn, count, grid):
    before, after = (renamed(examples, LONG) for examples in make_pair(count=count, grid=grid))
    summary = make_comparison(before, after)
    summary["before"]["model"]["name"] = summary["after"]["model"]["name"] = LONG
    comparison_figure(summary, before, after, tmp_path / "a.png")
    diagnosis_figure(summary["before"], before, tmp_path / "b.png")
    for figure in drawn:
        assert check_texts(figure) > 10
        assert figure.get_size_inches().max() < 22


@pytest.mark.parametrize(
    ("found", "told"),
    [(True, "8.3 % of patches are artifacts"), (False, "no artifacts"), (None, "too few patches to tell")],
)
def test_the_diagnosis_figure_says_which_of_three_verdicts(tmp_path, drawn, found, told):
    examples = make_examples(count=1)
    summary = make_summary(examples, threshold=100.0 if found else None) | {"has_artifacts": found}
    summary["undecided"] = {"num_patches": 4} if found is None else None
    diagnosis_figure(summary, examples, tmp_path / "a.png")
    assert drawn[0].texts[0].get_text() == f"vit_test: {told}"


def test_diagnosis_figure_draws_at_most_the_examples_asked_for(tmp_path, read_png):
    examples = make_examples(count=6)
    summary = make_summary(examples)
    wide = read_png(diagnosis_figure(summary, examples, tmp_path / "a.png"))
    narrow = read_png(diagnosis_figure(summary, examples, tmp_path / "b.png", max_examples=3))
    assert wide.shape[0] == narrow.shape[0]
    assert wide.shape[1] > narrow.shape[1]


def outlined(image: np.ndarray) -> np.ndarray:
    """Where the outlines of outliers are."""
    return np.abs(image.astype(int) - (255, 90, 60)).max(-1) < 10


def test_diagnosis_figure_outlines_the_outliers(tmp_path, read_png):
    examples = make_examples()
    with_outliers = diagnosis_figure(make_summary(examples), examples, tmp_path / "a.png")
    without = diagnosis_figure(make_summary(examples, threshold=None), examples, tmp_path / "b.png")
    assert outlined(read_png(with_outliers)).sum() > 100 + outlined(read_png(without)).sum()


def test_diagnosis_figure_without_a_class_token_has_two_rows(tmp_path, read_png):
    with_attention, without = make_examples(), make_examples(queries=())
    tall = read_png(diagnosis_figure(make_summary(with_attention), with_attention, tmp_path / "a.png"))
    short = read_png(diagnosis_figure(make_summary(without), without, tmp_path / "b.png"))
    assert short.shape[0] < 0.8 * tall.shape[0]


def test_diagnosis_figure_needs_an_example(tmp_path):
    with pytest.raises(ValueError, match="at least one example"):
        diagnosis_figure(make_summary(make_examples()), [], tmp_path / "a.png")


def test_comparison_figure_outlines_the_outliers_where_they_were(tmp_path, read_png):
    """Five rows: the photograph, then before and after of two kinds of maps; only before is outlined."""
    before, after = make_pair()
    image = read_png(comparison_figure(make_comparison(before, after), before, after, tmp_path / "made" / "a.png"))
    # Left of the color bar, which carries the threshold; a few pixels of a photograph may have the color too.
    rows = np.flatnonzero(outlined(image)[:, : int(0.6 * image.shape[1])].sum(1) > 20)
    starts = rows[np.diff(rows, prepend=-100) > 100]
    top, step = 1.09 * 160, 1.59 * 160
    assert ((starts - top) / step).round().astype(int).tolist() == [1, 3]


def test_comparison_figure_shares_a_scale_between_before_and_after(tmp_path, read_png):
    """What stays the same must look the same, whatever was removed beside it."""
    before, after = make_pair(count=1, before=(), after=())
    before[0].norms[...], after[0].norms[...] = 20, 20
    before[0].norms[:, 0, 0] = 500
    after[0].norms[:, 2, 3] = 10
    image = read_png(comparison_figure(make_comparison(before, after), before, after, tmp_path / "a.png"))
    y, x = (np.array([1.09, 0.5]) * 160).astype(int)
    height, width = int(1.5 * 160), 2 * 160
    first, second = (y + int(1.59 * 160) * i + height // 2 for i in (1, 2))
    np.testing.assert_array_equal(image[first, x + width // 2], image[second, x + width // 2])
    assert image[first, x + width // 2].std() > 10, "a color of the map"


def test_comparison_figure_without_common_attention_has_three_rows(tmp_path, read_png):
    tall, short = (
        read_png(comparison_figure(make_comparison(*pair), *pair, tmp_path / "a.png"))
        for pair in (make_pair(), make_pair(before=("class token",), after=("register 1",)))
    )
    assert short.shape[0] < 0.7 * tall.shape[0]


def test_comparison_figure_marks_a_threshold_that_no_example_reaches(tmp_path, read_png):
    _, clean = make_pair(before=(), after=())
    before, after = make_pair(before=(), after=())
    image = read_png(comparison_figure(make_comparison(before, after), clean, after, tmp_path / "a.png"))
    bar = image[:, int(4.68 * 160) : int(4.79 * 160)]
    mark = np.flatnonzero(outlined(bar).mean(1) > 0.5)
    assert len(mark)
    # The scale is extended to the threshold, so that there is color below the mark, and not the white of the sheet.
    assert bar[mark[-1] + 8].min() < 200


def test_comparison_figure_draws_at_most_the_examples_asked_for(tmp_path, read_png):
    pair = make_pair(count=6)
    summary = make_comparison(*pair)
    wide = read_png(comparison_figure(summary, *pair, tmp_path / "a.png"))
    narrow = read_png(comparison_figure(summary, *pair, tmp_path / "b.png", max_examples=3))
    assert wide.shape[0] == narrow.shape[0]
    assert wide.shape[1] > narrow.shape[1]


def test_comparison_figure_needs_pairs(tmp_path):
    before, after = make_pair()
    summary = make_comparison(before, after)
    with pytest.raises(ValueError, match="at least one example"):
        comparison_figure(summary, [], [], tmp_path / "a.png")
    with pytest.raises(ValueError, match="2 examples before and 1 after"):
        comparison_figure(summary, before, after[:1], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
