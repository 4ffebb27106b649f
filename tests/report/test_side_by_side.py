"""Several models side by side: the page in a browser, the figure from its pixels."""

import re

import numpy as np
import pytest

from report.layout import check_texts
from report.pages import EVIL, brightness, said
from vitreg.report import Panels, Photograph, side_by_side_figure, write_side_by_side

GRID = (3, 4)


def make_photographs(count: int = 2, models: int = 3, name: str = "photo") -> list[Photograph]:
    """Random maps; the first patch is an outlier of the last model but one, and every model has another box."""
    rng = np.random.default_rng(0)
    photographs = []
    for i in range(count):
        panels = []
        for m in range(models):
            norms, attention = rng.uniform(5, 15, GRID), rng.uniform(0, 0.1, GRID)
            if m == models - 2:
                norms[0, 0] = 400.0
            panels.append(Panels((m, 0, m + 2, 2), norms, norms > 100, attention))
        photographs.append(Photograph(f"{name} {i}", rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), tuple(panels)))
    return photographs


def make_summary(models: int = 3, **changes) -> dict:
    model = {
        "name": "vit_test", "what": "without registers", "verdict": "no artifacts", "outlier_fraction": 0.0,
        "largest_over_median": 2.0, "onset_block": None, "register_norms": [], "attention_on_outliers": 0.0,
        "attention_on_registers": None, "diagnosis": {"blocks": [{}] * 4},
    }  # fmt: skip
    ill = {"what": "without registers", "verdict": "artifacts", "outlier_fraction": 1 / 12, "onset_block": 2}
    fixed = {
        "what": "test-time register",
        "verdict": "removed",
        "register_norms": [81.5],
        "attention_on_registers": 0.3,
    }
    several = [{**model, "what": f"{m} registers"} for m in range(models - 2)] + [model | ill, model | fixed]
    several = several[-models:]
    return {
        "title": "vit_test has artifacts", "verdict": ["A test-time register removes them."], "num_images": 2,
        "image_size": [48, 64], "grid": list(GRID), "block": 3, "discovery_block": 2, "version": "0.1.0",
        "attention_from": "the class token", "seconds": 1.5, "models": several,
    } | changes  # fmt: skip


@pytest.mark.parametrize("models", [1, 2, 3, 4])
def test_every_model_has_box_norms_and_attention_of_every_photograph(tmp_path, open_page, models):
    path = write_side_by_side(make_summary(models), make_photographs(models=models), tmp_path / "made" / "report.html")
    page = open_page(path, ready=".photograph")
    assert page.title() == "vit_test has artifacts – vitreg demo"
    assert page.locator(".photograph").count() == 2
    first = page.locator(".photograph").first
    assert first.locator("svg").count() == 3 * models
    boxes = [svg.bounding_box() for svg in first.locator("svg").all()]
    tops = sorted({round(box["y"]) for box in boxes})
    assert len(tops) == (1 if models < 3 else 3), "objects, norms and attention, beside each other where there is room"
    assert all(box["width"] / box["height"] == pytest.approx(4 / 3, rel=0.02) for box in boxes)
    for m, rectangle in enumerate(first.locator("rect.box").all()):
        # In a viewBox of patches.
        assert [rectangle.get_attribute(side) for side in ("x", "y", "width", "height")] == [str(m), "0", "2", "2"]
    outlines = [path.get_attribute("d") for path in first.locator("path.outline").all()]
    assert outlines == [*[""] * (models - 2), "M0 0h1v1h-1z", ""][-models:] * 2
    heads = [said(head) for head in first.locator("h4").all()]
    assert heads == ["Object (LOST)", "Patch norm", "Attention of the class token"]
    whats = [model["what"] for model in make_summary(models)["models"]]
    assert [said(what) for what in first.locator(".panels > p").all()] == whats * 3


def test_the_table_says_what_was_found(tmp_path, open_page):
    page = open_page(
        write_side_by_side(make_summary(), make_photographs(), tmp_path / "report.html"), ready=".photograph"
    )
    rows = [said(row).replace("\n", " ").split("\t") for row in page.locator("tbody tr").all()]
    assert rows[1][1:6] == ["artifacts", "8.3 %", "2.00", "2", "–"]
    assert rows[2][1:] == ["removed", "0 %", "2.00", "–", "81.5", "0 %", "30.0 %"]


