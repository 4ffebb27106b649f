"""Parquet, on Tiny ImageNet and in the layouts that Hugging Face's data sets have."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import sys
import tracemalloc
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitreg.images import ImageError, open_image_set, open_split


def write(file, images, metadata=None, **columns):
    table = pa.table({"image": images, **columns})
    file.parent.mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=3)
    return file


@pytest.fixture(scope="module")
def images(test_data):
    """Ten images of Tiny ImageNet as Hugging Face stores them."""
    table = pq.ParquetFile(test_data / "tiny-imagenet-100/val.parquet").read(["image"])
    return table.column("image")[:10].to_pylist()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_tiny_imagenet(test_data):
    train, held_out = open_split(test_data / "tiny-imagenet-100")
    assert held_out is not None
    assert (len(train), len(held_out)) == (50000, 5000)
    assert train.classes == held_out.classes
    assert train.classes[:2] == ("goldfish, Carassius auratus", "European fire salamander, Salamandra salamandra")
    peer = pq.read_table(test_data / "tiny-imagenet-100/val.parquet")
    assert list(held_out.labels or ()) == peer["label"].to_pylist()
    for index in (0, 2500, 4999):
        expected = pixels(peer["image"][index]["bytes"].as_py())
        np.testing.assert_array_equal(np.asarray(held_out.image(index)), expected)
    np.testing.assert_array_equal(np.asarray(held_out.image(-1)), expected)


def test_labels_are_in_a_buffer_and_a_pickle_is_small(test_data):
    tracemalloc.start()
    found = open_image_set(test_data / "tiny-imagenet-100/train.parquet")
    objects = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert objects < 2**21  # 50000 labels of 8 bytes, and what copying them takes
    stored = pickle.dumps(found)
    assert len(stored) < 1000
    assert len(pickle.loads(stored)) == 50000


@pytest.fixture
def arrow_memory():
    """Arrow's memory, counted from here on."""
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pool := pa.proxy_memory_pool(usual))
    yield pool
    pa.set_memory_pool(usual)


def read_rows(found, rows):
    return [(sha256(found.image(row).tobytes()).hexdigest(), found.labels[row]) for row in rows]


@pytest.fixture
def large_file(tmp_path, photographs):
    """210 MB in 25 groups of 60 rows; an image file may have anything behind its end."""
    files = [path.read_bytes() for path in photographs[:5]]
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()})
    rng, file = np.random.default_rng(0), tmp_path / "large.parquet"
    with pq.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for group in range(25):
            rows = range(60 * group, 60 * group + 60)
            images = [{"bytes": files[row % 5] + rng.bytes(140_000), "path": None} for row in rows]
            writer.write_table(pa.table({"image": images, "label": [row % 3 for row in rows]}, schema))
    return file


def test_memory_does_not_grow_with_the_file_and_workers_read_it(large_file, photographs, arrow_memory):
    assert large_file.stat().st_size > 210e6
    expected = [sha256(pixels(path.read_bytes()).tobytes()).hexdigest() for path in photographs[:5]]
    for _ in range(2):  # it is unpacked, and then there
        found = open_image_set(large_file)
        assert arrow_memory.bytes_allocated() < 1e6
    rows = [1499, 0, 703, 1], [358, 60, 59, 1204]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        read = pool.starmap(read_rows, [(found, chosen) for chosen in rows], chunksize=1)
    assert read == [[(expected[row % 5], row % 3) for row in chosen] for chosen in rows]
    assert arrow_memory.max_memory() < 60e6


def test_without_a_cache_columns_are_held_in_memory(tmp_path, images, monkeypatch, arrow_memory):
    file = write(tmp_path / "a.parquet", images, label=list(range(10)), caption=["one"] * 10)
    mapped, before = open_image_set(file), arrow_memory.bytes_allocated()
    monkeypatch.setenv("VITREG_CACHE", str(file / "no folder"))
    held = open_image_set(file)
    assert arrow_memory.bytes_allocated() - before > sum(len(image["bytes"]) for image in images)
    for found in (mapped, held):
        assert (found.classes, found.captions(3)) == (tuple("0123456789"), ("one",))
        assert [np.asarray(found.image(i)).tobytes() for i in range(10)] == [
            pixels(image["bytes"]).tobytes() for image in images
        ]


def test_a_damaged_unpacked_file_is_unpacked_again(tmp_path, images, monkeypatch):
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path / "a.parquet", images)
    os.utime(file, (1e9, 1e9))
    open_image_set(file)
    (unpacked,) = (tmp_path / "cache").iterdir()
    for data in (b"", unpacked.read_bytes()[:2000], b"x" * 5000):
        unpacked.write_bytes(data)
        np.testing.assert_array_equal(np.asarray(open_image_set(file).image(9)), pixels(images[9]["bytes"]))


