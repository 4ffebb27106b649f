"""The report as a reader meets it: opened from disk in a browser."""

import base64
import itertools
import re
import zlib

import numpy as np
import pytest

from report.diagnoses import make_examples, make_summary
from report.pages import EVIL, brightness, check_thinned, hover, payload, pixels, said
from vitreg.report import ExampleMaps, write_report


def point_at(page, panel: int, row: int, column: int, grid: tuple[int, int], example: int = 0) -> str:
    """Hover a patch of a panel; what the page then says of it."""
    hover(page, panel, row, column, grid, example)
    return said(page.locator(".readout").nth(example))


def test_slider_drives_charts_and_maps(tmp_path, open_page):
    examples = make_examples()
    page = open_page(write_report(make_summary(examples), examples, tmp_path / "report.html"))
    assert said(page.locator("h1")) == "Artifacts 8.3 % of patches are outliers"
    assert said(page.locator("#block-now")) == "3 of 0..3 (reported)"
    assert "threshold" in said(page.locator("#histogram"))
    before = [pixels(page, panel) for panel in range(3)]

    page.locator("#block").focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.locator("#block-now", has_text="0 of 0..3").wait_for()
    after = [pixels(page, panel) for panel in range(3)]
    # The photograph changes too: its outlier is no longer outlined.
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert "threshold" not in said(page.locator("#histogram"))
    median = np.median([e.norms[0] for e in examples])
    assert f"median {median:.2f}" in said(page.locator("#depth-says"))
    page.locator("summary", has_text="Every block").click()
    assert said(page.locator("tr[aria-current] th")) == "0"


@pytest.mark.parametrize("panel", [0, 1, 2])
def test_pointing_at_a_patch_tells_its_values(tmp_path, open_page, panel):
    grid = (3, 4)
    examples = make_examples(grid=grid)
    summary = make_summary(examples)
    page = open_page(write_report(summary, examples, tmp_path / "report.html"))
    for row, column in [(0, 0), (1, 3), (2, 1)]:
        others = [pixels(page, p, example=1) for p in range(3)]
        text = point_at(page, panel, row, column, grid, example=1)
        marked = [pixels(page, p, example=1) for p in range(3)]
        assert all(a != b for a, b in zip(others, marked, strict=True)), "highlighted in every panel"
        assert f"Row {row}, column {column}\n" in text
        values = re.search(r"Norm (\S+), (\S+) ×.*\nAttention (\S+) %, (\S+) ×", text).groups()
        norm, times, share, even = map(float, values)
        truth = examples[1].norms[3, row, column]
        attention = examples[1].attention["class token"][3, row, column]
        assert norm == pytest.approx(truth, rel=0.025)
        assert times == pytest.approx(truth / summary["blocks"][3]["median"], rel=0.03)
        assert share == pytest.approx(100 * attention, rel=0.03, abs=0.06)
        assert even == pytest.approx(12 * attention, rel=0.03, abs=0.006)
        assert ("(outlier)" in text) == (truth >= 100)


def test_range_panel(tmp_path, open_page):
    examples = make_examples(depth=5)
    page = open_page(write_report(make_summary(examples), examples, tmp_path / "report.html"))
    assert "float16 does not hold it in block 4" in said(page.locator("[aria-labelledby=h-ranges] .lead"))
    page.locator("#block").fill("2")
    assert "hidden units 800" in said(page.locator("#ranges-says"))
    assert "units, per channel 2.0 %" in said(page.locator("#int8-says"))
    page.locator("summary", has_text="Range").click()
    row = page.locator("[aria-labelledby=h-ranges] tbody tr").nth(2)
    assert [said(cell) for cell in row.locator("td").all()][2:5] == ["800", EVIL, "9.00"]


def test_attention_panel(tmp_path, open_page):
    examples = make_examples()
    page = open_page(write_report(make_summary(examples), examples, tmp_path / "report.html"))
    assert "cosine, patches alone 75.0 %" in said(page.locator("#faithfulness-says"))
    assert "no-op 25.0 %" in said(page.locator("#sinks-says"))
    assert "map shows 50.0 % of its attention" in said(page.locator("#attention-says"))
    page.locator("summary", has_text="Heads with a sink").click()
    assert "registers" in said(page.locator("[aria-labelledby=h-faithfulness] tbody"))


def test_a_summary_of_norms_alone_has_no_other_panels(tmp_path, open_page):
    examples = make_examples()
    summary = make_summary(examples)
    for key in ("faithfulness", "sinks", "ranges"):
        del summary[key]
    page = open_page(write_report(summary, examples, tmp_path / "report.html"))
    assert page.locator("#faithfulness, #sinks, #ranges, #attention-says").count() == 0


