"""Several models against one, as an HTML page: a table that leads to the reports."""

from pathlib import Path
from typing import Any

from vitreg.report.page import write_page


def write_comparisons(summary: dict[str, Any], path: Path) -> Path:
    """Write the page; it appears whole or not at all.

    Args:
        summary: format "vitreg-comparisons/1"; the report of each model is in a folder of its name beside the page.
        path: the file to write; its folder is made.
    """
    return write_page("comparisons", path, s=summary)
