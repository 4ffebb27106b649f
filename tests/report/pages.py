"""Reading pages: the data they carry, the pixels they paint, patches under the pointer."""

import json
import re
from pathlib import Path

EVIL = '</script><img src=x onerror="window.hacked=1">\'&.jpg'


def payload(path: Path) -> dict:
    """The data that a page carries."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)[1])


def said(locator) -> str:
    """What is read there; that some spaces do not break is seen and not read."""
    return locator.inner_text().replace("\xa0", " ")


def pixels(page, panel: int, example: int = 0) -> str:
    return page.locator(".example").nth(example).locator("canvas").nth(panel).evaluate("c => c.toDataURL()")


def hover(page, panel: int, row: int, column: int, grid: tuple[int, int], example: int = 0) -> None:
    """Move the pointer to a patch of a panel."""
    canvas = page.locator(".example").nth(example).locator("canvas").nth(panel)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(
        box["x"] + box["width"] * (column + 0.5) / grid[1], box["y"] + box["height"] * (row + 0.5) / grid[0]
    )


def brightness(page) -> int:
    """Of the page behind everything, 0 to 765."""
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)))


def check_thinned(path: Path, open_page, *, kept: set[int], least: int) -> None:
    """A page with room for the maps of some of 40 blocks holds those that matter, and says which it shows."""
    assert path.stat().st_size <= 5_000_000
    blocks = payload(path)["maps"]["blocks"]
    assert kept <= set(blocks)
    assert len(blocks) >= least, "thinned out no more than needed"
    page = open_page(path)
    missing = next(k for k in range(40) if k not in blocks)
    page.locator("#block").fill(str(missing))
    page.locator("#block-now", has_text=f"{missing} of 0..39").wait_for()
    assert "these are of block" in page.locator("#thinned").inner_text()
