"""The before/after page as a reader meets it: opened from disk in a browser."""

import base64
import dataclasses
import io
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from report.comparisons import make_comparison, make_pair, renamed
from report.pages import EVIL, brightness, check_thinned, hover, payload, pixels, said
from vitreg.report import ExampleMaps, write_comparison

GRID = (3, 4)
PANELS = ("photograph", "norm before", "norm after", "attention before", "attention after")


def captions(page, example: int = 0) -> list[str]:
    """What stands under the panels of an example."""
    return [said(each) for each in page.locator(".example").nth(example).locator("figcaption").all()]


def colors(page, panel: int) -> np.ndarray:
    """The color at the middle of every patch of a panel of the first example."""
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(pixels(page, panel).partition(",")[2]))))
    rows, columns = (((np.arange(n) + 0.5) * size / n).astype(int) for n, size in zip(GRID, image.shape, strict=False))
    return image[rows[:, None], columns]


def table(page, heading: str) -> dict[str, list[str]]:
    """The rows of the table under a heading."""
    rows = page.locator("figure", has=page.get_by_role("heading", name=heading)).locator("tbody tr")
    texts = [[said(each) for each in row.locator("th, td").all()] for row in rows.all()]
    return {name: cells for name, *cells in texts}


@pytest.fixture
def open_comparison(tmp_path, open_page):
    """Write a comparison and open it."""

    def open_comparison(summary: dict, before: list[ExampleMaps], after: list[ExampleMaps], **options: object):
        return open_page(write_comparison(summary, before, after, tmp_path / "comparison.html"), **options)

    return open_comparison


def test_one_slider_drives_charts_and_all_maps(open_comparison):
    before, after = make_pair()
    page = open_comparison(make_comparison(before, after), before, after)
    assert said(page.locator("h1")) == "Removed 8.3 % of patches were outliers, now 0 %"
    assert said(page.locator("#block-now")) == "3 of 0..3 (reported)"
    assert "8.3 % of patches reach the threshold of 100 before, 0 % after" in said(page.locator("#histogram-says"))
    at_last = [pixels(page, panel) for panel in range(5)]
    assert captions(page)[1].endswith("1 outlier")
    assert captions(page)[2].endswith("no outliers")

    page.locator("#block").fill("0")
    page.locator("#block-now", has_text="0 of 0..3").wait_for()
    assert all(old != pixels(page, panel) for panel, old in enumerate(at_last))
    assert "No patch counts" in said(page.locator("#histogram-says"))
    assert said(page.locator("tr[aria-current] th")) == "0"
    median = np.median([e.norms[0] for e in after])
    assert f"median after {median:.2f}" in said(page.locator("#depth-says"))


@pytest.mark.parametrize("panel", range(5))
def test_pointing_at_a_patch_reads_it_in_every_panel(open_comparison, panel):
    before, after = make_pair()
    summary = make_comparison(before, after)
    page = open_comparison(summary, before, after)
    for row, column in [(0, 0), (1, 3)]:
        unmarked = [pixels(page, p, example=1) for p in range(5)]
        hover(page, panel, row, column, GRID, example=1)
        assert all(old != pixels(page, p, example=1) for p, old in enumerate(unmarked)), "marked in every panel"
        place, *texts = captions(page, example=1)
        assert place == f"Row {row}, column {column}"
        for i, (when, examples) in enumerate({"before": before, "after": after}.items()):
            norm, times = map(float, re.search(r"(\S+), (\S+) × median", texts[i]).groups())
            share, even = map(float, re.search(r"(\S+) %, (\S+) × even share", texts[2 + i]).groups())
            truth = examples[1].norms[3, row, column]
            attention = examples[1].attention["class token"][3, row, column]
            assert norm == pytest.approx(truth, rel=0.025)
            assert times == pytest.approx(truth / summary["blocks"][3][f"median_{when}"], rel=0.03)
            assert share == pytest.approx(100 * attention, rel=0.03, abs=0.06)
            assert even == pytest.approx(12 * attention, rel=0.03, abs=0.006)
            assert (", outlier" in texts[i]) == (truth >= 100)
        spoken = page.locator(".spoken").nth(1).text_content().replace("\xa0", " ")
        assert all(f"{name}: {text}" in spoken for name, text in zip(PANELS, [place, *texts], strict=True))


def test_arrow_keys_move_over_patches(open_comparison):
    before, after = make_pair()
    page = open_comparison(make_comparison(before, after), before, after)
    page.locator(".example").first.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert captions(page)[0] == "Row 1, column 1"
    page.keyboard.press("Escape")
    assert captions(page)[0] == ""
    assert page.locator(".spoken").first.text_content() == ""


