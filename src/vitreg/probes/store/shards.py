"""The files of a feature store: Parquet with a row an image, written whole or not at all, and read by mapping them."""

from __future__ import annotations

import base64
import json
import math
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load
from safetensors.torch import save as as_bytes
from torch import Tensor

from vitreg.common.disk import replacing, writing
from vitreg.probes.store.origin import FeaturesConfig, from_json

if TYPE_CHECKING:
    import pyarrow

FORMAT = "vitreg-features/2"
FOLDER = "shards"
"""In a store; what reads folders of Parquet reads it."""

_NOTE, _ROWS, _NORMS = b"vitreg", b"vitreg.rows", b"vitreg.norms"
_ONE_PAGE = 2**30
"""Bytes of a page: more than a row group has, so that the values of a column are one piece that can be mapped."""


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read: its position in the set, its name, and the sentence that says why."""

    number: int
    name: str
    reason: str


@dataclass
class RowGroup:
    """Images in a row, those that could not be read among them.

    Attributes:
        ids, sizes, labels, errors: of every image; the size of those that could not be read is (0, 0).
        patch_rows: which rows have what is kept of some images only.
        tensors: what is kept, of the rows that have it, in parts.
        num_bytes: of the tensors.
    """

    ids: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)
    patch_rows: list[int] = field(default_factory=list)
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)
    num_bytes: int = 0

    def add(
        self, id: str, *, size: tuple[int, int] = (0, 0), label: int | None = None, error: str | None = None
    ) -> None:
        """One more row."""
        self.ids.append(id)
        self.sizes.append(size)
        self.labels.append(label)
        self.errors.append(error)

    def add_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """What is kept of rows that were added."""
        for name, tensor in tensors.items():
            self.tensors.setdefault(name, []).append(tensor)
            self.num_bytes += tensor.nbytes

    @property
    def readable(self) -> list[int]:
        """Rows of the images that could be read."""
        return [row for row, error in enumerate(self.errors) if error is None]


def shard_schema(config: FeaturesConfig, shapes: Mapping[str, tuple[int, ...]]) -> pyarrow.Schema:
    """The columns of a store."""
    import pyarrow as pa

    kinds = {"float16": pa.float16(), "float32": pa.float32()}
    features = {name: pa.list_(kinds[config.dtype_of(name)], math.prod(shape)) for name, shape in shapes.items()}
    named = {"id": pa.string(), "height": pa.int32(), "width": pa.int32(), "grid": pa.list_(pa.int32(), 2)}
    named |= {"label": pa.int64(), **features, "error": pa.string()}
    return pa.schema(list(named.items()))


class ShardWriter:
    """One file, row group by row group; it gets its name when it is finished.

    Args:
        path: of the file.
        schema: of `shard_schema`.
        note: what the file says of itself, in JSON.
    """

    def __init__(self, path: Path, schema: pyarrow.Schema, note: Mapping[str, Any]) -> None:
        import pyarrow.parquet

        self._rows: dict[str, list[Any]] = {"counts": [], "patch_rows": []}
        self._stack, self._path = ExitStack(), path
        temporary = self._stack.enter_context(replacing(path))
        self._writer = self._stack.enter_context(
            pyarrow.parquet.ParquetWriter(
                temporary,
                schema.with_metadata({_NOTE: json.dumps(note)}),
                compression="NONE",
                use_dictionary=False,
                write_statistics=False,
                data_page_size=_ONE_PAGE,
            )
        )

    def write(self, rows: RowGroup) -> None:
        """Add some rows."""
        readable = {row: rank for rank, row in enumerate(rows.readable)}
        self._rows["counts"].append([len(rows.ids), len(readable), len(rows.patch_rows)])
        self._rows["patch_rows"].append([readable[row] for row in rows.patch_rows])
        with writing(self._path):
            self._writer.write_batch(_as_batch(rows, self._writer.schema), row_group_size=len(rows.ids))

    def finish(self, norms: Mapping[str, Tensor] | None) -> None:
        """Give the file its name.

        Args:
            norms: what was added up over the images (`NormStatistics.state`); None where there are none.
        """
        packed = b"" if norms is None else zlib.compress(as_bytes(dict(norms)))
        self._writer.add_key_value_metadata({_ROWS: json.dumps(self._rows), _NORMS: base64.b64encode(packed)})
        with writing(self._path):
            self._stack.close()

    def abandon(self, error: BaseException) -> None:
        """Leave nothing behind."""
        kind: type[BaseException] = type(error)
        traceback: TracebackType | None = error.__traceback__
        try:
            self._stack.__exit__(kind, error, traceback)
        except BaseException as raised:
            if raised is not error and not isinstance(raised, (OSError, ValueError)):
                raise


def _as_batch(rows: RowGroup, schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    import pyarrow as pa

    count = len(rows.ids)
    sizes = [(None, None) if error else size for size, error in zip(rows.sizes, rows.errors, strict=True)]
    # Names of files need not be text.
    ids = [id.encode(errors="backslashreplace").decode() for id in rows.ids]
    grid = json.loads(schema.metadata[_NOTE])["grid"]
    plain = {
        "id": ids,
        "height": [height for height, _ in sizes],
        "width": [width for _, width in sizes],
        "grid": [None if error else grid for error in rows.errors],
        "label": rows.labels,
        "error": rows.errors,
    }
    columns: list[pa.Array] = []
    readable = rows.readable
    for part in schema:
        if part.name in plain:
            columns.append(pa.array(plain[part.name], part.type))
            continue
        tensors = rows.tensors.get(part.name, [])
        size, number = part.type.list_size, sum(map(len, tensors))
        if number == count:
            values, mask = torch.cat(tensors).numpy().reshape(-1), None
        else:
            kept = readable if number == len(readable) else rows.patch_rows
            assert number == len(kept)
            dtype = part.type.value_type.to_pandas_dtype()
            spread, absent = np.zeros((count, size), dtype), np.ones(count, bool)
            if number:
                spread[kept], absent[kept] = torch.cat(tensors).flatten(1).numpy(), False
            values, mask = spread.reshape(-1), pa.array(absent)
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values), size, mask=mask))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


class Shard:
    """A finished file.

    Attributes:
        path: of the file.
        note: what it says of itself.
        counts: of every row group, how many rows there are, how many could be read, and how many have patches.
        patch_rows: of the images that could be read, which have patches.
        shapes: of the columns that are kept as tensors.
    """

    def __init__(self, path: Path) -> None:
        """Reads the end of the file, which says where everything is.

        Raises:
            OSError, ValueError, KeyError, TypeError: it is no whole file of a store.
        """
        import pyarrow.parquet

        self.path = path
        self._found = pyarrow.parquet.read_metadata(path)
        metadata = self._found.metadata
        self.note: dict[str, Any] = json.loads(metadata[_NOTE])
        rows: dict[str, list[Any]] = json.loads(metadata[_ROWS])
        self.counts: list[list[int]] = rows["counts"]
        self._patch_rows: list[list[int]] = rows["patch_rows"]
        self._starts = [0, *accumulate(count for count, _, _ in self.counts)][:-1]
        firsts = accumulate((readable for _, readable, _ in self.counts), initial=0)
        ranks = [first + rank for first, group in zip(firsts, self._patch_rows, strict=False) for rank in group]
        self.patch_rows = torch.tensor(ranks, dtype=torch.int64)
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in self.note["shapes"].items()}
        self._config = from_json(FeaturesConfig, self.note["config"])
        self._columns = {self._found.schema.column(i).path.split(".")[0]: i for i in range(self._found.num_columns)}
        self.num_rows, self.num_images, self.num_with_patches = map(sum, zip(*self.counts, strict=True))

    @property
    def norms(self) -> dict[str, Tensor] | None:
        """What was added up over its images; None where no norms are kept of any."""
        packed = base64.b64decode(self._found.metadata[_NORMS])
        return load(zlib.decompress(packed)) if packed else None

    def plain(self, *names: str) -> dict[str, list[Any]]:
        """Columns that are no tensors, of all rows."""
        import pyarrow.parquet

        return pyarrow.parquet.read_table(self.path, columns=list(names)).to_pydict()

    @cached_property
    def errors(self) -> list[str | None]:
        """Why images could not be read, None for those that could; of all rows."""
        return [None] * self.num_rows if self.num_rows == self.num_images else self.plain("error")["error"]

    @property
    def skipped(self) -> list[Skipped]:
        """The images that could not be read; their numbers are those of the rows."""
        ids = self.plain("id")["id"] if any(self.errors) else []
        return [Skipped(row, ids[row], error) for row, error in enumerate(self.errors) if error]

    @cached_property
    def _bytes(self) -> np.memmap:
        return np.memmap(self.path, np.uint8, "r")

    def row(self, number: int) -> dict[str, Any]:
        """All there is of an image: text, numbers and tensors by the names of their columns; None where it has none."""
        group = bisect_right(self._starts, number) - 1
        row, plain = number - self._starts[group], self._plain_of(group)
        found: dict[str, Any] = {name: values[row] for name, values in plain.items()}
        rank = plain["error"][:row].count(None)
        ranks = {False: rank, True: None}
        if found["error"] is not None:
            ranks = {False: None, True: None}
        elif rank in (patch_rows := self._patch_rows[group]):
            ranks[True] = patch_rows.index(rank)
        for name in self.shapes:
            at = ranks[self._config.of_some(name)]
            found[name] = None if at is None else torch.from_numpy(self._mapped(name, group)[at].copy())
        return found

    @cached_property
    def _plain_of(self) -> Callable[[int], dict[str, list[Any]]]:
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(self.path)
        columns = [name for name in file.schema_arrow.names if name not in self.shapes]
        return lru_cache(2)(lambda group: file.read_row_group(group, columns).to_pydict())

    def mapped(self, name: str) -> list[np.ndarray]:
        """A column in the file, a part a row group, of the rows that have it; it need not be aligned."""
        return [self._mapped(name, group) for group in range(len(self.counts))]

    def _mapped(self, name: str, group: int) -> np.ndarray:
        shape, dtype = self.shapes[name], np.dtype(self._config.dtype_of(name))
        rows = self.counts[group][2 if self._config.of_some(name) else 1]
        if not rows:
            return np.empty((0, *shape), dtype)
        column = self._found.row_group(group).column(self._columns[name])
        size = rows * math.prod(shape) * dtype.itemsize
        end = column.data_page_offset + column.total_compressed_size
        # Before the values is what says which rows have any: little.
        before, most = column.total_compressed_size - size, 1024 + 64 * self.counts[group][0]
        if not 0 <= before <= most or column.has_dictionary_page:
            raise ValueError(f"{self.path} was written by something else; delete it and run the feature pass again")
        return np.frombuffer(self._bytes, dtype, size // dtype.itemsize, end - size).reshape(rows, *shape)

    def read(self, name: str, at: int | None = None) -> Tensor:
        """A copy of a column, or of what is there at an index, of the rows that have it."""
        parts = self.mapped(name)
        return torch.from_numpy(np.concatenate(parts if at is None else [part[:, at] for part in parts]))


def shard_name(index: int, digest: str) -> str:
    """What a shard's file is called."""
    return f"shard-{index:06d}-{digest}.parquet"


def open_shard(path: Path) -> Shard:
    """A shard that was written.

    Raises:
        ValueError: it is damaged, or belongs to another store.
    """
    import pyarrow

    try:
        shard = Shard(path)
        belongs = shard_name(int(path.name.split("-")[1]), shard.note["digest"]) == path.name
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or missing ({what}); delete it and run the feature pass again") from error
    if not belongs:
        raise ValueError(f"{path} belongs to another store; delete it and run the feature pass again")
    return shard
