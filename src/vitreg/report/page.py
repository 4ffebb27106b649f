"""One HTML file that opens from disk, without a network, and can be sent to a colleague."""

import json
from pathlib import Path
from typing import Any

from vitreg.common.disk import replace_text
from vitreg.common.words import counted, number, percent
from vitreg.report.colors import color_table

TEMPLATES = Path(__file__).parent / "templates"


def write_page(name: str, path: Path, *, summary: dict, maps: dict, onset: int | None) -> Path:
    """Write the page `templates/NAME.html.j2` with its style and script; the file appears whole or not at all.

    Args:
        name: "diagnosis" or "comparison".
        path: The file to write; its folder is made.
        summary: What the page tells. Every page reads `block`, `blocks`, `grid`, `image_size`, `verdict`, `skipped`,
            `interrupted`, `num_images`, `seconds` and `version`.
        maps: Of `pack_examples`.
        onset: The block that the charts mark as the first with artifacts.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    colors = {name: color_table(name).tobytes().hex() for name in ("viridis", "magma")}
    return write_still_page(
        name,
        path,
        s=summary,
        num_examples=len(maps["examples"]),
        queries=maps["queries"],
        data=_script_safe({"summary": summary, "maps": maps, "colors": colors, "onset": onset}),
        js=_sources("page.js", "charts.js", "maps.js", f"{name}.js"),
    )


def write_still_page(name: str, path: Path, **values: Any) -> Path:
    """Write the page `templates/NAME.html.j2`, with its style and these values; whole or not at all."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": lambda share: _unbroken(percent(share)), "number": number}
    environment.filters |= {"counted": counted, "unbroken": _unbroken}
    page = environment.get_template(f"{name}.html.j2").render(css=_sources("page.css", f"{name}.css"), **values)
    replace_text(path, page)
    return path


def _unbroken(text: str) -> str:
    """A line may end before a unit nowhere."""
    return text.replace(" %", "\u00a0%").replace(" ×", "\u00a0×")


def _sources(*names: str) -> str:
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8").rstrip() for name in names)


def _script_safe(data: dict) -> str:
    """JSON that may stand inside <script>: nothing in it can close the element or open a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
