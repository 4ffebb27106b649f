"""The diagnosis as one HTML file that opens from disk, without a network, and can be sent to a colleague."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from vitreg.report.examples import ExampleMaps, check_examples
from vitreg.report.packing import MAX_BYTES, pack_examples

TEMPLATES = Path(__file__).parent / "templates"


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
    # What is not an example is a few hundred bytes a block; a tenth of the budget covers it many times over.
    page = _render(summary, pack_examples(summary, examples, max_bytes=MAX_BYTES * 9 // 10))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _render(summary: dict, packed: dict) -> str:
    import jinja2
    import matplotlib

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": _percent, "number": _number}
    tables = {name: matplotlib.colormaps[name](range(256), bytes=True) for name in ("viridis", "magma")}
    colours = {name: table[:, :3].tobytes().hex() for name, table in tables.items()}
    return environment.get_template("diagnosis.html.j2").render(
        s=summary,
        reported=summary["blocks"][summary["block"]],
        num_examples=len(packed["examples"]),
        queries=packed["queries"],
        data=_script_safe({"summary": summary, "maps": packed, "colours": colours}),
        css=(TEMPLATES / "diagnosis.css").read_text(encoding="utf-8"),
        js=(TEMPLATES / "diagnosis.js").read_text(encoding="utf-8"),
    )


def _script_safe(data: dict) -> str:
    """JSON that may stand inside <script>: nothing in it can close the element or open a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _percent(share: float | None) -> str:
    """Two significant digits: 0.0204 -> "2.0 %"."""
    if share is None:
        return "–"
    if share == 0 or share >= 0.9995:
        return f"{100 * share:.0f} %"
    digits = 3 if share < 0.001 else 2 if share < 0.01 else 1
    return f"{100 * share:.{digits}f} %"


def _number(value: float | None) -> str:
    """Three significant digits without an exponent: 16.38 -> "16.4", 586.05 -> "586"."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