def test_before_and_after_share_a_color_scale(open_comparison):
    before, after = make_pair(count=1)
    for when in (before, after):
        when[0].norms[3], when[0].attention["class token"][3] = 20, 0.02
    before[0].norms[3, 2, 2] = 80
    after[0].attention["class token"][3, 1, 1] = 0.5
    page = open_comparison(make_comparison(before, after), before, after)
    for old, new, changed in ((1, 2, [2, 2]), (3, 4, [1, 1])):
        differing = (colors(page, old) != colors(page, new)).any(-1)
        assert np.argwhere(differing).tolist() == [changed]


def test_histograms_are_overlaid(open_comparison):
    before, after = make_pair()
    page = open_comparison(make_comparison(before, after), before, after)
    ends = [bars.evaluate("p => p.getBBox().x + p.getBBox().width") for bars in page.locator("#histogram .bars").all()]
    threshold = page.locator("#histogram .threshold").evaluate("l => l.x1.baseVal.value")
    assert len(ends) == 2
    assert ends[1] < threshold < ends[0], "only before are there patches beyond the threshold"
    assert said(page.locator(".key")).split() == ["before", "after"]


def test_a_query_that_only_one_model_has(open_comparison):
    before, after = make_pair(after=("class token", "register 1"))
    page = open_comparison(make_comparison(before, after, registers_after=1), before, after)
    page.locator("#query").select_option(label="register 1")
    assert page.get_by_text("no register 1 before").count() == len(before)
    assert page.get_by_text("no register 1 before").first.is_visible()
    canvases = page.locator(".example").first.locator("canvas")
    assert [canvas.is_visible() for canvas in canvases.all()] == [True, True, True, False, True]
    hover(page, 4, 1, 2, GRID)
    truth = after[0].attention["register 1"][3, 1, 2]
    share = re.search(r"([\d.]+) %", captions(page)[4])[1]
    assert float(share) == pytest.approx(100 * truth, rel=0.03, abs=0.06)
    page.locator("#query").select_option(label="class token")
    assert page.get_by_text("no register 1 before").count() == 0
    assert canvases.nth(3).is_visible()


def test_maps_of_both_models_survive_packing(tmp_path):
    """Queries are matched by name, in whatever order the models have them."""
    rng = np.random.default_rng(1)
    names = (["class token", "register 1"], ["register 2", "register 1", "class token"])
    models = make_pair(*names, grid=(5, 7))
    for examples in models:
        for example in examples:
            for maps in (example.norms, *example.attention.values()):
                maps[...] = np.exp(rng.uniform(np.log(0.5), np.log(900), maps.shape))
    summary = make_comparison(*models) | {"block": 1}
    maps = payload(write_comparison(summary, *models, tmp_path / "comparison.html"))["maps"]
    ranges = {"norm": maps["norm_range"], **dict(zip(maps["queries"], maps["attention_range"], strict=True))}
    assert set(ranges) == {"norm", "class token", "register 1", "register 2"}
    for i, packed in enumerate(maps["examples"]):
        data = np.frombuffer(zlib.decompress(base64.b64decode(packed["maps"])), np.uint8).reshape(4, -1)
        for examples, queries, expected in zip(models, maps["models"], names, strict=True):
            assert sorted(queries) == sorted(expected)
            for name in ("norm", *queries):
                codes, data = data[:, :35].reshape(4, 5, 7).astype(float), data[:, 35:]
                low, high = np.array(ranges[name]).T[..., None, None]
                truth = examples[i].norms if name == "norm" else examples[i].attention[name]
                np.testing.assert_allclose(low * (high / low) ** (codes / 255), truth, rtol=0.02)
            outliers, data = np.unpackbits(data[:, :5], axis=1)[:, :35].reshape(4, 5, 7), data[:, 5:]
            np.testing.assert_array_equal(outliers, examples[i].norms >= 100)
        assert data.size == 0


