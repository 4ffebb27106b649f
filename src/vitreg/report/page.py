"""One HTML file that opens from disk, without a network, and can be sent to a colleague."""

from pathlib import Path
from typing import Any

from vitreg.common.disk import replace_text
from vitreg.common.words import counted, number, percent

TEMPLATES = Path(__file__).parent / "templates"


def write_page(name: str, path: Path, **values: Any) -> Path:
    """Write the page `templates/NAME.html.j2`, with its style and these values; whole or not at all.

    Args:
        name: of the template.
        path: The file to write; its folder is made.
        values: What the template asks for. Every page reads `verdict`, `seconds` and `version` of `s`, the summary.
    """
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
    page = environment.get_template(f"{name}.html.j2").render(css=sources("page.css", f"{name}.css"), **values)
    replace_text(path, page)
    return path


def sources(*names: str) -> str:
    """Styles or scripts, one after the other."""
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8").rstrip() for name in names)


def _unbroken(text: str) -> str:
    """A line may end before a unit nowhere."""
    return text.replace(" %", "\u00a0%").replace(" ×", "\u00a0×")
