"""Files that are made once: found again, made again, and done without."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vitreg.common.cache import cache_folder, cached

LONG_AGO = 10**9


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "cache"))
    return text(tmp_path / "source.txt", "one")


def text(file: Path, content: str, changed: float = LONG_AGO) -> Path:
    file.write_text(content)
    os.utime(file, (changed, changed))
    return file


def shout(*sources: Path) -> tuple[str | None, int]:
    """The sources' text in capitals, and how often it had to be made."""
    made = []

    def write(path: Path) -> None:
        made.append(path)
        path.write_text("".join(source.read_text() for source in sources).upper() + "!")

    def read(path: Path) -> str:
        if not (found := path.read_text()).endswith("!"):
            raise KeyError("the end")
        return found

    return cached(sources, ".txt", write, read), len(made)


def test_it_is_made_once_and_again_when_a_source_changes(source, tmp_path):
    other = text(tmp_path / "other.txt", "two")
    assert [shout(source, other), shout(source, other)] == [("ONETWO!", 1), ("ONETWO!", 0)]
    assert [shout(source), shout(source)] == [("ONE!", 1), ("ONE!", 0)]
    text(other, "six", LONG_AGO + 1)
    assert [shout(source, other), shout(source, other)] == [("ONESIX!", 1), ("ONESIX!", 0)]
    text(other, "three")
    assert shout(source, other) == ("ONETHREE!", 1)
    assert shout(source) == ("ONE!", 0)


def test_a_source_that_has_just_changed_is_not_trusted_to_be_the_same(source):
    for content in ("two", "six"):
        text(source, content, changed := time.time())
        assert shout(source) == (f"{content.upper()}!", 1)
        text(source, "ten", changed)
        assert shout(source) == ("TEN!", 1)


@pytest.mark.parametrize("damage", [b"", b"ONE", b"\xff"])
def test_a_damaged_file_is_made_again(source, damage):
    shout(source)
    (file,) = cache_folder().iterdir()
    file.write_bytes(damage)
    assert [shout(source), shout(source)] == [("ONE!", 1), ("ONE!", 0)]


def test_a_cache_that_cannot_be_written_is_no_error(source, tmp_path, monkeypatch):
    monkeypatch.setenv("VITREG_CACHE", str(source / "below a file"))
    assert shout(source) == (None, 0)
    monkeypatch.delenv("VITREG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert shout(source) == ("ONE!", 1)
    assert cache_folder() == tmp_path / "caches" / "vitreg"
    assert shout(tmp_path / "nowhere") == (None, 0)


def test_old_states_do_not_pile_up(source):
    shout(source)
    (first,) = cache_folder().iterdir()
    os.utime(first, (LONG_AGO + 10, LONG_AGO + 10))
    half = first.with_name(f".{first.stem}.vitreg-1.partial.txt")
    text(half, "half of it")
    text(source, "another")
    shout(source)
    left = list(cache_folder().iterdir())
    assert len(left) == 1
    assert left[0] not in (first, half)
