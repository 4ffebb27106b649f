"""Class numbers, and the names of the classes, of sets that store numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitreg.images.listed import read_numbered_names

_MOST = 10**7
"""Classes; what is beyond is an identifier, and a name for each number below it would not fit into memory."""


def classes_of(labels: Sequence[int], names: tuple[str, ...], source: str) -> tuple[str, ...]:
    """Names of the classes that labels are numbers of; the numbers themselves where no names are known.

    There are none without labels, nor where every label is -1, which is how test sets hide them.

    Raises:
        ValueError: a label is negative or has no name.
    """
    lowest, highest = min(labels, default=-1), max(labels, default=-1)
    if lowest == highest == -1:
        return ()
    if lowest < 0:
        raise ValueError(f"{source} has the label {lowest}; labels must be class numbers, from 0")
    if names and highest >= len(names):
        raise ValueError(
            f"{source} has the label {highest}, but names only {len(names)} classes; give every label a name"
        )
    if highest >= _MOST:
        raise ValueError(f"{source} has the label {highest}; labels must be class numbers, from 0 without large gaps")
    return names or tuple(str(label) for label in range(highest + 1))


def read_class_names(folder: Path) -> tuple[str, ...]:
    """The names in a folder's `classes.csv`, which has columns `label` and `name`; none where there is no such file.

    Raises:
        ValueError: the file is malformed, or its labels are not 0, 1, 2 and so on.
    """
    path = folder / "classes.csv"
    if not path.is_file():
        return ()
    names = read_numbered_names(path)
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{path} must name the classes 0 to {len(names) - 1}, each once")
    return tuple(names[label] for label in range(len(names)))


def check_same_classes(train: tuple[str, ...], held_out: tuple[str, ...], train_name: str, held_out_name: str) -> None:
    """Refuses labels that mean different classes.

    Raises:
        ValueError: the two have different classes; the message says which.
    """
    if not train or not held_out or train == held_out:
        return
    if train == tuple(str(label) for label in range(len(train))) and held_out == train[: len(held_out)]:
        return
    lacking = [
        f"{name} lacks {some_names(missing)}"
        for name, ours, theirs in ((train_name, train, held_out), (held_out_name, held_out, train))
        if (missing := [each for each in theirs if each not in set(ours)])
    ]
    why = "; ".join(lacking) or "their order differs"
    raise ValueError(f"{train_name} and {held_out_name} must have the same classes, but {why}")


def some_names(names: Sequence[str]) -> str:
    """The first five, for a message, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
