"""Files that a kill at any moment leaves whole, in folders that one process writes to."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from vitreg.common.words import size_in_words

_PARTIAL = re.compile(r"\..+\.vitreg-\d+\.partial(\.[^.]+)?")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a failure to write into a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else getattr(error, "errno", None)
        reason = os.strerror(code) if code else error
        raise ValueError(f"cannot write to {folder}: {reason}; make room, or choose another folder") from error


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


def replace_text(path: Path, text: str) -> None:
    """Write a file; as `replacing`."""
    with replacing(path) as temporary:
        # Names of files need not be text, and must not cost what was computed.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: object) -> None:
    """Write what JSON can hold; as `replacing`."""
    replace_text(path, json.dumps(value, indent=1))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name, of the same suffix, to write a file under, which then takes the place of `path`, whose folder is made.

    Who reads `path` sees the old file or the new one, whole; where writing fails, nothing is left of the new one.

    Raises:
        ValueError: it cannot be written.
    """
    # Not one name for all: two processes that write the same file would write into each other's.
    temporary = path.with_name(f".{path.stem}.vitreg-{os.getpid()}.partial{path.suffix}")
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            # safetensors lets only the owner read what it writes.
            temporary.chmod(mode)
            put_in_place(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A folder to write files in, each of which then takes its place in `folder`, which is made, as with `replacing`.

    Raises:
        ValueError: they cannot be written.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial") as temporary:
            yield Path(temporary)
            for file in sorted(Path(temporary).iterdir()):
                with replacing(folder / file.name) as name:
                    # The folder may be another disk.
                    shutil.move(file, name)


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a file, or a folder of files, its name once what was written is on the disk.

    Raises:
        OSError: the disk has no room, or there is something else at `path`.
    """
    for each in (*(temporary.iterdir() if temporary.is_dir() else ()), temporary):
        # Windows flushes what is open for writing only, and no folders.
        if each.is_file() or os.name != "nt":
            handle = os.open(each, os.O_RDWR if each.is_file() else os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    os.replace(temporary, path)


def lock(folder: Path, doing: str, *, shared: bool = False) -> TextIO | None:
    """Keep other processes out of a folder until `unlock`, or until this process ends.

    What a process that was killed had half written there is removed.

    Args:
        folder: which exists.
        doing: what the other process does, for the message: `"trains in"`.
        shared: keep those out only that do not share it.

    Raises:
        ValueError: another process has locked it, or it cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return None
    with writing(folder):
        file = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        # Not flock: workers would inherit it, and hold it for a while after a kill.
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise ValueError(f"another process {doing} {folder}; wait for it, or stop it") from None
    if not _has_its_name(file):  # another process has just unlocked the folder
        file.close()
        return lock(folder, doing, shared=shared)
    if not shared:
        remove_partial_files(folder)
    return file


def remove_partial_files(folder: Path) -> None:
    """What processes that were killed had half written; nobody may be writing."""
    # A folder of the user's may hold the partial downloads of others.
    for left in folder.glob(".*.partial*"):
        if _PARTIAL.fullmatch(left.name) and left.is_file():
            left.unlink()


def unlock(file: TextIO | None) -> None:
    """Give a folder back that `lock` kept, as it would be without."""
    if file is not None:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        file.close()


def _has_its_name(file: TextIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False
