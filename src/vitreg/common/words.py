"""Numbers and names as readers want them; `templates/page.js` says the first three alike of what it decodes."""

from decimal import ROUND_HALF_UP, Decimal


def percent(share: float | None) -> str:
    """Two significant digits, never more than one behind the point from 1 % on: 0.0204 -> "2.0 %", 0.362 -> "36.2 %".

    Only nothing is "0 %" and only all is "100 %".
    """
    if share is None:
        return "–"
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    if 0 < share < 5e-6:
        return "<0.001 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{_fixed(100 * share, 3 if share < 0.000995 else 2 if share < 0.00995 else 1)} %"


def number(value: float | None) -> str:
    """Three significant digits without an exponent: 16.38 -> "16.4", 586.05 -> "586"."""
    if value is None:
        return "–"
    return _fixed(value, 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2)


def counted(count: int, noun: str) -> str:
    """A number and what there are so many of: (1, "image") -> "1 image", (0, "image") -> "no images"."""
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count or 'no'} {noun}{ending}"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `2 h 05 min`."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def size_in_words(num_bytes: int) -> str:
    """`5.2 GB`."""
    units = ("bytes", "kB", "MB", "GB", "TB", "PB")
    power = min(len(units) - 1, max(0, len(str(num_bytes)) - 1) // 3)
    return f"{num_bytes / 1000**power:.3g} {units[power]}"


def safe_name(name: str) -> str:
    """A model's source, a query or the like as a part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.")[-100:]


def shorten(name: str, most: int = 28) -> str:
    """At most so many characters; the middle is left out."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - (most - 1) // 2 :]}"


def _fixed(value: float, digits: int) -> str:
    """Rounded as JavaScript's `toFixed` does: exactly, and ties away from zero."""
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))