def test_arrow_keys_move_over_patches(tmp_path, open_page):
    examples = make_examples()
    page = open_page(write_report(make_summary(examples), examples, tmp_path / "report.html"))
    page.locator(".example").first.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert said(page.locator(".readout").first).startswith("Row 1, column 1")
    page.keyboard.press("Escape")
    assert said(page.locator(".readout").first) == ""


def test_choosing_who_attends(tmp_path, open_page):
    queries = ("class token", "register 1", "register 2")
    examples = make_examples(queries=queries)
    summary = make_summary(examples)
    summary["model"]["num_registers"] = 2
    summary["register_norms"] = [[20.0 + k, 30.0 + k] for k in range(4)]
    summary["cls_norms"] = [10.0] * 4
    for block in summary["blocks"]:
        block["attention_on_registers"] = 0.4
    page = open_page(write_report(summary, examples, tmp_path / "report.html"))
    assert "register 2 33" in said(page.locator("#tokens-says"))
    assert "attention on registers 40.0 %" in said(page.locator("#shares-says"))
    before = [pixels(page, panel) for panel in (1, 2)]
    page.locator("#query").select_option(label="register 2")
    assert pixels(page, 1) == before[0]
    assert pixels(page, 2) != before[1]
    truth = examples[0].attention["register 2"][3, 1, 2]
    share = re.search(r"Attention ([\d.]+) %", point_at(page, 2, 1, 2, (3, 4)))[1]
    assert float(share) == pytest.approx(100 * truth, rel=0.03, abs=0.06)


@pytest.mark.parametrize("width", [320, 390, 900])
def test_no_sideways_scrolling(tmp_path, open_page, width):
    examples = make_examples(queries=("class token", "register 1"))
    summary = make_summary(examples)
    summary["model"]["name"] = "a_very_long_model_name_" * 5
    summary["skipped"] = [{"path": "folder/" * 20 + "x.jpg", "reason": "cannot be decoded"}]
    page = open_page(write_report(summary, examples, tmp_path / "report.html"), width=width)
    page.locator("summary", has_text="Every block").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_and_light(tmp_path, open_page):
    examples = make_examples()
    path = write_report(make_summary(examples), examples, tmp_path / "report.html")
    light, dark = (brightness(open_page(path, color_scheme=scheme)) for scheme in ("light", "dark"))
    assert light > 600 > 200 > dark


def test_names_are_text_never_markup(tmp_path, open_page):
    examples = make_examples(queries=(EVIL,))
    examples = [ExampleMaps(EVIL, e.photo, e.norms, e.attention) for e in examples]
    summary = make_summary(examples)
    summary["model"]["name"] = summary["model"]["family"] = EVIL
    summary["skipped"] = [{"path": EVIL, "reason": "broken"}]
    summary["verdict"] = [EVIL]
    page = open_page(write_report(summary, examples, tmp_path / "report.html"))
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.locator(".example h3").first.text_content() == EVIL
    assert page.locator(".kicker strong").text_content() == EVIL
    assert page.locator(".skipped code").text_content() == EVIL


def test_a_green_clean_over_visible_artifacts(tmp_path, open_page):
    """Nothing is green where it cannot be told, or where norms have a long tail."""
    examples = make_examples()
    undecided = {"block": 2, "num_patches": 2, "ratio": 34.5, "num_images_needed": 4}
    for has_artifacts, status, found in ((None, "cannot tell", undecided), (False, "long tail", None)):
        summary = make_summary(examples, threshold=None)
        summary |= {"has_artifacts": has_artifacts, "status": status, "undecided": found}
        page = open_page(write_report(summary, examples, tmp_path / "report.html"))
        assert page.locator("h1 .good").count() == 0
        assert page.locator("h1 .middling").inner_text() == status.capitalize()
        expected = "2 patches at 34.5 × the median; give at least 4 images" if found else "× the median, after block"
        assert expected in said(page.locator("h1"))


