"""The diagnosis of one model as an HTML page."""

from collections.abc import Sequence
from pathlib import Path

from vitreg.report.examples import ExampleMaps, check_examples
from vitreg.report.packing import pack_examples
from vitreg.report.page import write_page


def write_report(summary: dict, examples: Sequence[ExampleMaps], path: Path) -> Path:
    """Write a diagnosis as a self-contained HTML page.

    Args:
        summary: `Diagnosis.to_dict()`, format "vitreg-diagnosis/1".
        examples: The images to show, all with the summary's blocks and grid. May be empty.
        path: The file to write; its folder is made. The file appears whole or not at all.

    Returns:
        `path`.

    Raises:
        ValueError: An example does not fit the summary, or a value is NaN or infinite.
    """
    check_examples(summary, examples)
    onset = summary["onset_block"]
    maps = pack_examples(summary, [examples], keep={onset})
    return write_page("diagnosis", path, summary=summary, maps=maps, onset=onset)
