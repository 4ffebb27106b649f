"""What tells how far work is."""

from collections.abc import Callable

OnProgress = Callable[[int, int | None], None]
"""Called with what is done and how much there is of it, None where that is not known."""