def test_clean_model(tmp_path, open_page):
    examples = make_examples()
    for example in examples:
        example.norms[example.norms > 100] = 12
    summary = make_summary(examples, threshold=None)
    page = open_page(write_report(summary, examples, tmp_path / "report.html"))
    ratio, block = max((b["max"] / b["median"], b["block"]) for b in summary["blocks"])
    told = f"Clean the largest patch norm is {ratio:.2f} × the median, after block {block}"
    assert said(page.locator("h1")) == told
    assert page.locator("h1 .good").count() == 1
    assert page.get_by_text("No position was ever an outlier.").is_visible()
    assert page.get_by_text("No patch is an outlier after any block.").is_visible()
    assert page.locator("#position, #shares, .channels").count() == 0
    assert "no outliers in 12 patches" in said(page.locator(".example").first)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("status", "flag"),
    [("artifacts", "bad"), ("cannot tell", "middling"), ("long tail", "middling"), ("clean", "good")],
)
def test_colors_say_nothing_that_words_do_not(tmp_path, open_page, status, flag, scheme):
    examples = make_examples(count=1)
    undecided = {"block": 2, "num_patches": 1, "ratio": 34.5, "num_images_needed": 4}
    summary = make_summary(examples, threshold=100.0 if status == "artifacts" else None) | {
        "status": status,
        "has_artifacts": {"artifacts": True, "cannot tell": None}.get(status, False),
        "undecided": undecided if status == "cannot tell" else None,
    }
    page = open_page(write_report(summary, examples, tmp_path / "report.html"), color_scheme=scheme)
    assert said(page.locator(".flag")) == status.capitalize()
    color = page.locator(".flag").evaluate("flag => getComputedStyle(flag).color")
    red, green, blue = (int(c) for c in re.findall(r"\d+", color)[:3])
    assert {"bad": red > green + 40, "good": green > red + 40, "middling": min(red, green) > blue + 40}[flag]
    if status == "cannot tell":
        assert "1 patch at 34.5 × the median" in said(page.locator("h1"))
        assert "too few patches to tell" in said(page.locator("#histogram-says"))
        assert "outlier" not in said(page.locator(".example"))


def test_one_image_and_one_query_are_spoken_of_as_one(tmp_path, open_page):
    """A menu of one entry, and "1 images"."""
    examples = make_examples(count=1)
    summary = make_summary(examples) | {"interrupted": True}
    page = open_page(write_report(summary, examples, tmp_path / "report.html"))
    assert page.locator("select").count() == 0
    assert "Attention of class token" in said(page.locator("#legend"))
    assert not re.search(r"\b1 (images|patches|files|outliers)\b", said(page.locator("body")))


@pytest.mark.parametrize("width", [390, 1200])
def test_a_number_and_its_unit_were_on_two_lines(tmp_path, open_page, width):
    examples = make_examples()
    summary = make_summary(examples) | {"verdict": ["2 % of the patches. " * 40]}
    page = open_page(write_report(summary, examples, tmp_path / "report.html"), width=width)
    assert not re.search(r"\d %", page.locator("main, header").all_inner_texts()[0])
    assert page.locator(".verdict").inner_text().count("2\xa0%") == 40


def test_an_axis_ended_in_the_name_of_a_line(tmp_path, open_page):
    """ "11" stood over "patches"."""
    examples = make_examples(depth=12, grid=(14, 14))
    page = open_page(write_report(make_summary(examples, block=11), examples, tmp_path / "report.html"))
    names, others = (
        [text.bounding_box() for text in page.locator(f"#shares text{which}").all()]
        for which in (".label", ":not(.label)")
    )
    assert len(names) == 4
    assert len(others) > 12
    for name, other in itertools.product(names, others):
        # Boxes hold the rim around letters, too.
        beside = name["x"] >= other["x"] + other["width"] + 4
        above = name["y"] + name["height"] - 3 <= other["y"] + 3
        assert beside or above


def test_the_command_to_make_it_again_can_be_copied(tmp_path, open_page):
    examples = make_examples()
    command = "vitreg diagnose 'a b.jpg' --model " + "x" * 200 + " --out '</pre><script>window.hacked=1</script>'"
    summary = make_summary(examples) | {"command": command}
    page = open_page(write_report(summary, examples, tmp_path / "report.html"), width=390)
    assert page.locator(".command").text_content() == command
    words = page.locator(".command span").all()
    assert words[4].text_content() == "--model"
    assert words[4].bounding_box()["height"] < 1.5 * words[0].bounding_box()["height"], "on one line"
    page.locator(".command").click()
    assert page.evaluate("getSelection().toString().trim()") == command, "what is copied"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("window.hacked") is None


def test_without_class_token_there_is_no_attention_panel(tmp_path, open_page):
    examples = make_examples(queries=())
    page = open_page(write_report(make_summary(examples), examples, tmp_path / "report.html"))
    assert page.locator(".example").first.locator("canvas").count() == 2
    assert page.locator("#query").count() == 0
    assert "Attention" not in point_at(page, 1, 0, 0, (3, 4))
    assert "attention" not in said(page.locator("#shares-says"))


def test_without_examples(tmp_path, open_page):
    page = open_page(write_report(make_summary(make_examples()), [], tmp_path / "report.html"))
    assert page.get_by_text("made without example images").is_visible()
    assert page.locator("#histogram svg").count() == 1


