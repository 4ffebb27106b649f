"""Numbers in words: the same ones in Python and in the pages' scripts."""

import numpy as np
import pytest

from report.diagnoses import make_examples, make_summary
from vitreg.common.words import counted, number, percent, shorten
from vitreg.report import write_report


def test_two_implementations_that_round_differently_on_one_page(tmp_path, open_page):
    """Ties, and what rounding lifts over a border, come out alike where a page's script writes the number."""
    rng = np.random.default_rng(0)
    ties = [0.125, 1.5, 2.5, 12.25, 12.75, 100.5, 101.5, 9.994, 9.995, 9.996, 99.94, 99.95, 99.96, 586.05, 1e6, 0.0]
    norms = [*ties, *np.exp(rng.uniform(-6, 9, 300)).tolist()]
    borders = [
        0.0,
        1.0,
        1e-7,
        5e-6,
        5.1e-6,
        0.000994,
        0.000996,
        0.00994,
        0.00995,
        0.00996,
        0.0625,
        0.9994,
        0.9995,
        0.99999,
    ]
    shares = [*borders, *rng.uniform(0, 1, 300).tolist(), *np.exp(rng.uniform(-14, 0, 300)).tolist()]
    examples = make_examples(1)
    page = open_page(write_report(make_summary(examples), examples, tmp_path / "report.html"))
    assert page.evaluate("values => values.map(number)", norms) == [number(value) for value in norms]
    told = [text.replace("\xa0", " ") for text in page.evaluate("values => values.map(percent)", shares)]
    assert told == [percent(share) for share in shares]
    counts = [(n, noun) for n in (0, 1, 2) for noun in ("image", "patch")]
    assert page.evaluate("pairs => pairs.map((pair) => counted(...pair))", counts) == [
        counted(*pair) for pair in counts
    ]


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (None, "–"),
        (0.0, "0 %"),
        (1e-7, "<0.001 %"),
        (0.000996, "0.10 %"),
        (0.00996, "1.0 %"),
        (0.0204, "2.0 %"),
        (0.3625, "36.3 %"),
        (0.99999, ">99.9 %"),
        (1.0, "100 %"),
    ],
)
def test_percent(share, told):
    assert percent(share) == told


@pytest.mark.parametrize(("value", "told"), [(None, "–"), (9.996, "10.0"), (99.96, "100"), (57.0, "57.0")])
def test_number(value, told):
    assert number(value) == told


def test_1_images():
    assert [counted(n, "image") for n in (0, 1, 2)] == ["no images", "1 image", "2 images"]
    assert counted(2, "patch") == "2 patches"


def test_shortened_names_keep_both_ends():
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcde…hijk"
    assert all(len(shorten("abcdefghijk", most)) == most for most in range(2, 11))
