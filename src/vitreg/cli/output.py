"""What commands print: progress and JSON on the way, one sentence where something is wrong."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Iterator

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def first_line(error: BaseException) -> str:
    """An error's message in one line."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for {error.filename}" if error.filename else ""
        return f"the disk has no room left{where}; make room, or choose another --out"
    return " ".join(str(error).split()) or type(error).__name__


def unused(stem: str, taken: set[str]) -> str:
    """A name for a picture's files; pictures of different folders may share theirs."""
    name, n = stem, 2
    while name in taken:
        name, n = f"{stem}-{n}", n + 1
    return name


def print_json(value: object) -> None:
    """The only thing on standard output of a command with `--json`."""
    print(json.dumps(value, indent=1))


def print_skipped(reasons: list[str]) -> None:
    """The first 20 files that were left out, and why."""
    if reasons:
        print(f"skipped {len(reasons)} file{'s' if len(reasons) > 1 else ''}:")
        for reason in reasons[:20]:
            print(f"  {reason}")
        if len(reasons) > 20:
            print(f"  and {len(reasons) - 20} more")


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner on stderr; silent when it is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def progress(text: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr, fed with (done, total); silent when it is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
