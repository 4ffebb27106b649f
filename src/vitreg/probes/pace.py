"""How long work takes, told from its first steps."""

from __future__ import annotations

import time
from collections.abc import Callable

from vitreg.common.progress import OnProgress
from vitreg.common.words import duration
from vitreg.probes.results.score import ProbeResult

_SECONDS = 2.0
_SLOW = 4 * _SECONDS
_WORTH_TELLING = 20.0


class _Enough(Exception):
    """Ends work that was begun to see how long it takes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class _Pace:
    """The rate of work, from its reports."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._first: tuple[int, float] | None = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def left(self, done: int, total: int) -> float | None:
        """Seconds until all is done; None until there is enough to tell.

        Until the first report work is set up, and what an earlier run did is counted.
        """
        now = self.elapsed
        if self._first is None:
            self._first = done, now
            return (total - done) * now / done if now >= _SLOW else None
        first, at = self._first
        if now < _SECONDS or done == first:
            return None
        return (total - done) * (now - at) / (done - first)


def first_steps(ask: Callable[[OnProgress], ProbeResult], on_progress: OnProgress) -> tuple[ProbeResult | None, float]:
    """Ask a probe for two seconds, or two steps where these take longer.

    Returns:
        Its answer, if that was enough, else None and how many seconds it will take from the start.
    """
    pace = _Pace()

    def watch(done: int, total: int | None) -> None:
        assert total is not None, "probes know how much there is"
        on_progress(done, total)
        left = pace.left(done, total)
        if left is not None and done < total:
            raise _Enough(pace.elapsed + left)

    try:
        return ask(watch), pace.elapsed
    except _Enough as enough:
        return None, enough.seconds


def telling_how_long(tell: Callable[[str], None], on_progress: OnProgress) -> OnProgress:
    """Reports of progress that also tell, once and where it is worth it, how long the rest will take."""
    pace, told = _Pace(), False

    def watch(done: int, total: int | None) -> None:
        assert total is not None, "probes know how much there is"
        nonlocal told
        on_progress(done, total)
        if not told and (left := pace.left(done, total)) is not None:
            told = True
            if left >= _WORTH_TELLING:
                tell(duration(left))

    return watch
