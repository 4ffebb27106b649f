"""Images in Parquet files, as Hugging Face's data sets store them."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vitreg.common.cache import cached
from vitreg.common.disk import check_room
from vitreg.images.labeled import ImageSet, source_of
from vitreg.images.labels import classes_of, read_class_names
from vitreg.images.reading import ImageError, decode_image

if TYPE_CHECKING:
    import pyarrow

CAPTION_COLUMNS = ("caption", "captions", "text")

_ROWS = 64


class ParquetImages(ImageSet):
    """Images of Parquet files, in the order of the files and their rows.

    The column `image` holds the bytes of image files, in a struct's field `bytes` or by itself (it may then also be
    called `image.bytes`). Optional are `label` (integers; their names are in Hugging Face's metadata, or in a
    `classes.csv` with columns `label` and `name` beside the files) and `caption`, `captions` or `text` (a sentence or a
    list of them).

    Compressed columns cannot be read in any order, so they are unpacked once into a file of Arrow's in the cache
    (`VITREG_CACHE`), which takes the room of the images. It is mapped into memory: sets may be larger than that, and
    all processes of a machine share its pages. Only labels are held. Where that file cannot be written, the columns
    are held in memory, which forked workers share.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Maps the columns, or unpacks them first.

        Raises:
            ValueError: pyarrow is missing, a file cannot be read, or its columns are not those.
        """
        self._files, self._first_row = tuple(files), 0
        self.source = source_of(files)
        self._fill([_open_columns(file) for file in files])

    def _fill(self, tables: list[pyarrow.Table]) -> None:
        files = self._files
        labels, names = array("q"), read_class_names(files[0].parent)
        for file, columns in zip(files, tables, strict=True):
            if columns.column_names != tables[0].column_names:
                raise ValueError(f"{file} and {files[0]} have different columns; give files of one data set")
            if "label" in columns.column_names:
                labels.frombytes(_labels(columns["label"], file).to_numpy().tobytes())
                names = names or tuple(json.loads(columns.schema.metadata[b"names"]))
        self._images = [columns["image"] for columns in tables]
        self._captions = [columns["caption"] for columns in tables if "caption" in columns.column_names]
        self._starts = [0, *accumulate(map(len, tables))]
        if not len(self):
            raise ValueError(f"{self.source} has no rows; expected one for each image")
        self.classes = classes_of(labels, names, self.source)
        self.labels = labels if self.classes else None

    def __reduce__(self) -> tuple[type[ParquetImages], tuple[tuple[Path, ...]]]:
        return ParquetImages, (self._files,)

    def __len__(self) -> int:
        return self._starts[-1]

    def image(self, index: int) -> Image.Image:
        file, row = self._place(index)
        data = self._images[file][row].as_buffer()
        if data is None:
            raise ImageError(f"{self.name(index)} has no bytes; only images inside the file can be read")
        return decode_image(memoryview(data), self.name(index))

    def name(self, index: int) -> str:
        file, row = self._place(index)
        return f"{self._files[file]}, row {self._first_row + row}"

    def id(self, index: int) -> str:
        file, row = self._place(index)
        return f"{self._files[file].name}/{self._first_row + row}"

    def file(self, index: int) -> str:
        return str(self._files[self._place(index)[0]])

    def captions(self, index: int) -> tuple[str, ...]:
        if not self._captions:
            return ()
        file, row = self._place(index)
        value = self._captions[file][row].as_py() or ()
        return (value,) if isinstance(value, str) else tuple(value)

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the file, and row in it, from 0."""
        index = range(len(self))[index]
        file = bisect_right(self._starts, index) - 1
        return file, index - self._starts[file]


class RowGroup(ParquetImages):
    """The images of one row group of a Parquet file, held in memory.

    Args:
        file: that it is in.
        number: of the row group, from 0.
        first_row: its first row in the file.
    """

    def __init__(self, file: Path, number: int, first_row: int) -> None:
        import pyarrow

        self._files, self._first_row = (file,), first_row
        self.source = f"{file}, row group {number}"
        self._fill([pyarrow.Table.from_batches(_read_columns(file, number))])