def test_the_table_says_what_changed(open_comparison):
    before, after = make_pair()
    summary = make_comparison(before, after, registers_after=2)
    page = open_comparison(summary, before, after)
    figures = table(page, "What changed")
    assert figures == {
        "Outlier patches (norm 100 or more)": ["8.3 %", "0 %"],
        "Largest patch norm": ["400", f"{max(e.norms[3].max() for e in after):.1f}"],
        "99th percentile": ["400", f"{np.quantile([e.norms[3] for e in after], 0.99):.1f}"],
        "Median patch norm": [f"{np.median([e.norms[3] for e in when]):.1f}" for when in (before, after)],
        "Register norm": ["–", "33.0, 34.0"],
        "Attention on outliers": ["25.0 %", "25.0 %"],
        "Attention on registers": ["–", "40.0 %"],
        "Largest value in the block (float16: up to 65504)": ["8000", "8000"],
        "Rounding to int8 changes a token by": ["25.0 %", "25.0 %"],
        "Clean patches at the output, cosine": ["0.9877"],
        "Class token at the output, cosine": ["0.9988"],
        "Output of the head, cosine": ["0.9123"],
        "Images with the same prediction": ["50.0 %"],
    }
    assert table(page, "The two models")["Registers"] == ["none", "2"]
    assert "register 2 after 34" in said(page.locator("#tokens-says"))
    assert "on registers before" not in said(page.locator("#shares-says"))
    assert "on registers after 40.0 %" in said(page.locator("#shares-says"))
    assert [said(each) for each in page.locator("tr[data-block='2'] td").all()][1:5] == [
        "8.3 %",
        "0 %",
        *figures["Largest patch norm"][:1],
        f"{summary['blocks'][2]['max_after']:.1f}",
    ]


@pytest.mark.parametrize(
    ("outcome", "flag"), [("removed", "good"), ("partly removed", "middling"), ("not removed", "bad")]
)
def test_outcomes(tmp_path, outcome, flag):
    before, after = make_pair()
    summary = make_comparison(before, after, outcome=outcome)
    page = write_comparison(summary, [], [], tmp_path / "comparison.html").read_text("utf-8")
    headline = "8.3\xa0% of patches were outliers, now 0\xa0%"
    assert f'<h1><span class="flag {flag}">{outcome.capitalize()}</span> {headline}</h1>' in page


def test_nothing_to_remove(open_comparison):
    _, clean = make_pair()
    summary = make_comparison(clean, clean, outcome="nothing to remove", threshold=None)
    page = open_comparison(summary, clean, clean)
    block = summary["blocks"][3]
    ratio = block["max_before"] / block["median_before"]
    headline = f"Nothing to remove the largest patch norm is {ratio:.2f} × the median"
    assert said(page.locator("h1")).split() == headline.split()
    assert page.get_by_text("No patch is an outlier after any block, in either model.").is_visible()
    assert page.locator("#outliers, #histogram .threshold").count() == 0
    assert "Outlier patches are outlined" not in said(page.locator("main"))


def test_what_was_done_is_told(tmp_path):
    before, after = make_pair()
    summary = make_comparison(before, after)
    path = tmp_path / "comparison.html"
    assert "Done to the second" not in write_comparison(summary, before, after, path).read_text("utf-8")
    summary["after"]["model"]["changes"] = ["`register 1` was added.", "Unit 417 of block 7 was moved."]
    page = write_comparison(summary, before, after, path).read_text("utf-8")
    assert "Done to the second" in page
    assert "<li><code>register 1</code> was added.</li>" in page
    assert "<li>Unit 417 of block 7 was moved.</li>" in page


def test_without_class_token_and_head(open_comparison):
    before, after = make_pair(before=(), after=())
    summary = make_comparison(before, after) | dict.fromkeys(("cls_similarity", "head_agreement", "head_similarity"))
    page = open_comparison(summary, before, after)
    assert page.locator(".example").first.locator("canvas").count() == 3
    assert page.locator("#query, #shares, #tokens").count() == 0
    assert page.get_by_text("There is no class token whose attention could be measured.").is_visible()
    figures = table(page, "What changed")
    assert not any("Attention" in name for name in figures)
    assert figures["Class token at the output, cosine"] == ["no class token"]
    assert figures["Output of the head, cosine"] == figures["Images with the same prediction"] == ["no head"]


def test_without_examples(open_comparison):
    page = open_comparison(make_comparison(*make_pair()), [], [])
    assert page.get_by_text("made without example images").is_visible()
    assert page.locator("#histogram svg").count() == 1


def test_names_are_text_never_markup(open_comparison):
    before, after = (renamed(examples, EVIL) for examples in make_pair(before=(EVIL,), after=(f"{EVIL}2",)))
    summary = make_comparison(before, after)
    for which in ("before", "after"):
        summary[which]["model"] |= {"name": EVIL, "family": EVIL, "changes": [EVIL]}
        summary[which]["threshold_rule"] = EVIL
    summary |= {"skipped": [{"path": EVIL, "reason": "broken"}], "verdict": [EVIL]}
    page = open_comparison(summary, before, after)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.locator(".example h3").first.text_content() == EVIL
    assert page.locator(".kicker strong").all_text_contents() == [EVIL, EVIL]
    assert page.locator(".absent:visible").first.text_content() == f"no {EVIL} after"
    assert page.locator(".skipped code").text_content() == EVIL
    assert table(page, "The two models")["Name"] == [EVIL, EVIL]