def test_one_block_one_patch(tmp_path, open_page):
    example = ExampleMaps("dot", np.zeros((16, 16, 3), np.uint8), np.full((1, 1, 1), 7, np.float32), {})
    page = open_page(write_report(make_summary([example], block=0), [example], tmp_path / "report.html"))
    assert "Norm 7.00, 1.00 × the median" in point_at(page, 1, 0, 0, (1, 1))


def test_interrupted_and_skipped_are_told(tmp_path, open_page):
    examples = make_examples()
    summary = make_summary(examples) | {
        "interrupted": True,
        "skipped": [{"path": f"{i}.jpg", "reason": "truncated"} for i in range(2)],
    }
    page = open_page(write_report(summary, examples, tmp_path / "report.html"))
    assert "everything here is from the 2 images" in said(page.locator(".notice:visible"))
    assert [said(each) for each in page.locator(".skipped li").all()] == ["0.jpg: truncated", "1.jpg: truncated"]


def test_maps_survive_packing_within_two_percent(tmp_path):
    rng = np.random.default_rng(1)
    grid, depth = (5, 7), 3
    norms = [np.exp(rng.uniform(np.log(3), np.log(900), (depth, *grid))).astype(np.float32) for _ in range(2)]
    shares = [np.exp(rng.uniform(np.log(1e-4), 0, (depth, *grid))).astype(np.float32) for _ in range(2)]
    photo = np.zeros((80, 112, 3), np.uint8)
    examples = [ExampleMaps(str(i), photo, norms[i], {"class token": shares[i]}) for i in range(2)]
    maps = payload(write_report(make_summary(examples, block=1), examples, tmp_path / "report.html"))["maps"]
    assert maps["blocks"] == [0, 1, 2]
    for i, packed in enumerate(maps["examples"]):
        data = np.frombuffer(zlib.decompress(base64.b64decode(packed["maps"])), np.uint8).reshape(depth, -1)
        codes = data[:, : 2 * 35].reshape(depth, 2, *grid).astype(float)
        for codes_of, ranges, truth in (
            (codes[:, 0], maps["norm_range"], norms[i]),
            (codes[:, 1], maps["attention_range"][0], shares[i]),
        ):
            low, high = np.array(ranges).T[..., None, None]
            np.testing.assert_allclose(low * (high / low) ** (codes_of / 255), truth, rtol=0.02)
        outliers = np.unpackbits(data[:, 2 * 35 :], axis=1)[:, :35].reshape(depth, *grid)
        np.testing.assert_array_equal(outliers, norms[i] >= 100)


def test_worst_case_fits_in_five_megabytes(tmp_path, open_page):
    rng = np.random.default_rng(2)
    shape, queries = (40, 37, 37), ["class token", *(f"register {r}" for r in range(1, 5))]

    def noise() -> np.ndarray:
        return np.exp(
            rng.uniform(
                0,
                9,
                shape,
            ).astype(np.float32)
        )

    examples = [
        ExampleMaps(f"{i}.jpg", rng.integers(0, 256, (518, 518, 3), np.uint8), noise(), {q: noise() for q in queries})
        for i in range(20)
    ]
    for example in examples:
        example.norms[:23] = np.minimum(example.norms[:23], 99)
    summary = make_summary(examples, block=38)
    path = write_report(summary, examples, tmp_path / "report.html")
    check_thinned(path, open_page, kept={23, 38, 39}, least=10)


def test_a_hundred_images_fit_too(tmp_path):
    """Photographs of noise, which no format makes small."""
    examples = make_examples(count=100, depth=12, grid=(14, 14))
    path = write_report(make_summary(examples, block=11), examples, tmp_path / "report.html")
    assert path.stat().st_size <= 5_000_000
    maps = payload(path)["maps"]
    assert len(maps["examples"]) == 100
    assert maps["blocks"] == list(range(12))


def test_a_failure_leaves_the_old_report(tmp_path):
    path = tmp_path / "made" / "report.html"
    examples = make_examples()
    summary = make_summary(examples)
    write_report(summary, examples, path)
    old = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(summary | {"seconds": float("nan")}, examples, path)
    examples[1].norms[0, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"photo 1\.jpg: norms holds NaN or infinity"):
        write_report(summary, examples, path)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_examples_must_fit_the_summary(tmp_path):
    examples = make_examples()
    with pytest.raises(ValueError, match=r"norms has shape \[4, 2, 2\], but the summary has 4 blocks of 3 x 4"):
        write_report(make_summary(examples), make_examples(grid=(2, 2)), tmp_path / "report.html")
    with pytest.raises(ValueError, match="record the same for all"):
        write_report(make_summary(examples), [examples[0], make_examples(queries=())[1]], tmp_path / "report.html")