def row_groups(file: Path) -> list[tuple[int, int]]:
    """The first row of every row group, and how many rows it has."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            found = parquet.metadata
            counts = [found.row_group(number).num_rows for number in range(found.num_row_groups)]
    except (OSError, pyarrow.ArrowException) as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} cannot be read as Parquet ({what}); download or write it again") from error
    return list(zip(accumulate(counts, initial=0), counts, strict=False))


def _open_columns(file: Path) -> pyarrow.Table:
    """The columns `image`, `label` and `caption` of a file that are there; its metadata hold the classes' `names`."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError("Parquet files need pyarrow; install it with: pip install pyarrow") from None

    def unpack(path: Path) -> None:
        check_room(path.parent, file.stat().st_size, f"unpacked images of {file}")
        batches = _read_columns(file)
        first = next(batches)
        with pyarrow.ipc.new_file(str(path), first.schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    def mapped(path: Path) -> pyarrow.Table:
        # Its buffers keep the file mapped; it does not stay open.
        with pyarrow.memory_map(str(path)) as source:
            table = pyarrow.ipc.open_file(source).read_all()
        table.validate()
        return table

    columns = cached([file], ".columns.arrow", unpack, mapped)
    return pyarrow.Table.from_batches(_read_columns(file)) if columns is None else columns


def _read_columns(file: Path, row_group: int | None = None) -> Iterator[pyarrow.RecordBatch]:
    """Those columns, of the file or of one row group, some rows at a time, after an empty batch: there may be none."""
    import pyarrow
    import pyarrow.parquet
    import pyarrow.types as types

    try:
        # Mapped, so that of a row group as large as the file one page after the other is read.
        with pyarrow.parquet.ParquetFile(file, memory_map=True) as parquet:
            schema = parquet.schema_arrow
            image = next((name for name in ("image", "image.bytes") if name in schema.names), None)
            if image is None:
                raise ValueError(
                    f"{file} has no column `image`, only {', '.join(schema.names)}; rename that of the images"
                )
            kind = schema.field(image).type
            nested = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            data = kind.field("bytes").type if nested else kind
            if not (types.is_binary(data) or types.is_large_binary(data)):
                raise ValueError(f"{file} has no bytes in `image` but {kind}; store image files")
            sources = {"image": image, "label": "label"}
            sources["caption"] = next((name for name in CAPTION_COLUMNS if name in schema.names), "")
            sources = {name: source for name, source in sources.items() if source in schema.names}
            kinds = {name: data if name == "image" else schema.field(source).type for name, source in sources.items()}
            names = {"names": json.dumps(_hugging_face_names(schema))}
            yield pyarrow.RecordBatch.from_pylist([], unpacked := pyarrow.schema(list(kinds.items()), names))
            asked = [f"{source}.bytes" if nested and name == "image" else source for name, source in sources.items()]
            groups = None if row_group is None else [row_group]
            for batch in parquet.iter_batches(_ROWS, columns=asked, use_threads=False, row_groups=groups):
                columns = {name: batch.column(source) for name, source in sources.items()}
                if nested:
                    columns["image"] = columns["image"].flatten()[0]
                yield pyarrow.RecordBatch.from_arrays(list(columns.values()), schema=unpacked)
    # Damage to names of columns and classes shows as text that is no UTF-8 and JSON that is none.
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} cannot be read as Parquet ({what}); download or write it again") from error


def _labels(column: pyarrow.ChunkedArray, file: Path) -> pyarrow.ChunkedArray:
    import pyarrow
    import pyarrow.types as types

    if not types.is_integer(column.type) or column.null_count:
        what = f"{column.null_count} rows without a label" if column.null_count else f"labels of type {column.type}"
        raise ValueError(f"{file} has {what}; labels must be integers, from 0, in every row")
    return column.cast(pyarrow.int64())


def _hugging_face_names(schema: pyarrow.Schema) -> tuple[str, ...]:
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]
        return tuple(map(str, info["features"]["label"]["names"]))
    except (KeyError, TypeError):
        return ()
