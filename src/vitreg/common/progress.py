"""What tells how far work is."""

from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Called with what is done and how much there is of it."""
