"""Numbers and names as readers want them."""


def percent(share: float | None) -> str:
    """Two significant digits: 0.0204 -> "2.0 %"."""
    if share is None:
        return "–"
    if share == 0 or share >= 0.9995:
        return f"{100 * share:.0f} %"
    digits = 3 if share < 0.001 else 2 if share < 0.01 else 1
    return f"{100 * share:.{digits}f} %"


def number(value: float | None) -> str:
    """Three significant digits without an exponent: 16.38 -> "16.4", 586.05 -> "586"."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def shorten(name: str, most: int = 28) -> str:
    """At most so many characters; the middle is left out."""
    return name if len(name) <= most else f"{name[: most - 9]}…{name[-8:]}"