def test_models_share_a_scale_within_a_photograph_only(tmp_path):
    photographs = make_photographs()
    same = photographs[0].panels[0].norms
    photographs[0].panels[2].norms[...] = same
    photographs[1].panels[0].norms[...] = same
    photographs[1].panels[1].norms[0, 0] = 4000.0
    text = write_side_by_side(make_summary(), photographs, tmp_path / "report.html").read_text("utf-8")
    maps = re.findall(r'"(data:image/png;base64,[^"]+)"', text)
    assert len(maps) == 12
    assert maps[0] == maps[2], "the same norms in two models"
    assert maps[0] != maps[6], "and in another photograph, whose largest norm is ten times as large"
    low, high = same.min(), 400.0
    low = min(panels.norms.min() for panels in photographs[0].panels)
    ends = re.findall(r"log scale\).*?<span>(\S+)</span><span>(\S+)</span><span>(\S+)</span>", text)[0]
    assert [float(end) for end in ends] == pytest.approx([low, (low * high) ** 0.5, high], rel=0.01)


def test_it_fits_a_phone_and_the_dark(tmp_path, open_page):
    path = write_side_by_side(make_summary(4), make_photographs(models=4), tmp_path / "report.html")
    page = open_page(path, width=380, color_scheme="dark", ready=".photograph")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert brightness(page) < 150
    widths = [svg.bounding_box()["width"] for svg in page.locator(".photograph").first.locator("svg").all()]
    assert min(widths) > 70


def test_names_are_only_text(tmp_path, open_page):
    summary = make_summary(title=EVIL)
    page = open_page(
        write_side_by_side(summary, make_photographs(name=EVIL), tmp_path / "report.html"), ready=".photograph"
    )
    assert EVIL in said(page.locator("h1"))
    assert EVIL in said(page.locator("h3").first)
    assert page.evaluate("window.hacked") is None


def test_the_figure_has_boxes_in_one_group_and_outlines_in_two(tmp_path, read_png):
    """A row for each photograph; of three models the second has outliers."""
    path = side_by_side_figure(make_summary(), make_photographs(2), tmp_path / "made" / "demo.png")
    image = read_png(path)
    marked = np.abs(image.astype(int) - (255, 90, 60)).max(-1) < 10
    # Of what lies between two columns of any group, nothing is marked.
    columns = _groups(marked.sum(0) > 3)
    assert len(columns) == 3 + 1 + 1
    assert [len(_groups(marked[:, start:stop].sum(1) > 3)) for start, stop in columns] == [2] * 5


def _groups(marked: np.ndarray) -> list[tuple[int, int]]:
    """Where runs of marked pixels, less than half a panel apart, begin and end."""
    at = np.flatnonzero(marked)
    starts = at[np.diff(at, prepend=-1000) > 30]
    stops = at[np.diff(at, append=10**6) > 30] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def test_the_figure_holds_as_many_photographs_as_asked_for(tmp_path, read_png):
    summary = make_summary()
    one, two, four, six = (
        read_png(side_by_side_figure(summary, make_photographs(n), tmp_path / "a.png")).shape for n in (1, 2, 4, 6)
    )
    assert one[1] == two[1] == four[1]
    assert one[0] < two[0] < four[0]
    assert four == six


@pytest.mark.parametrize("models", [1, 2, 3])
def test_all_texts_of_the_figure_can_be_read(tmp_path, drawn, models):
    """With one model a title is wider than its column."""
    side_by_side_figure(make_summary(models), make_photographs(models=models), tmp_path / "a.png")
    assert check_texts(drawn[0]) > 6 * models


@pytest.mark.parametrize("write", [write_side_by_side, side_by_side_figure])
def test_maps_that_do_not_fit_are_refused(tmp_path, write):
    photographs = make_photographs()
    with pytest.raises(ValueError, match="photo 0 has the maps of 3 models, but the summary names 4"):
        write(make_summary(4), photographs, tmp_path / "a")
    with pytest.raises(ValueError, match=r"photo 0 has a map of \[3, 4\] patches or with NaN"):
        write(make_summary(grid=[4, 4]), photographs, tmp_path / "a")
    photographs[1].panels[2].attention[1, 1] = np.nan
    with pytest.raises(ValueError, match="photo 1 has a map"):
        write(make_summary(), photographs, tmp_path / "a")
    assert not (tmp_path / "a").exists()
