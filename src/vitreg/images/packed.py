"""Many strings in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class PackedStrings:
    """Strings in two buffers, read one at a time.

    Forked workers share these buffers with the process they are from. A list of a million paths they would copy, page
    by page, because looking at an object writes its reference count.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        """Takes them in; file names that are not UTF-8 come out as they went in."""
        data, ends = bytearray(), array("q", [0])
        for string in strings:
            data += string.encode(errors="surrogateescape")
            ends.append(len(data))
        self._data, self._ends = bytes(data), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return self._data[self._ends[index] : self._ends[index + 1]].decode(errors="surrogateescape")
