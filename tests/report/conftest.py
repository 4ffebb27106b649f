"""A browser to read reports with."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitreg.report.sheet import Sheet


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium of this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((found for name in names if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=executable, args=[*flags, "--disable-sync", "--no-first-run"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """Open a report from disk; at the end of the test nothing may have gone wrong or left the machine."""
    complaints: list[str] = []
    pages = []

    def open_page(path: Path, width: int = 1200, ready: str = "html[data-ready]", **options: object):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(page)
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or complaints.append(r.url))
        page.goto(path.as_uri())
        # Not wait_for_function, which evaluates strings: the page's own policy forbids that.
        page.locator(ready).first.wait_for(state="attached")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


@pytest.fixture
def read_png() -> Callable[[Path], np.ndarray]:
    """Pixels of an image file."""
    return lambda path: np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that were written."""
    figures = []
    write = Sheet.write
    monkeypatch.setattr(Sheet, "write", lambda self, path: (figures.append(self.figure), write(self, path))[1])
    return figures