def test_shards_names_of_classes_and_captions(tmp_path, images):
    names = ["cat", "dog", "crane"]
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    metadata = {"huggingface": json.dumps(features)}
    for shard in range(2):
        labels, captions = [2, 0, 1, 1, 2], [[f"{shard} {row}", "again"] for row in range(5)]
        file = tmp_path / f"train-{shard:05}-of-00002.parquet"
        write(file, images[5 * shard : 5 * shard + 5], metadata, label=labels, captions=captions)
    for path in (tmp_path, tmp_path / "train-*.parquet", tmp_path / "train-{00000..00001}-of-00002.parquet"):
        found = open_image_set(path)
        assert len(found) == 10
        assert found.classes == ("cat", "dog", "crane")
        assert list(found.labels or ()) == [2, 0, 1, 1, 2] * 2
        assert found.captions(8) == ("1 3", "again")
        assert found.name(8) == f"{tmp_path}/train-00001-of-00002.parquet, row 3"
        for index, image in enumerate(images):
            np.testing.assert_array_equal(np.asarray(found.image(index)), pixels(image["bytes"]))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("column", ["image", "image.bytes"])
def test_plain_binary_columns(tmp_path, images, column, kind):
    data = [image["bytes"] for image in images]
    table = pa.table(
        {column: pa.array(data, kind), "text": ["a dog", None] * 5, "label": pa.array([3] * 10, pa.int8())}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = open_image_set(tmp_path / "a.parquet")
    np.testing.assert_array_equal(np.asarray(found.image(9)), pixels(data[9]))
    assert (found.captions(0), found.captions(1)) == (("a dog",), ())
    assert found.classes == ("0", "1", "2", "3")


def test_broken_images_are_named_by_file_and_row(tmp_path, images):
    rows = [images[0], {"bytes": b"no image", "path": ""}, {"bytes": None, "path": "a.jpg"}, None, {"bytes": b""}]
    found = open_image_set(write(tmp_path / "a.parquet", rows))
    assert found.image(0).size == (64, 64)
    for row, message in ((1, "is not an image"), (2, "has no bytes"), (3, "has no bytes"), (4, "is empty")):
        with pytest.raises(ImageError, match=rf"a\.parquet, row {row} {message}"):
            found.image(row)


def test_hidden_labels_are_no_labels(tmp_path, images):
    found = open_image_set(write(tmp_path / "test.parquet", images, label=[-1] * 10))
    assert (found.labels, found.classes) == (None, ())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1], "has the label -1; labels must be class numbers, from 0"),
        ([0, None], "has 1 rows without a label"),
        (["a", "b"], "has labels of type string; labels must be integers"),
        ([0, 2], "has the label 2, but names only 2 classes"),
    ],
)
def test_bad_labels(tmp_path, images, labels, message):
    (tmp_path / "classes.csv").write_text('label,name\n1,"dog, small"\n0,cat\n')
    with pytest.raises(ValueError, match=message):
        open_image_set(write(tmp_path / "a.parquet", images[:2], label=labels))


@pytest.mark.parametrize("content", ["label\n0\n", "label,name\nx,cat\n", "label,name\n0,cat\n2,dog\n"])
def test_bad_class_names(tmp_path, images, content):
    (tmp_path / "classes.csv").write_text(content)
    with pytest.raises(ValueError, match=r"classes\.csv (is malformed|must name the classes 0 to 1, each once)"):
        open_image_set(write(tmp_path / "a.parquet", images[:1], label=[0]))


def test_a_file_cut_anywhere_or_damaged_is_refused_in_one_sentence(tmp_path, images):
    names = {"info": {"features": {"label": {"names": list("abcdefghij")}}}}
    file = write(tmp_path / "a.parquet", images, {"huggingface": json.dumps(names)}, label=list(range(10)))
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    cut = [whole[: int(share * len(whole))] for share in (0.001, 0.3, 0.5, 0.9, 0.999)]
    damaged = [bytearray(whole) for _ in range(40)]
    for data in damaged:
        data[-rng.integers(1, 3000)] ^= int(rng.integers(1, 256))
    refused = []
    for data in cut + damaged:
        file.write_bytes(data)
        try:
            open_image_set(file)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(str(file) in message and "\n" not in message for message in refused)


def test_files_that_are_no_such_set(tmp_path, images):
    file = write(tmp_path / "a.parquet", images)
    pq.write_table(pa.table({"img": [b"x"], "label": [0]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": ["a.jpg"]}), tmp_path / "c.parquet")
    write(tmp_path / "d.parquet", images, label=[0] * 10)
    (tmp_path / "e.parquet").write_bytes(file.read_bytes()[:3000])
    for name, message in (
        ("b", "has no column `image`, only img, label"),
        ("c", "has no bytes in `image` but string"),
        ("e", "cannot be read as Parquet"),
        ("[ad]", r"d\.parquet and .*a\.parquet have different columns"),
        ("missing", "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            open_image_set(tmp_path / f"{name}.parquet")


def test_missing_pyarrow_is_named(tmp_path, images, monkeypatch):
    file = write(tmp_path / "a.parquet", images)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"need pyarrow; install it with: pip install pyarrow"):
        open_image_set(file)
