"""The image of when artifacts appear: its colors, and that nothing in it runs into anything else."""

from __future__ import annotations

import numpy as np
import pytest

from report.layout import check_texts, visible_texts
from training.runs import real_diagnoses, write_run
from vitreg.artifacts.timeline import read_timeline
from vitreg.report import timeline_figure

THRESHOLD, REGISTER = (255, 90, 60), (11, 122, 59)


@pytest.fixture(scope="module")
def found(_tiny_vit, photograph_batch):
    return real_diagnoses(_tiny_vit, photograph_batch[:6])


@pytest.fixture
def draw(found, tmp_path, read_png):
    """Runs, each given as name, diagnoses and config, to pixels."""

    def draw(*runs: tuple[str, list[str]], **config):
        folders = [
            write_run(tmp_path / name, {500 * i: found[kind] for i, kind in enumerate(kinds, start=1)}, **config)
            for name, kinds in runs
        ]
        return read_png(timeline_figure(read_timeline(folders), tmp_path / "made" / "timeline.png"))

    return draw


def count(image: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((np.abs(image.astype(int) - color).max(-1) < 6).sum())


def orange(image: np.ndarray) -> int:
    """Filled cells of outliers: much more red than blue."""
    red, _, blue = np.moveaxis(image.astype(int), -1, 0)
    return int((red - blue > 60).sum())


LONG = "a-name-that-is-much-too-long-for-a-column-of-the-image"
COURSE = ["clean", "clean", "artifacts", "artifacts"]


@pytest.mark.parametrize(
    "runs",
    [
        [("one", COURSE)],
        [(LONG, COURSE)],
        [("single", ["artifacts"])],
        [("none", ["clean"] * 3), ("four", ["registers"] * 3)],
        [("none", COURSE), ("inner", ["clean", "inner"])],
        [("small", ["small"]), (LONG, COURSE), ("large", ["artifacts", "clean"])],
        [(f"{LONG}-{i}", COURSE) for i in range(3)] + [(f"r{i}", ["registers"]) for i in range(3)] + [("s", ["small"])],
        [(f"{kind}-{i}", [kind]) for kind in ("clean", "registers", "small") for i in range(3)],
    ],
)
def test_no_text_runs_into_another_or_off_the_image(runs, draw, drawn):
    draw(*runs, num_steps=1_250_000)
    (figure,) = drawn
    assert check_texts(figure) > 20


def test_outliers_and_registers_have_their_own_colors(draw):
    plain = draw(("clean", ["clean", "clean"]))
    artifacts = draw(("artifacts", ["clean", "artifacts"]))
    registers = draw(("registers", ["registers", "registers"]))
    assert count(plain, REGISTER) == count(artifacts, REGISTER) == 0
    assert count(registers, REGISTER) > 200
    # The line of zero outliers is of the threshold's color, so there is a little of it everywhere.
    assert orange(artifacts) > orange(plain) + 2000
    assert count(artifacts, THRESHOLD) > count(plain, THRESHOLD) + 500


def test_every_run_and_its_verdict_is_named(draw, drawn):
    draw(("none", COURSE), ("four", ["registers"] * 2))
    texts = [text.get_text() for text in visible_texts(drawn[0])]
    assert "Artifacts in 1 of 2 runs" in texts
    assert any(text.startswith("none: artifacts from step 1500, block 7 on: ") for text in texts)
    assert "four: no artifacts in 2 diagnoses" in texts
    assert {"deit3, 5.7 M, no registers", "deit3, 5.7 M, 4 registers", "from step 1500", "from block 7"} <= set(texts)
    assert "(b)  by training step, after block 11" in texts


@pytest.mark.parametrize(
    ("runs", "title", "labels"),
    [
        ([("a", ["registers"]), ("b", ["clean"])], "(c)  by registers", ["0 reg.", "4 reg."]),
        ([("a", ["clean"]), ("b", ["small"])], "(c)  by model size", ["0.4 M", "5.7 M"]),
        (
            [("a", ["registers"]), ("b", ["clean"]), ("c", ["small"])],
            "(c)  by model size and registers",
            ["0.4 M\n0 reg.", "5.7 M\n0 reg.", "5.7 M\n4 reg."],
        ),
        ([(f"{LONG}-b", ["clean"]), ("a", ["artifacts"])], "(c)  by run", ["a-name-th…e-image-b", "a"]),
        (
            [(name, [name[:5]]) for name in ("clean", "clean-again", "small")],
            "(c)  by model size",
            ["0.4 M", *["5.7 M"] * 2],
        ),
    ],
)
def test_the_last_panel_is_by_what_the_runs_differ_in(runs, title, labels, draw, drawn):
    draw(*runs)
    assert title in [text.get_text() for text in drawn[0].texts]
    shown = [label.get_text() for label in drawn[0].axes[-1].get_xticklabels()]
    assert shown == labels


def test_one_run_has_no_last_panel(draw, drawn):
    draw(("one", COURSE))
    assert not any(text.get_text().startswith("(c)") for text in drawn[0].texts)


def test_cells_share_their_axes(draw, drawn):
    draw(("none", COURSE), ("four", ["registers"] * 3), num_steps=10000)
    blocks, steps, shares, blocks2, steps2, shares2, _, last = drawn[0].axes
    assert blocks.get_ylim() == blocks2.get_ylim()
    assert steps.get_ylim() == steps2.get_ylim() == last.get_ylim()
    # The first ends at step 2000, the second was stopped before.
    assert steps.get_xlim() == steps2.get_xlim() == shares.get_xlim()
    assert 2000 < steps.get_xlim()[1] < 2100
    assert shares.get_ylim() == shares2.get_ylim()


def test_registers_that_begin_near_zero_do_not_squeeze_the_patches(found, tmp_path, drawn):
    timeline = read_timeline([write_run(tmp_path / "run", {1: found["registers"]})])
    block = timeline["runs"][0]["diagnoses"][0]["blocks"][-1]
    block["register_norms"] = [1e-6] * 4
    timeline_figure(timeline, tmp_path / "timeline.png")
    low, _ = drawn[0].axes[1].get_ylim()
    assert low > block["histogram"]["edges"][0] / 10
