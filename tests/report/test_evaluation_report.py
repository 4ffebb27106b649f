"""The page of `vitreg evaluate`: tables, and what was predicted for every pixel."""

import numpy as np
import pytest

from report.pages import EVIL, said
from vitreg.report import DenseImage, Table, write_evaluation

NAMES = "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "a \"quoted\" & 'named' <model>"


def write(path, names=NAMES, class_names=("road", "sky"), source="/a/very/long/path" * 6, command=""):
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    classes, meters = rng.integers(0, 2, (60, 80)), rng.uniform(0.5, 3, (60, 80))
    summary = {
        "models": [{"name": name} for name in names],
        "data": {"segmentation": {"source": source, "num_train": 40, "num_val": 1}},
        "verdict": [],
        "version": "0.1.0",
        "seconds": 2.0,
        "command": command,
    }
    header = ["model", *(f"probe {i} of a long name: top-1 (%) \u2191" for i in range(5))]
    table = Table("All probes", header, [[name, *["77.3 \u00b10.4 [70.1, 81.2] \u25b2"] * 5] for name in names])
    return write_evaluation(
        summary,
        path,
        tables=[table],
        legend="\u25b2 better",
        masks=[DenseImage(EVIL, photo, classes, dict.fromkeys(names, classes))],
        depths=[DenseImage(EVIL, photo, meters, dict.fromkeys(names, meters))],
        class_names=class_names,
    )


def test_evaluation_tables_on_a_phone(tmp_path, open_page):
    """Figures lay beyond the right edge; now each stands in the page, and says what it is of."""
    page = open_page(write(tmp_path / "report.html"), width=390, ready="main")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    cells = page.locator("tbody td").all()
    assert len(cells) == 10
    for cell in cells:
        box = cell.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert cell.evaluate("cell => cell.scrollWidth <= cell.clientWidth + 1")
        assert "probe" in cell.evaluate("cell => getComputedStyle(cell, '::before').content")
    assert all(image.bounding_box()["width"] > 150 for image in page.locator("article img").all())


@pytest.mark.parametrize("width", [390, 1280])
def test_names_are_only_text(tmp_path, open_page, width):
    path = write(tmp_path / "report.html", (EVIL, NAMES[1]), (EVIL, "sky"), source=EVIL, command=f"vitreg {EVIL}")
    page = open_page(path, width=width, ready="main")
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [row.text_content() for row in page.locator("tbody th").all()] == [EVIL, NAMES[1]]
    assert page.locator("article h3").first.text_content() == EVIL
    assert page.locator(".classes span").first.text_content() == EVIL
    assert page.locator(".command").text_content() == f"vitreg {EVIL}"
    assert page.locator("img").count() == 8, "those of two photographs and no other"


def test_one_model_and_one_image(tmp_path, open_page):
    page = open_page(write(tmp_path / "report.html", NAMES[:1]), ready="main")
    assert said(page.locator("h1")) == "What the features of 1 model are worth"
    kicker = said(page.locator(".kicker"))
    assert "on 40 training images of" in kicker
    assert kicker.endswith("and 1 validation image"), "the folder is that of the training images"
    assert page.locator("footer").inner_text().count("To make it again") == 0, "where no command is known"
