"""Files that a kill at any moment leaves whole, in folders that one process writes to."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
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


def check_room(folder: Path, num_bytes: int, of: str) -> None:
    """Refuse now what would fill the disk hours later.

    Args:
        folder: where it is to go.
        num_bytes: what it takes.
        of: what it is, for the message.

    Raises:
        ValueError: there is less room.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"{of} take {size_in_words(num_bytes)}, but {folder} has room for {size_in_words(free)}; make room, choose "
            "another --out, or keep less"
        )


def size_in_words(num_bytes: int) -> str:
    """`5.2 GB`."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, len(str(num_bytes)) - 1) // 3)
    return f"{num_bytes / 1000**power:.3g} {units[power]}"


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
