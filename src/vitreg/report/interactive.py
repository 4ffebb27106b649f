"""The pages with a slider over the blocks: one model's diagnosis, or two models on the same images."""

import json
from collections.abc import Sequence
from pathlib import Path

from vitreg.report.colors import color_table
from vitreg.report.examples import ExampleMaps, check_examples, check_pairs
from vitreg.report.packing import pack_examples
from vitreg.report.page import sources, write_page


def write_report(summary: dict, examples: Sequence[ExampleMaps], path: Path) -> Path:
    """Write a diagnosis as a self-contained HTML page.

    Args:
        summary: `Diagnosis.to_dict()`, format "vitreg-diagnosis/1".
        examples: The images to show, all with the summary's blocks and grid. May be empty.
        path: The file to write; its folder is made. The file appears whole or not at all.

    Raises:
        ValueError: An example does not fit the summary, or a value is NaN or infinite.
    """
    check_examples(summary, examples)
    return _write("diagnosis", path, summary, [examples], summary["onset_block"])


def write_comparison(summary: dict, before: Sequence[ExampleMaps], after: Sequence[ExampleMaps], path: Path) -> Path:
    """Write the comparison of two models as a self-contained HTML page.

    Args:
        summary: Format "vitreg-comparison/1". Holds both diagnoses under `before` and `after`; `model.changes` of
            the second, where it has them, are sentences that say what was done to it.
        before: The images to show, as the first model sees them. May be empty.
        after: The same images in the same order, as the second model sees them.
        path: The file to write; its folder is made. The file appears whole or not at all.

    Raises:
        ValueError: An example does not fit the summary or its counterpart, or a value is NaN or infinite.
    """
    check_pairs(summary, before, after)
    return _write("comparison", path, summary, [before, after], summary["before"]["onset_block"])


def _write(name: str, path: Path, summary: dict, models: Sequence[Sequence[ExampleMaps]], onset: int | None) -> Path:
    """The charts mark `onset` as the first block with artifacts."""
    maps = pack_examples(summary, models, keep={onset})
    colors = {colormap: color_table(colormap).tobytes().hex() for colormap in ("viridis", "magma")}
    return write_page(
        name,
        path,
        s=summary,
        num_examples=len(maps["examples"]),
        queries=maps["queries"],
        data=_script_safe({"summary": summary, "maps": maps, "colors": colors, "onset": onset}),
        js=sources("page.js", "charts.js", "measures.js", "maps.js", f"{name}.js"),
    )


def _script_safe(data: dict) -> str:
    """JSON that may stand inside <script>: nothing in it can close the element or open a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
