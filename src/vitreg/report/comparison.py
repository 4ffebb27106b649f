"""Two models on the same images, before and after something was done, as an HTML page."""

from collections.abc import Sequence
from pathlib import Path

from vitreg.report.examples import ExampleMaps, check_pairs
from vitreg.report.packing import pack_examples
from vitreg.report.page import write_page


def write_comparison(summary: dict, before: Sequence[ExampleMaps], after: Sequence[ExampleMaps], path: Path) -> Path:
    """Write the comparison of two models as a self-contained HTML page.

    Args:
        summary: Format "vitreg-comparison/1". Holds both diagnoses under `before` and `after`; `model.changes` of
            the second, where it has them, are sentences that say what was done to it.
        before: The images to show, as the first model sees them. May be empty.
        after: The same images in the same order, as the second model sees them.
        path: The file to write; its folder is made. The file appears whole or not at all.

    Returns:
        `path`.

    Raises:
        ValueError: An example does not fit the summary or its counterpart, or a value is NaN or infinite.
    """
    check_pairs(summary, before, after)
    onset = summary["before"]["onset_block"]
    maps = pack_examples(summary, [before, after], keep={onset})
    return write_page("comparison", path, summary=summary, maps=maps, onset=onset)
