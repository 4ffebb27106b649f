"""Files that a kill at any moment leaves whole, in folders that one process writes to."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write into a sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot write to {path}: {reason}; make room, or choose another --out") from error


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, whole."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which then takes the place of `path` and is on the disk, or nothing is left of it.

    Raises:
        OSError: there is no room.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors lets only the owner read what it writes.
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def lock(folder: Path, doing: str) -> TextIO | None:
    """Keep other processes out of a folder until the file that is returned is closed, or this process ends.

    Args:
        folder: which exists.
        doing: what the other process does, for the message: `"trains in"`.

    Raises:
        ValueError: another process has locked it, or it cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return None
    with writing(folder):
        file = (folder / ".lock").open("w")
    try:
        # Not flock: workers would inherit it, and hold it for a while after a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise ValueError(f"another process {doing} {folder}; wait for it, or stop it") from None
    return file
