"""What is recognized at a path, how it is divided, and that worker processes can read it."""

from __future__ import annotations

import csv
import multiprocessing
import shutil
import tarfile
from hashlib import sha256

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitreg.images import ImageSet, open_image_set, open_split


def class_folders(folder, files):
    for number, path in enumerate(files):
        (folder / f"class{number % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"class{number % 3}")
    return folder


def parquet(file, files):
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    pq.write_table(pa.table({"image": images, "label": [number % 3 for number in range(len(images))]}), file)
    return file


def tar(file, files):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for path in files:
            archive.add(path, path.name)
    return file


def captions(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((path, path.stem) for path in files)])
    return folder


def digest(found: ImageSet) -> list[str]:
    return [sha256(found.image(index).tobytes()).hexdigest() for index in range(len(found))]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_every_kind_of_set(tmp_path, photographs, start):
    files = photographs[:4]
    sets = [
        open_image_set(class_folders(tmp_path / "folders", files)),
        open_image_set(parquet(tmp_path / "a.parquet", files)),
        open_image_set(tar(tmp_path / "a.tar", files)),
        open_image_set(captions(tmp_path / "captions", files)),
    ]
    expected = [digest(found) for found in sets]
    assert len({tuple(sorted(hashes)) for hashes in expected}) == 1
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.map(digest, sets * 2, chunksize=1) == expected * 2


def test_train_and_held_out_folders(tmp_path, photographs):
    class_folders(tmp_path / "train", photographs[:9])
    assert [len(part) if part else part for part in open_split(tmp_path)] == [9, None]
    assert open_image_set(tmp_path).classes == ("class0", "class1", "class2")
    for name in ("test", "validation", "val"):  # each is preferred to those before it
        class_folders(tmp_path / name, photographs[9:15])
        train, held_out = open_split(tmp_path)
        assert held_out is not None
        assert (train.source, held_out.source) == (str(tmp_path / "train"), str(tmp_path / name))
        assert train.classes == held_out.classes == ("class0", "class1", "class2")
    with pytest.raises(ValueError, match=r"holds the parts train and val and validation and test; give one of them"):
        open_image_set(tmp_path)


def test_train_may_be_a_class(tmp_path, photographs):
    for name in ("bus", "train", "tram"):
        class_folders(tmp_path / name, photographs[:3])
    train, held_out = open_split(tmp_path)
    assert held_out is None
    assert train.classes == ("bus", "train", "tram")


def test_classes_that_differ_are_named(tmp_path, photographs):
    class_folders(tmp_path / "train", photographs[:6])
    class_folders(tmp_path / "val", photographs[6:8])
    (tmp_path / "val/class1").rename(tmp_path / "val/class7")
    message = "must have the same classes, but .*train lacks class7; .*val lacks class1, class2"
    with pytest.raises(ValueError, match=message):
        open_split(tmp_path)


@pytest.mark.parametrize(("write", "suffix"), [(parquet, ".parquet"), (tar, ".tar")])
def test_train_and_held_out_files(tmp_path, photographs, write, suffix):
    for number in range(2):
        write(tmp_path / f"imagenet-train-{number:04}{suffix}", photographs[4 * number : 4 * number + 4])
    assert [len(part) if part else part for part in open_split(tmp_path)] == [8, None]
    write(tmp_path / f"imagenet-validation-0000{suffix}", photographs[8:10])  # two of the three classes
    train, held_out = open_split(tmp_path)
    assert held_out is not None
    assert (len(train), len(held_out)) == (8, 2)
    assert "imagenet-validation-0000" in held_out.name(0)
    with pytest.raises(ValueError, match="holds the parts train and validation; give one of them"):
        open_image_set(tmp_path)
    assert len(open_image_set(tmp_path / f"*-validation-*{suffix}")) == 2


def test_files_without_a_part_for_training_are_one_set(tmp_path, photographs):
    parquet(tmp_path / "a.parquet", photographs[:3])
    parquet(tmp_path / "val.parquet", photographs[3:5])
    train, held_out = open_split(tmp_path)
    assert (len(train), held_out) == (5, None)


def test_held_out_numbers_of_classes_that_training_lacks(tmp_path, photographs):
    parquet(tmp_path / "train.parquet", photographs[:2])
    parquet(tmp_path / "val.parquet", photographs[:3])
    with pytest.raises(ValueError, match=r"train\.parquet lacks 2"):
        open_split(tmp_path)


def test_patterns_of_images(test_data):
    found = open_image_set(test_data / "imagenet-samples/n015*.jpg")
    assert len(found) == len(list((test_data / "imagenet-samples").glob("n015*.jpg"))) > 1


def test_paths_that_hold_no_set(tmp_path, photographs):
    parquet(tmp_path / "a.parquet", photographs[:1])
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match=r"no set of images in .*a\.txt; give a folder, one CSV file"):
        open_image_set(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"no set of images in .* and 1 more"):
        open_image_set(tmp_path / "a.*")
    with pytest.raises(ValueError, match=r"a\.parket does not exist; did you mean .*a\.parquet"):
        open_image_set(tmp_path / "a.parket")
