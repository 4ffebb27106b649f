"""Shards of sets, tars and Parquet hold what the whole holds, in its order."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitreg.images import ImageError, open_image_set, open_shards


@pytest.fixture
def encoded(photographs) -> list[bytes]:
    return [path.read_bytes() for path in photographs[:7]]


@pytest.fixture
def tars(encoded, tmp_path) -> Path:
    for number, some in enumerate((encoded[:3], encoded[3:])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for i, data in enumerate(some):
                info = tarfile.TarInfo(f"{number}{i}.jpg")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return tmp_path


@pytest.fixture
def parquet(encoded, tmp_path) -> Path:
    rows = pa.table({"image": [{"bytes": data} for data in encoded], "label": [0, 1, 0, 1, 0, 1, 0]})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=3)
    return tmp_path / "a.parquet"


@pytest.mark.parametrize(("kind", "counts"), [("tars", [3, 4]), ("parquet", [3, 3, 1])])
def test_shards_of_archives_are_the_archives(kind, counts, request):
    source = request.getfixturevalue(kind)
    shards, whole = open_shards(source, 4096), open_image_set(source)
    numbers = [list(shards.numbers(index)) for index in range(len(shards))]
    assert [len(of) for of in numbers] == counts
    for ours, theirs in zip([number for of in numbers for number in of], range(len(whole)), strict=True):
        assert (shards.images.id(ours), shards.images.name(ours)) == (whole.id(theirs), whole.name(theirs))
        assert shards.images.label(ours) == whole.label(theirs)
        assert np.array_equal(np.asarray(shards.images.image(ours)), np.asarray(whole.image(theirs)))
    assert len({shards.digest(), *(shards.digest(index) for index in range(len(shards)))}) == len(shards) + 1


def test_an_archive_that_cannot_be_opened_is_an_image_that_cannot_be_read(tars):
    content = (tars / "1.tar").read_bytes()
    (tars / "1.tar").write_bytes(b"?" * 100 + content[100:])
    shards = open_shards(tars, 4096)
    (number,) = shards.numbers(1)
    with pytest.raises(ImageError, match=r"1\.tar is damaged or cut short"):
        shards.images.image(number)
    assert len(shards.numbers(0)) == 3


def test_digests_change_with_the_images(photographs, tmp_path):
    for path in photographs[:5]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = open_shards(tmp_path, 2)
    digests = [before.digest(index) for index in range(3)]
    (tmp_path / photographs[2].name).write_bytes(photographs[3].read_bytes())
    after = open_shards(tmp_path, 2)
    assert [after.digest(index) == digest for index, digest in enumerate(digests)] == [True, False, True]
