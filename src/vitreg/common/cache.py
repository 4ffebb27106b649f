"""What was made of files once, found again as long as these are the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from vitreg.common.disk import replacing

_SETTLED_NS = 2 * 10**9
_DAY = 86400

Made = TypeVar("Made")


def cache_folder() -> Path:
    """The folder that `VITREG_CACHE` names, else `vitreg` in the user's folder for caches."""
    if named := os.environ.get("VITREG_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitreg"


def cached(
    sources: Sequence[Path], suffix: str, write: Callable[[Path], object], read: Callable[[Path], Made]
) -> Made | None:
    """What `read` gives of the file that `write` made when these sources were first seen with their size and time.

    Args:
        sources: the files that it follows from.
        suffix: of the file's name; another one for another format.
        write: makes the file, under the name that it is given.
        read: raises whatever it likes where the file is damaged, and then it is made again.

    Returns:
        None where it can neither be read nor made: there is no room or no such folder, or `write` refuses a source.
    """
    try:
        states = [(os.path.abspath(source), source.stat()) for source in sources]
        key = _digest([path for path, _ in states])
        path = cache_folder() / f"{key}-{_digest([(s.st_size, s.st_mtime_ns) for _, s in states])}{suffix}"
        # What changes twice within the resolution of a file system's clock may keep its size and time.
        newest = max(state.st_mtime_ns for _, state in states)
        if path.is_file() and path.stat().st_mtime_ns - newest > _SETTLED_NS:
            with contextlib.suppress(Exception):
                return read(path)
        with replacing(path) as temporary:
            write(temporary)
        # Of other states of the sources, or half of one that a kill left.
        for old in path.parent.glob(f"*{key}-*"):
            with contextlib.suppress(OSError):
                if old != path and time.time() - old.stat().st_mtime > _DAY:
                    old.unlink()
        return read(path)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: nobody knows where the user's home is
        return None


def _digest(values: object) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=12).hexdigest()
