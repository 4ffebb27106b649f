"""What commands print: progress and JSON on the way, one sentence where something is wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from vitreg.common.words import counted, duration

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from vitreg import Comparison, Diagnosis
    from vitreg.images.stream import SkippedImage

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

INTERVAL = 60.0
"""Seconds between the lines that a command prints where no terminal shows a bar."""

Progress = Callable[..., None]
"""Told how far a command is: done, of how many or None, and a few words on it if there are any."""

_typed: list[str] = []


def remember(args: list[str]) -> None:
    """Keep what was typed after `vitreg`, for the reports."""
    _typed[:] = args


def command_line() -> str | None:
    """What was typed, as it can be typed again."""
    return shlex.join(["vitreg", *_typed]) if _typed else None


def first_line(error: BaseException) -> str:
    """An error's message in one line."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for {error.filename}" if error.filename else ""
        return f"the disk has no room left{where}; make room, or choose another --out"
    return " ".join(str(error).split()) or type(error).__name__


def unused(stem: str, taken: set[str]) -> str:
    """A name for an image's files; images of different folders may share theirs."""
    name, n = stem, 2
    while name in taken:
        name, n = f"{stem}-{n}", n + 1
    return name


def print_json(value: object) -> None:
    """The only thing on standard output of a command with `--json`."""
    print(json.dumps(value, indent=1))


def print_skipped(skipped: Sequence[SkippedImage]) -> None:
    """The first 20 files that could not be read, and why."""
    if skipped:
        print(f"skipped {counted(len(skipped), 'file')}:")
        for skip in skipped[:20]:
            print(f"  {skip.reason}")
        if len(skipped) > 20:
            print(f"  and {len(skipped) - 20} more")


def print_findings(
    found: Diagnosis | Comparison,
    skipped: Sequence[SkippedImage],
    report: Path,
    *,
    as_json: bool,
    besides: dict[str, object],
) -> None:
    """Sentences, or JSON with what a command that did more has to say besides."""
    if as_json:
        print_json({**besides, **found.to_dict(), "command": command_line(), "report": str(report)})
        return
    for sentence in found.verdict:
        print(sentence)
    print_skipped(skipped)
    print(f"{counted(found.num_images, 'image')} in {found.seconds:.1f} s; the report is {report}")


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner on stderr; silent when it is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def progress(text: str, *, interval: float | None = None, console: Console | None = None) -> Iterator[Progress]:
    """A bar on stderr; where that is no terminal, a line every so many seconds, by default `INTERVAL`."""
    from rich.console import Console

    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _lines(text, INTERVAL if interval is None else interval)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    words = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=44))
    columns = (words, BarColumn(bar_width=10), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=None)

        def advance(done: int, total: int | None, note: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{text}: {note}" if note else text)

        yield advance


def _lines(text: str, interval: float) -> Progress:
    since, before = time.monotonic(), None

    def advance(done: int, total: int | None, note: str = "") -> None:
        nonlocal since, before
        # What a command finds done already says nothing about its speed.
        before, now = done if before is None else before, time.monotonic()
        if now - since < interval:
            return
        told = [f"{text}: {done:,}" if total is None else f"{text}: {done:,} of {total:,}"]
        if (rate := (done - before) / (now - since)) > 0:
            told += [f"{rate:.3g} per second"]
            told += [] if total is None else [f"{duration((total - done) / rate)} left"]
        print(", ".join([*told, note] if note else told), file=sys.stderr, flush=True)
        since, before = now, done

    return advance
