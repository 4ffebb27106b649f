"""Files of tensors with a note that says what they are of: shards, answers, states of trainings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitreg.common.disk import replacing

UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, TypeError)
"""What reading a damaged file, or one of something else, raises."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all; a `ValueError` where there is no room."""
    with replacing(path) as temporary:
        # One entry: safetensors writes several in no order.
        save_file(dict(tensors), temporary, {"vitreg": json.dumps(note)})


@contextmanager
def open_tensors(path: Path) -> Iterator[tuple[safe_open, dict[str, Any]]]:
    """The file, of which tensors can be read one by one, and the note; raises what `UNREADABLE` names."""
    # This also compares the file's length with what its header says.
    with safe_open(path, framework="pt") as file:
        yield file, json.loads((file.metadata() or {})["vitreg"])
