"""Images in Parquet files, as Hugging Face's data sets store them."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vitreg.images.labeled import ImageSet, source_of
from vitreg.images.labels import classes_of, read_class_names
from vitreg.images.reading import ImageError, decode_image

if TYPE_CHECKING:
    import pyarrow

CAPTION_COLUMNS = ("caption", "captions", "text")


class ParquetImages(ImageSet):
    """Images of Parquet files, in the order of the files and their rows.

    The column `image` holds the bytes of image files, in a struct's field `bytes` or by itself (it may then also be
    called `image.bytes`). Optional are `label` (integers; their names are in Hugging Face's metadata, or in a
    `classes.csv` with columns `label` and `name` beside the files) and `caption`, `captions` or `text` (a sentence or a
    list of them).

    The set is held in memory, compressed as it is in the files; forked workers share it, others read it again. Where
    that is too large, use folders or tars.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Reads the files.

        Raises:
            ValueError: pyarrow is missing, a file cannot be read, or its columns are not those.
        """
        self._files = tuple(files)
        self.source = source_of(files)
        self._images: list[pyarrow.ChunkedArray] = []
        self._captions: list[pyarrow.ChunkedArray] = []
        labels, names = array("q"), read_class_names(files[0].parent)
        expected: set[str] = set()
        for file in files:
            columns = _read_columns(file)
            if columns.keys() != (expected := expected or set(columns)):
                raise ValueError(f"{file} and {files[0]} have different columns; give files of one data set")
            self._images.append(columns["image"])
            if "label" in columns:
                labels.frombytes(columns["label"].to_numpy().tobytes())
                names = names or columns["names"]
            if "caption" in columns:
                self._captions.append(columns["caption"])
        self._starts = [0, *accumulate(len(images) for images in self._images)]
        if not len(self):
            raise ValueError(f"{self.source} has no rows; expected one for each image")
        self.classes = classes_of(labels, names, self.source) if labels else ()
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
        return f"{self._files[file]}, row {row}"

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


def _read_columns(file: Path) -> dict[str, Any]:
    """The columns `image`, `label` and `caption` of a file as far as they are there, and the `names` of its classes."""
    try:
        import pyarrow
        import pyarrow.parquet
        import pyarrow.types as types
    except ImportError:
        raise ValueError("Parquet files need pyarrow; install it with: pip install 'vitreg[train]'") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            column = next((name for name in ("image", "image.bytes") if name in schema.names), None)
            if column is None:
                raise ValueError(
                    f"{file} has no column `image`, only {', '.join(schema.names)}; rename that of the images"
                )
            nested = types.is_struct(schema.field(column).type)
            image = parquet.read([f"{column}.bytes" if nested else column]).column(column)
            columns: dict[str, Any] = {"image": image.flatten()[0] if nested else image}
            if not _is_binary(columns["image"].type):
                raise ValueError(f"{file} has no bytes in `image` but {schema.field(column).type}; store image files")
            if "label" in schema.names:
                columns["label"] = _labels(parquet.read(["label"]).column("label"), file)
                columns["names"] = _hugging_face_names(schema)
            if caption := next((name for name in CAPTION_COLUMNS if name in schema.names), None):
                columns["caption"] = parquet.read([caption]).column(caption)
    # Damage to names of columns and classes shows as text that is no UTF-8 and JSON that is none.
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} cannot be read as Parquet ({what}); download or write it again") from error
    return columns


def _is_binary(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind)


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