@pytest.mark.parametrize("width", [320, 390, 900])
def test_no_sideways_scrolling(open_comparison, width):
    registers = [f"register {r}" for r in range(1, 5)]
    before, after = make_pair(after=("class token", *registers))
    summary = make_comparison(before, after, registers_after=4)
    summary["skipped"] = [{"path": "folder/" * 20 + "x.jpg", "reason": "cannot be decoded"}]
    for which in ("before", "after"):
        summary[which]["model"]["name"] = "a_very_long_model_name_" * 5
    summary["after"]["model"]["changes"] = ["block_7_unit_417_" * 8]
    page = open_comparison(summary, before, after, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_on_a_phone_before_and_after_stand_side_by_side(open_comparison):
    before, after = make_pair()
    page = open_comparison(make_comparison(before, after), before, after, width=390)
    boxes = [panel.bounding_box() for panel in page.locator(".example").first.locator("canvas").all()]
    for old, new in (boxes[1:3], boxes[3:5]):
        assert old["y"] == new["y"]
        assert old["x"] + old["width"] < new["x"]
        assert old["width"] > 150
    labels = "f => getComputedStyle(f, '::before').content"
    shown = [caption.evaluate(labels).strip('"') for caption in page.locator("figcaption[data-name]").all()[:5]]
    assert shown == ["", *PANELS[1:]]


def test_dark_and_light(tmp_path, open_page):
    before, after = make_pair()
    path = write_comparison(make_comparison(before, after), before, after, tmp_path / "comparison.html")
    light, dark = (brightness(open_page(path, color_scheme=scheme)) for scheme in ("light", "dark"))
    assert light > 600 > 200 > dark


def test_interrupted_and_skipped_are_told(open_comparison):
    before, after = make_pair()
    summary = make_comparison(before, after) | {
        "interrupted": True,
        "skipped": [{"path": "a.jpg", "reason": "truncated"}],
    }
    page = open_comparison(summary, before, after)
    assert "from the 2 images seen until then" in said(page.locator(".notice:visible"))
    assert [said(each) for each in page.locator(".skipped li").all()] == ["a.jpg: truncated"]
    assert "comparison.json" in said(page.locator("footer"))


def test_worst_case_fits_in_five_megabytes(tmp_path, open_page):
    """Noise does not compress: 20 images, 40 blocks, 37 x 37 patches, five queries, two models."""
    rng = np.random.default_rng(2)
    queries = ["class token", *(f"register {r}" for r in range(1, 5))]
    photos = rng.integers(0, 256, (20, 518, 518, 3), np.uint8)

    def noise() -> np.ndarray:
        return np.exp(rng.uniform(0, 9, (40, 37, 37)).astype(np.float32))

    before, after = (
        [ExampleMaps(f"{i}.jpg", photo, noise(), {q: noise() for q in queries}) for i, photo in enumerate(photos)]
        for _ in range(2)
    )
    for example in before:
        example.norms[:23] = np.minimum(example.norms[:23], 99)
    summary = make_comparison(before, after)
    summary["block"] = 38
    summary["before"]["onset_block"] = 23
    path = write_comparison(summary, before, after, tmp_path / "comparison.html")
    check_thinned(path, open_page, kept={23, 38, 39}, least=5)


def test_a_failure_leaves_the_old_page(tmp_path):
    path = tmp_path / "made" / "comparison.html"
    before, after = make_pair()
    summary = make_comparison(before, after)
    assert write_comparison(summary, before, after, path) == path
    old = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_comparison(summary | {"patch_similarity": float("nan")}, before, after, path)
    after[1].attention["class token"][0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"after: photo 1\.jpg: class token holds NaN or infinity"):
        write_comparison(summary, before, after, path)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == ["comparison.html"]


def test_both_models_must_have_seen_the_same(tmp_path):
    before, after = make_pair()
    summary = make_comparison(before, after)
    path = tmp_path / "comparison.html"
    for others, message in (
        (after[:1], "2 examples before and 1 after"),
        (after[::-1], r"photo 0\.jpg of 48 x 64 pixels before, but photo 1\.jpg of 48 x 64 after"),
        ([dataclasses.replace(e, photo=e.photo[:32]) for e in after], "photo 0.jpg of 32 x 64 after"),
        (make_pair(grid=(2, 2))[1], r"after: photo 0\.jpg: norms has shape \[4, 2, 2\]"),
        (make_pair(depth=5)[1], r"after: photo 0\.jpg: norms has shape \[5, 3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            write_comparison(summary, before, others, path)
    summary["after"]["grid"] = [2, 6]
    with pytest.raises(ValueError, match="after: the diagnosis has 4 blocks of 2 x 6 patches"):
        write_comparison(summary, before, after, path)
    assert not path.exists()
