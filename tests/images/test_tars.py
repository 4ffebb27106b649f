"""WebDataset tars, against the webdataset package and Python's tarfile."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from vitreg.common.cache import cache_folder
from vitreg.images import ImageError, open_image_set
from vitreg.images.tar_index import tar_members

webdataset = pytest.importorskip("webdataset")


@pytest.fixture
def shards(tmp_path, photographs):
    """Twelve photographs in three shards, as webdataset writes them."""
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"shard-{shard:06}.tar")) as writer:
            for number, path in enumerate(photographs[4 * shard : 4 * shard + 4]):
                sample = {"__key__": f"part/{shard}{number}", "cls": 3 - number, "txt": f" {path.stem}\n"}
                writer.write({**sample, "jpg" if number else "JPEG": path.read_bytes(), "mask.png": b"not used"})
    return tmp_path


def write(file, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(file, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


def test_webdatasets_reader_finds_the_same(shards):
    found = open_image_set(shards)
    urls = [str(file) for file in sorted(shards.glob("*.tar"))]
    peer = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(found) == len(peer) == 12
    assert found.classes == ("0", "1", "2", "3")
    assert list(found.labels or ()) == [sample["cls"] for sample in peer]
    assert [found.captions(i) for i in range(12)] == [(sample["txt"].strip(),) for sample in peer]
    assert found.name(4) == f"{urls[1]}, part/10.jpeg"
    raw = list(webdataset.WebDataset(urls, shardshuffle=False))
    for index in (11, 0, 5):  # in any order
        data = next(raw[index][extension] for extension in ("jpg", "jpeg") if extension in raw[index])
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        np.testing.assert_array_equal(np.asarray(found.image(index)), np.asarray(expected))


@pytest.mark.parametrize("pattern", ["shard-{000000..000001}.tar", "shard-{0..1}.tar", "shard-00000{0..1}.tar"])
def test_brace_patterns_are_webdatasets(shards, pattern):
    from braceexpand import braceexpand

    urls = list(braceexpand(str(shards / pattern)))
    if not all(map(str.endswith, urls, ("00.tar", "01.tar"))):
        with pytest.raises(
            ValueError, match=r"2 files of .*\{0\.\.1\}\.tar do not exist: .*shard-0\.tar, .*shard-1\.tar"
        ):
            open_image_set(shards / pattern)
        return
    found = open_image_set(shards / pattern)
    assert {found.name(i).partition(",")[0] for i in range(len(found))} == set(urls)


def test_globs_and_single_archives(shards):
    assert len(open_image_set(shards / "shard-*[12].tar")) == 8
    assert len(open_image_set(str(shards / "shard-000002.tar"))) == 4


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_tarfile_finds_them(tmp_path, format):
    names = ["a.jpg", "b" * 90 + "/" + "c" * 90 + ".jpg", "empty.txt", "last.jpg"]
    if format != tarfile.USTAR_FORMAT:
        names += ["d" * 300 + ".jpg", "é" * 120 + ".jpg"]
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 0 if "empty" in name else 511 + number, 1.5
            tar.addfile(member, io.BytesIO(bytes(member.size)))
            for kind, extra in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard")):
                member = tarfile.TarInfo(f"{extra}{number}")
                member.type, member.linkname = kind, "a.jpg" if number else "x" * 90
                tar.addfile(member)
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    assert [name for name, _, _ in expected] == names
    assert list(tar_members(tmp_path / "a.tar")) == expected


def test_labels_and_captions_in_json(tmp_path, photographs):
    data = photographs[0].read_bytes()
    members = []
    for number in range(3):
        fields = {"label": 2 - number, "caption": f"number {number}"}
        members += [(f"{number}.jpg", data), (f"{number}.json", json.dumps(fields).encode())]
    (tmp_path / "classes.csv").write_text("label,name\n0,cat\n1,dog\n2,owl\n")
    found = open_image_set(write(tmp_path / "a.tar", members))
    assert list(found.labels or ()) == [2, 1, 0]
    assert found.classes == ("cat", "dog", "owl")
    assert [found.captions(i) for i in range(3)] == [("number 0",), ("number 1",), ("number 2",)]


def test_parts_of_a_sample_may_be_apart_and_others_are_passed_over(tmp_path, photographs):
    data = photographs[0].read_bytes()
    members = [
        ("b.cls", b"1"),
        ("a.cls", b" 0\n"),
        ("info.txt", b"-"),
        (".hidden.jpg", b""),
        ("a.png", data),
        ("b.webp", data),
    ]
    found = open_image_set(write(tmp_path / "a.tar", members))
    assert [found.name(i).partition(", ")[2] for i in range(2)] == ["b.webp", "a.png"]
    assert list(found.labels or ()) == [1, 0]
    assert (found.captions(0), found.image(1).mode) == ((), "RGB")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("a.jpg", b""), ("b.jpg", b""), ("b.cls", b"1")],
            r"a\.tar, b and the first image do not both have a label",
        ),
        (
            [("a.jpg", b""), ("a.cls", b"1"), ("b.jpg", b"")],
            r"a\.tar, b and the first image do not both have a label",
        ),
        ([("a.jpg", b""), ("a.cls", b"cat")], r"a\.tar, a\.cls has no class number"),
        ([("a.jpg", b""), ("a.json", b'{"label": [1]}')], r"a\.tar, a\.json has no class number"),
        ([("a.jpg", b""), ("a.json", b"{")], r"a\.tar, a has malformed JSON"),
        ([("a.jpg", b""), ("a.JPG", b"")], r"a\.tar holds a\.JPG twice"),
        ([("a.txt", b"")], r"a\.tar holds no image; expected members named KEY\.jpg"),
    ],
)
def test_samples_that_are_wrong_are_named(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        open_image_set(write(tmp_path / "a.tar", members))


def test_broken_images_are_named_by_archive_and_member(shards, photographs):
    data = photographs[0].read_bytes()
    found = open_image_set(write(shards / "a.tar", [("x/a.jpg", data), ("b.jpg", data[:2000]), ("c.jpg", b"")]))
    assert found.image(0).mode == "RGB"
    for index, message in ((1, r"b\.jpg is damaged"), (2, r"c\.jpg is empty")):
        with pytest.raises(ImageError, match=rf"a\.tar, {message}"):
            found.image(index)
    (shards / "a.tar").unlink()
    with pytest.raises(ImageError, match=r"a\.tar, x/a\.jpg cannot be read \(No such file or directory\)"):
        found.image(0)


@pytest.mark.parametrize(("mode", "name"), [("w:gz", "a.tar.gz"), ("w:xz", "a.tar"), ("w:bz2", "a.tgz")])
def test_compressed_archives_are_refused(tmp_path, photographs, mode, name):
    with tarfile.open(tmp_path / name, mode) as tar:
        tar.add(photographs[0], "a.jpg")
    with pytest.raises(ValueError, match=r"is compressed, so that its images cannot be read in any order; unpack it"):
        open_image_set(tmp_path / name)


def test_every_truncation_and_many_damages_are_errors_or_sets(shards):
    whole = (shards / "shard-000000.tar").read_bytes()
    file = shards / "damaged.tar"
    generator = np.random.default_rng(0)
    headers = [offset - 512 for _, offset, _ in tar_members(shards / "shard-000000.tar")]
    refused = []
    for trial in range(200):
        data = bytearray(whole[: generator.integers(1, len(whole))] if trial % 2 else whole)
        for start in generator.choice(headers, 3):
            position = start + generator.integers(-1024, 512)
            if 0 <= position < len(data):
                data[position] = generator.integers(256)
        file.write_bytes(data)
        try:
            open_image_set(file)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 80
    assert all(str(file) in message for message in refused)


@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L"])
@pytest.mark.parametrize(
    "size",
    [
        b"\x80" + b"\xff" * 11,
        b"\x80" + bytes(5) + b"\x7f" + b"\xff" * 5,
        b"\xff" * 12,
        b"-0000000001\0",
        b"77777777777\0",
    ],
    ids=["2**88", "2**47", "negative", "minus", "8 GB"],
)
def test_absurd_sizes_in_headers_are_damage_not_overflow(tmp_path, photographs, kind, size):
    data = bytearray(write(tmp_path / "a.tar", [("a.jpg", photographs[0].read_bytes())]).read_bytes())
    data[124:136], data[156:157] = size, kind
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar is damaged or cut short at byte 0; write it again"):
        open_image_set(tmp_path / "a.tar")


def test_a_header_that_was_changed_is_found_by_its_checksum(tmp_path, photographs):
    data = bytearray(write(tmp_path / "a.tar", [("a.jpg", photographs[0].read_bytes())]).read_bytes())
    data[130] ^= 1  # a size that would still fit into the file
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar is damaged"):
        open_image_set(tmp_path / "a.tar")


@pytest.mark.parametrize("label", ["1e400", "NaN", "1.5", str(2**70), '"cat"', "null", str(10**9)])
def test_labels_that_are_no_class_numbers_are_refused(tmp_path, photographs, label):
    fields = f'{{"label": {label}}}'.encode()
    with pytest.raises(ValueError, match=r"a\.tar.*(has no class number but|labels must be class numbers)"):
        open_image_set(write(tmp_path / "a.tar", [("a.jpg", photographs[0].read_bytes()), ("a.json", fields)]))


def test_text_that_is_called_tar(tmp_path):
    (tmp_path / "a.tar").write_text("not found " * 100)
    with pytest.raises(ValueError, match=r"a\.tar is no tar archive \(ustar, GNU or pax\)"):
        open_image_set(tmp_path / "a.tar")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "cache"))


def without_headers(file):
    """What a scan would refuse, of the same size and time, with the images where they were."""
    data, status = bytearray(file.read_bytes()), file.stat()
    for _, offset, _ in list(tar_members(file)):
        data[offset - 512 : offset] = b"x" * 512
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match="is damaged or cut short"):
        list(tar_members(file))


def everything(found):
    described = [(found.name(i), found.captions(i), found.image(i).tobytes()) for i in range(len(found))]
    return described, list(found.labels or ()), found.classes


@pytest.mark.usefixtures("own_cache")
def test_archives_are_not_scanned_a_second_time(shards):
    files = sorted(shards.glob("*.tar"))
    for file in files:
        os.utime(file, (1e9, 1e9))
    first = everything(open_image_set(shards))
    for file in files:
        without_headers(file)
    assert everything(open_image_set(shards)) == first


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_index_is_made_again(shards, damage):
    for file in shards.glob("*.tar"):
        os.utime(file, (1e9, 1e9))
    first = everything(open_image_set(shards))
    (index,) = cache_folder().iterdir()
    data = bytearray(index.read_bytes())
    data[len(data) // 3] ^= damage == "flipped"
    index.write_bytes(data if damage == "flipped" else data[: len(data) // 2 if damage == "cut" else 0])
    assert everything(open_image_set(shards)) == first


@pytest.mark.usefixtures("own_cache")
def test_an_archive_that_changed_is_scanned_again(tmp_path, photographs):
    for name, changed in (("a", 1e9), ("b", 1e9 + 1)):
        file = write(tmp_path / "a.tar", [(f"{name}.jpg", photographs[0].read_bytes())])
        os.utime(file, (changed, changed))
        assert open_image_set(file).name(0) == f"{file}, {name}.jpg"


def test_archives_are_read_without_a_cache(shards, monkeypatch):
    cached = everything(open_image_set(shards))
    monkeypatch.setenv("VITREG_CACHE", str(shards / "shard-000000.tar" / "no folder"))
    assert everything(open_image_set(shards)) == cached


def test_names_that_are_not_utf_8_are_those_of_the_archive(tmp_path, photographs):
    file = write(tmp_path / "a.tar", [("\udcff.jpg", photographs[0].read_bytes())], tarfile.GNU_FORMAT)
    assert [open_image_set(file).name(0) for _ in range(2)] == [f"{file}, \udcff.jpg"] * 2
