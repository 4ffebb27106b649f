"""Text files that say what images are: of class names, captions, or the names of other files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        ValueError: it is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def read_list(path: Path, of: str) -> list[str]:
    """The lines of a file that lists a part of a data set, without those that are empty.

    Args:
        path: of the file.
        of: what lies beside it, for the message.

    Raises:
        ValueError: there is no such file, or it is not in UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder that holds {of}")
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_rows(path: Path, *columns: str) -> Iterator[list[str]]:
    """The fields of a CSV file in these columns, row by row, without the spaces around them.

    Raises:
        ValueError: it has no such header, a row has too many fields or an empty one, or it is not in UTF-8.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if missing := [column for column in columns if column not in (rows.fieldnames or ())]:
                raise ValueError(f"its header has no {' and no '.join(missing)}")
            for row in rows:
                if None in row:
                    raise ValueError(f"line {rows.line_num} has too many fields (quote those that hold commas)")
                fields = [(row[column] or "").strip() for column in columns]
                if not all(fields):
                    raise ValueError(f"line {rows.line_num} has no {' or no '.join(columns)}")
                yield fields
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except (ValueError, csv.Error) as error:
        expected = f"expected rows of `{','.join(columns)}` under that header"
        raise ValueError(f"{path} is malformed: {error}; {expected}") from error


def read_numbered_names(path: Path) -> dict[int, str]:
    """The names of numbers in a `classes.csv`, which has columns `label` and `name`.

    Raises:
        ValueError: it is malformed, or names a number twice.
    """
    names: dict[int, str] = {}
    for label, name in read_rows(path, "label", "name"):
        if not label.isdecimal() or int(label) in names:
            what = "is named twice" if label.isdecimal() else "is no class number"
            raise ValueError(f"{path} is malformed: label {label!r} {what}; expected numbers from 0, each once")
        names[int(label)] = name
    return names


def _not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{path} is not in UTF-8 (it has the byte 0x{error.object[error.start]:02x}); save it as UTF-8")
