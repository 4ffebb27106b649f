"""Every kind of image file there is, and every way one can be broken."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from vitreg.images import MAX_PIXELS, ImageError, find_images, read_image
from vitreg.images.files import open_folder
from vitreg.images.reading import decode_image


def array(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def png_header(width: int, height: int) -> bytes:
    """A PNG of one-bit grey that announces a size and holds a few of its rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(bytes(1 + (width + 7) // 8) * 10)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# --- images ---


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.ppm", "a.tif", "a.webp"])
def test_lossless_formats_come_out_as_they_went_in(tmp_path, noise, name):
    noise.save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    assert (array(tmp_path / name) == np.asarray(noise)).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "LAB", "CMYK", "RGBX", "LA", "PA", "RGBA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    red = Image.new("RGB", (20, 10), (200, 30, 40))
    path = tmp_path / ("a.tif" if mode in ("YCbCr", "LAB", "CMYK", "RGBX") else "a.png")
    if mode == "LAB":
        profile = ImageCms.createProfile
        red = ImageCms.profileToProfile(red, profile("sRGB"), profile("LAB"), outputMode="LAB")
    elif mode == "PA":
        red = red.convert("P").convert("PA")
        path = tmp_path / "a.tif"
    else:
        red = red.convert("RGBA").convert(mode) if mode == "LA" else red.convert(mode)
    try:
        red.save(path)
    except OSError as error:
        pytest.skip(f"this Pillow does not write {mode}: {error}")
    color = array(path)[5, 10].astype(int)
    assert array(path).shape == (10, 20, 3)
    if mode in ("YCbCr", "LAB", "CMYK", "RGBX", "RGBA"):
        assert np.abs(color - [200, 30, 40]).max() <= 3


def test_cmyk_jpeg_of_adobe_is_not_inverted(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    assert np.abs(array(tmp_path / "a.jpg")[8, 8].astype(int) - [200, 30, 40]).max() <= 6


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, name):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    assert array(tmp_path / name)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 32896, 65535]], np.int32), [0, 128, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.float32), [0, 100, 255]),
        (np.array([[-10, 0, 10]], np.float32), [0, 128, 255]),
        (np.array([[0, np.nan, 1]], np.float32), [0, 0, 255]),
        (np.array([[700, 700, 700]], np.float32), [0, 0, 0]),
    ],
)
def test_32_bit_grey_is_scaled_by_what_its_values_say(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert array(tmp_path / "a.tif")[0, :, 0].tolist() == expected


def test_transparency_becomes_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.save(tmp_path / "rgba.png")
    assert array(tmp_path / "rgba.png").tolist() == [[[255, 255, 255], [255, 127, 127]]]
    image.convert("LA").save(tmp_path / "la.png")
    assert array(tmp_path / "la.png")[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 9, 9, 200, 30, 40])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    palette.save(tmp_path / "p.gif", transparency=0)
    for name in ("p.png", "p.gif"):
        assert array(tmp_path / name).tolist() == [[[255, 255, 255], [200, 30, 40]]]
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert array(tmp_path / "key.png").tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_animations_and_documents_give_their_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert array(tmp_path / name)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_exif_orientation_turns_the_image_upright(tmp_path, noise, name, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    noise.save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    assert (array(tmp_path / name) == np.asarray(expected)).all()


@pytest.mark.parametrize(
    "damage", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_is_ignored(tmp_path, noise, damage):
    noise.save(tmp_path / "a.jpg", exif=damage)
    assert array(tmp_path / "a.jpg").shape == (37, 53, 3)


def test_exif_orientation_out_of_range_is_ignored(tmp_path, noise):
    exif = Image.Exif()
    exif[0x0112] = 99
    noise.save(tmp_path / "a.jpg", exif=exif)
    assert array(tmp_path / "a.jpg").shape == (37, 53, 3)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif(tmp_path, noise):
    noise.save(tmp_path / "a.avif")
    assert array(tmp_path / "a.avif").shape == (37, 53, 3)


# --- broken files ---


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.resize((400, 300)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_truncated_jpeg(tmp_path, noise):
    (tmp_path / "a.jpg").write_bytes(jpeg(noise)[:3000])
    with pytest.raises(ImageError, match=r"a\.jpg is damaged \(.*truncated"):
        read_image(tmp_path / "a.jpg")


def test_every_truncation_and_many_damages_give_image_errors_or_images(tmp_path, noise):
    rng = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tif", "a.ppm"):
        noise.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for cut in np.linspace(1, len(whole) - 1, 15).astype(int):
            damaged = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 200), 4):
                damaged[place] = rng.integers(256)
            for content in (whole[:cut], bytes(damaged)):
                (tmp_path / name).write_bytes(content)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with contextlib.suppress(ImageError):
                        assert read_image(tmp_path / name).mode == "RGB"


def test_empty_file(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(ImageError, match=r"a\.png is empty"):
        read_image(tmp_path / "a.png")


def test_text_that_is_called_png(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(ImageError, match=r"a\.png is not an image"):
        read_image(tmp_path / "a.png")


def test_broken_link(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ImageError, match=r"a\.png is a link to a file that does not exist"):
        read_image(tmp_path / "a.png")


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match=r"a\.png cannot be read \(No such file"):
        read_image(tmp_path / "a.png")


def test_folder(tmp_path):
    with pytest.raises(ImageError, match="is a folder; use find_images"):
        read_image(tmp_path)


def test_pipe_is_refused_and_not_waited_on(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(tmp_path / "a.png")


def test_unreadable_file(tmp_path, noise, monkeypatch):
    noise.save(tmp_path / "a.png")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    # The tests may run as root, who may read everything.
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageError, match=r"a\.png may not be read; check its permissions"):
        read_image(tmp_path / "a.png")


def test_huge_image_is_refused_before_decoding(tmp_path):
    (tmp_path / "a.png").write_bytes(png_header(50_000, 50_000))
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"a\.png has more than 179 million pixels; make it smaller"):
            read_image(tmp_path / "a.png")
    assert time.perf_counter() - started < 1


def test_huge_image_is_refused_where_pillows_own_limit_is_lifted(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "a.png").write_bytes(png_header(50_000, 50_000))
    with pytest.raises(ImageError, match="more than 179 million pixels"):
        read_image(tmp_path / "a.png")


def test_a_large_image_is_read_and_only_the_command_line_hides_pillows_warning(tmp_path, noise):
    """It was hidden from all users of Pillow, by importing vitreg."""
    noise.save(tmp_path / "a.png")
    # In a process of its own, because pytest puts its warning filters before all others.
    read = (
        "import sys; from PIL import Image; from vitreg.images import read_image;"
        "Image.MAX_IMAGE_PIXELS = 37 * 53 * 2 // 3; print(read_image(sys.argv[1]).size)"
    )
    done = subprocess.run([sys.executable, "-c", read, tmp_path / "a.png"], capture_output=True, text=True, check=True)
    assert "DecompressionBombWarning" in done.stderr
    assert done.stdout.strip() == "(53, 37)"
    command = (
        "import sys; from PIL import Image; from vitreg.cli import main; Image.MAX_IMAGE_PIXELS = 37 * 53 * 2 // 3;"
        "main(['diagnose', sys.argv[1], '--model', 'vitreg_tiny', '--out', sys.argv[2]])"
    )
    command = [sys.executable, "-c", command, tmp_path / "a.png", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "DecompressionBombWarning" not in done.stderr, done.stderr
    assert (tmp_path / "out" / "report.html").exists()
    assert MAX_PIXELS == 178_956_970


def test_where_warnings_are_errors_a_large_image_is_not_called_larger_than_it_is(tmp_path, noise, monkeypatch):
    noise.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 53 * 2 // 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"Pillow \(Image size \(1961 pixels\) exceeds"):
            read_image(tmp_path / "a.png")


def test_bytes_are_read_as_files_are(tmp_path, noise):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.full((5, 4), 60000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (5, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    for name in ("turned.jpg", "deep.png", "clear.png"):
        data = (tmp_path / name).read_bytes()
        for form in (data, memoryview(data)):
            np.testing.assert_array_equal(np.asarray(decode_image(form, "row 3")), array(tmp_path / name))


def test_bytes_that_are_no_image_are_named(tmp_path, noise):
    noise.save(tmp_path / "a.jpg")
    cut = (tmp_path / "a.jpg").read_bytes()[:-500]
    for data, message in (
        (b"", r"is empty \(0 bytes\)"),
        (b"text", "is not an image that Pillow can read"),
        (cut, "is damaged"),
        (png_header(100_000, 100_000), "has more than 179 million pixels"),
    ):
        with pytest.raises(ImageError, match=f"^a.tar, row 3 {message}"):
            decode_image(data, "a.tar, row 3")


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_file_passes(tmp_path, noise, monkeypatch, kind):
    noise.save(tmp_path / "a.png")

    def fail(*_):
        raise kind

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(kind):
        read_image(tmp_path / "a.png")


# --- finding ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "img10.jpg",
        "img2.JPG",
        "sub/a.png",
        "sub/.hidden.png",
        ".git/b.png",
        "notes.txt",
        "img1.jpeg",
    ):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "data"


def names(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_folder_is_searched_in_natural_order_without_hidden_files(folder):
    assert names(find_images(folder), folder) == ["img1.jpeg", "img2.JPG", "img10.jpg", "sub/a.png"]
    assert find_images(str(folder)) == find_images([folder])


def test_names_with_and_without_numbers_sort_together(tmp_path):
    expected = ["1/a.png", "a/x.png", "a1/x.png", "a2b/x.png", "a10/x.png", "B/x.png", "b/x.png"]
    for name in expected:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert names(find_images(tmp_path), tmp_path) == expected


def test_links_in_circles_end_and_broken_links_are_kept(folder):
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nothing")
    assert names(find_images(folder), folder) == [
        "gone.png",
        "img1.jpeg",
        "img2.JPG",
        "img10.jpg",
        "sub/a.png",
    ]


def test_an_empty_path_is_not_the_current_folder(folder, monkeypatch):
    """`vitreg diagnose "$UNSET"` looked at all images below the current folder."""
    monkeypatch.chdir(folder)
    with pytest.raises(ImageError, match="the path of an image is empty"):
        find_images([""])
    assert find_images(".")


def test_a_link_to_itself_does_not_end_the_search(folder):
    """It ended every command with [Errno 40], and no image of the folder was looked at."""
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    (folder / "sub" / "z.png").symlink_to("z.png")
    assert names(find_images(folder), folder)[-2:] == ["sub/a.png", "sub/z.png"]
    for name in ("one", "two"):
        (folder / "classes" / name).mkdir(parents=True)
        (folder / "classes" / name / "a.png").touch()
    (folder / "classes" / "loop").symlink_to("loop")
    assert open_folder(folder / "classes").classes == ("one", "two")


def test_linked_folders_are_searched(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").touch()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert "linked/x.png" in names(find_images(folder), folder)


def test_named_files_are_taken_whatever_they_are_called_each_once_in_order(folder):
    sources = [folder / "notes.txt", folder / "img10.jpg", folder]
    expected = ["notes.txt", "img10.jpg", "img1.jpeg", "img2.JPG", "sub/a.png"]
    assert names(find_images(sources), folder) == expected
    assert names(find_images([*sources, folder / "sub" / ".." / "img10.jpg"]), folder) == expected


def test_patterns(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert find_images("*.jp*") == [Path("img1.jpeg"), Path("img10.jpg")]
    assert find_images("**/*") == [Path("img1.jpeg"), Path("img2.JPG"), Path("img10.jpg"), Path("sub/a.png")]


def test_file_whose_name_looks_like_a_pattern(folder):
    (folder / "a[1].png").touch()
    assert find_images(folder / "a[1].png") == [folder / "a[1].png"]


def test_missing_path_is_named_with_what_it_may_have_been(folder):
    with pytest.raises(ImageError, match=r"img3\.jpg does not exist; did you mean .*img"):
        find_images(folder / "img3.jpg")
    with pytest.raises(ImageError, match=r"dta/img3\.jpg does not exist; did you mean .*data\?"):
        find_images(folder.parent / "dta" / "img3.jpg")
    with pytest.raises(ImageError, match=r"notes\.txt is a file"):
        find_images(folder / "notes.txt" / "x.png")


def test_broken_link_that_is_named_is_kept(folder):
    (folder / "gone.png").symlink_to(folder / "nothing")
    assert find_images(folder / "gone.png") == [folder / "gone.png"]


def test_nothing_found_says_where_and_for_what(tmp_path):
    with pytest.raises(ImageError, match=f"no image in {tmp_path}; looked for files ending in avif, bmp"):
        find_images(tmp_path)
    with pytest.raises(ImageError, match=r"no image in .*\*\.png"):
        find_images(tmp_path / "*.png")
    with pytest.raises(ImageError, match="an empty list"):
        find_images([])


def test_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ImageError, match=r"cannot be listed \(Permission denied\)"):
        find_images(folder)
