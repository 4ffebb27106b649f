"""Stores as other tools read them, image by image, by several processes, and what their norms say."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest
import torch

import vitreg
from probes.small import small_vit
from vitreg.images import ImageError
from vitreg.probes import FeaturesConfig, diagnose_store, extract
from vitreg.probes.store.extract import extract_part

SMALL = FeaturesConfig(dtype="float32", shard_size=3, norm_blocks=(-1,), tokens=("cls", "registers", "patches"))


@pytest.fixture
def folder(photographs, tmp_path) -> Path:
    """Eight images, two of them broken, the first and one between others."""
    out = tmp_path / "images"
    out.mkdir()
    for number, path in enumerate(photographs[:8]):
        shutil.copy(path, out / f"{number}.jpg")
    for number in (0, 4):
        (out / f"{number}.jpg").write_bytes(b"no image")
    return out


def files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_rows_are_the_images_with_those_that_cannot_be_read(folder, tmp_path):
    vit = small_vit()
    store = vitreg.extract(vit, folder, tmp_path / "store", SMALL)
    assert [image["id"] for image in store] == [f"{number}.jpg" for number in range(8)]
    assert [number for number, image in enumerate(store) if image["error"]] == [0, 4]
    for number, image in enumerate(store):
        if number in (0, 4):
            assert "is not an image that Pillow can read" in image["error"]
            assert image["patches"] is image["cls"] is image["height"] is None
            continue
        read = vitreg.images.read_image(folder / f"{number}.jpg")
        with torch.inference_mode():
            trace = vit.trace(vit.preprocess(read)[None])
        torch.testing.assert_close(image["cls"], trace.tokens.cls[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(image["registers"], trace.tokens.registers[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(image["patches"], trace.tokens.patches[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(image["norms"], trace.patch_norms[-1:, 0], rtol=1e-4, atol=1e-5)
        assert (image["height"], image["width"]) == (read.height, read.width)
    assert torch.equal(store["6.jpg"]["patches"], store[6]["patches"])
    assert len(store) == store.num_images + 2 == 8
    with pytest.raises(ValueError, match=r"store has no image '9\.jpg'; its first is '0\.jpg'"):
        store["9.jpg"]
    with pytest.raises(IndexError):
        store[8]


def test_other_tools_read_what_is_mapped(folder, tmp_path):
    store = vitreg.extract(small_vit(), folder, tmp_path / "store", SMALL, dtype="float16")
    table = pyarrow.dataset.dataset(tmp_path / "store" / "shards").to_table()
    assert table["id"].to_pylist() == [image["id"] for image in store]
    assert table["error"].to_pylist() == [image["error"] for image in store]
    for column in ("cls", "registers", "patches", "norms"):
        for theirs, image in zip(table[column].to_pylist(), store, strict=True):
            ours = image[column]
            assert (theirs is None) == (ours is None)
            if ours is not None:
                np.testing.assert_array_equal(np.array(theirs, ours.numpy().dtype), ours.flatten().numpy())


def test_pandas_duckdb_and_datasets_read_it(folder, tmp_path):
    store = vitreg.extract(small_vit(), folder, tmp_path / "store", SMALL)
    shards, one = str(tmp_path / "store" / "shards"), store[6]["cls"].numpy()
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(shards)
    np.testing.assert_array_equal(frame.set_index("id").loc["6.jpg", "cls"], one)
    duckdb = pytest.importorskip("duckdb")
    ((found,),) = duckdb.sql(f"select cls from '{shards}/*.parquet' where id = '6.jpg'").fetchall()
    np.testing.assert_array_equal(np.array(found, np.float32), one)
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset("parquet", data_files=f"{shards}/*.parquet", split="train", cache_dir=tmp_path / "hf")
    np.testing.assert_array_equal(np.array(rows[6]["cls"], np.float32), one)


def test_two_processes_write_the_bytes_of_one(folder, tmp_path):
    vit, config = small_vit(), SMALL
    vitreg.extract(vit, folder, tmp_path / "one", config)
    assert not extract_part(vit, folder, tmp_path / "two", config, part=(1, 2))
    assert extract_part(vit, folder, tmp_path / "two", config, part=(0, 2))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_images_that_were_added_are_said_and_taken_by_an_update(folder, photographs, tmp_path):
    vit, out, told = small_vit(), tmp_path / "store", list[str]()
    vitreg.extract(vit, folder, out, SMALL)
    before = {path.name: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    shutil.copy(photographs[9], folder / "00.jpg")
    assert len(vitreg.extract(vit, folder, out, SMALL, say=told.append)) == 8
    assert "1 image were added" in told[0] or "1 image was added" in told[0]
    store = vitreg.extract(vit, folder, out, SMALL, update=True)
    assert [image["id"] for image in store] == [*(f"{number}.jpg" for number in range(8)), "00.jpg"]
    after = {path.name: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    assert len(after) == 3
    assert sum(before.get(name) == time for name, time in after.items()) == 2
    (folder / "3.jpg").unlink()
    with pytest.raises(ValueError, match=r"gone, such as .*3\.jpg; restore"):
        vitreg.extract(vit, folder, out, SMALL)


def test_a_tar_that_was_added(folder, tmp_path):
    vit, out, tars = small_vit(), tmp_path / "store", tmp_path / "tars"
    tars.mkdir()
    for name, images in (("b", "123"), ("a", "567")):
        with tarfile.open(tars / f"{name}.tar", "w") as archive:
            for image in images:
                archive.add(folder / f"{image}.jpg", f"{image}.jpg")
        if name == "b":
            vitreg.extract(vit, tars, out, SMALL)
    with pytest.raises(ValueError, match=r"\(1 archives, .* is .*\(2 archives, .* extend it with update"):
        vitreg.extract(vit, tars, out, SMALL)
    store = vitreg.extract(vit, tars, out, SMALL, update=True)
    assert [image["id"] for image in store] == [f"{number}.jpg" for number in (5, 6, 7, 1, 2, 3)]


def test_a_tar_that_is_damaged_is_a_row_with_an_error(folder, tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as archive:
        archive.add(folder / "1.jpg", "1.jpg")
    (tmp_path / "tars" / "b.tar").write_bytes(b"no tar" * 1000)
    vit, out = small_vit(), tmp_path / "store"
    store = vitreg.extract(vit, tmp_path / "tars", out, SMALL)
    assert [bool(image["error"]) for image in store] == [False, True]
    assert "b.tar is no tar archive" in store[1]["error"]
    with pytest.raises(ImageError, match=r"b\.tar is no tar archive"):
        extract(vit, tmp_path / "tars", tmp_path / "strict", SMALL, strict=True)


def test_norms_say_what_the_images_say(tiny_vit, photographs, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in photographs[:12]:
        shutil.copy(path, folder)
    told: list[str] = []
    vitreg.extract(
        tiny_vit, folder, tmp_path / "store", tokens=("cls",), norm_blocks=(-1,), shard_size=5, say=told.append
    )
    ours, theirs = diagnose_store(tmp_path / "store"), vitreg.diagnose(tiny_vit, folder)
    for name in ("has_artifacts", "status", "threshold", "block", "onset_block", "position_kind", "num_images"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.outlier_fraction == pytest.approx(theirs.outlier_fraction)
    np.testing.assert_allclose(ours.position_frequency, theirs.position_frequency)
    assert theirs.cls_norms is not None
    assert ours.cls_norms is not None
    np.testing.assert_allclose(ours.cls_norms, theirs.cls_norms, rtol=1e-5)
    assert ours.verdict[0] == theirs.verdict[0]
    assert "were not looked at" in " ".join(ours.verdict)
    assert len(told) == 1
    assert "has artifacts" in told[0]
    assert "vitreg fix" in told[0]
    assert diagnose_store(tmp_path / "store", threshold="5xmedian").status == "outliers"
    ours.save(tmp_path / "report")
