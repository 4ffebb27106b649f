"""Image files: finding them, and reading any of them as upright RGB or saying in one sentence why not."""

import difflib
import glob
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

MAX_PIXELS = 178_956_970
"""More than this in one image is refused before decoding; Pillow's own limit on decompression bombs."""

EXTENSIONS = frozenset({"avif", "bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"})
"""What counts as an image in folders and patterns; a file that is named is read whatever it is called."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A file that cannot be read as an image: one sentence with the file, what is wrong and what to do."""


def read_image(path: str | Path) -> Image.Image:
    """The image in a file as RGB, turned upright by its EXIF orientation.

    Transparent parts come out white; of animations and documents the first frame is taken. 16-bit grey is
    divided by 257. 32-bit integer grey is taken for 16-bit where its values fit, floating-point grey for 0..1
    or 0..255 where its values fit; otherwise both are stretched from their minimum to their maximum.

    Raises:
        ImageError: The file is missing, unreadable, no image, damaged, or larger than `MAX_PIXELS`.
    """
    path = Path(path)
    _check_file(path)
    return _read(path, str(path))


def decode_image(data: bytes | memoryview, name: str) -> Image.Image:
    """What `read_image` gives, from the bytes of an image file.

    Args:
        data: the file's content.
        name: what to call the image in messages.

    Raises:
        ImageError: They are no image, damaged, or one larger than `MAX_PIXELS`.
    """
    if not len(data):
        raise ImageError(f"{name} is empty (0 bytes); replace it or leave it out")
    return _read(io.BytesIO(data), name)


def as_rgb(image: object) -> Image.Image:
    """What `read_image` gives, of an image that is open already, or of an array of 8-bit values `[H, W, 3]`.

    Raises:
        ImageError: It is damaged, or neither.
    """
    try:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        if not isinstance(image, Image.Image):
            raise TypeError(f"a {type(image).__name__} among open images")
        image.load()
        return _upright(_to_rgb(image), _orientation(image))
    except (OSError, TypeError, ValueError) as error:
        raise ImageError(f"an image that was given cannot be read ({error}); replace it or leave it out") from error


def _read(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return _upright(_to_rgb(image), _orientation(image))
    except MemoryError:
        raise
    except Image.DecompressionBombWarning as error:  # above half of the limit, where warnings are made errors
        raise ImageError(f"{name} is refused by Pillow ({error}); make it smaller, or allow the warning") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name} has more than {MAX_PIXELS / 1e6:.0f} million pixels; make it smaller first") from None
    except PermissionError:
        raise ImageError(f"{name} may not be read; check its permissions") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name} is not an image that Pillow can read; convert it to PNG or JPEG") from None
    # Damaged files raise whatever the parsing trips over: OSError, SyntaxError, struct.error, KeyError ...
    except Exception as error:
        what = str(error) or type(error).__name__
        raise ImageError(f"{name} is damaged ({what}); replace it or leave it out") from error


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in pixels of the upright image, from the file's header alone.

    Raises:
        ImageError: The file is missing, unreadable or no image.
    """
    path = Path(path)
    _check_file(path)
    try:
        with Image.open(path) as image:
            turned = (_orientation(image) or 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:
        raise ImageError(f"{path} is not an image that Pillow can read; convert it to PNG or JPEG") from error


def find_images(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """The image files that `sources` name: files, folders (and theirs), and patterns like `photos/*.jpg`.

    Files come in the order of the sources, those of one folder or pattern sorted naturally (`2.jpg` before
    `10.jpg`), each once. In folders and patterns, hidden files and what does not end in one of `EXTENSIONS`
    are passed over; links are followed, and broken ones kept, so that they get reported where they are read.

    Raises:
        ImageError: A source does not exist, a folder cannot be listed, or there is no image in any of them.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    sources = list(sources)
    if "" in sources:  # an unset variable of the shell; as a path it would be the current folder
        raise ImageError("the path of an image is empty; give a file, a folder or a pattern")
    sources = [Path(source).expanduser() for source in sources]
    found: dict[str, Path] = {}
    for source in sources:
        for path in _files(source):
            found.setdefault(os.path.abspath(path), path)
    if not found:
        where = ", ".join(map(str, sources)) or "an empty list"
        raise ImageError(f"no image in {where}; looked for files ending in {', '.join(sorted(EXTENSIONS))}")
    return list(found.values())


def _files(source: Path) -> Iterable[Path]:
    if source.is_dir():
        return sorted(walk_images(source), key=_natural)
    if os.path.lexists(source):
        return [source]
    if glob.has_magic(str(source)):
        matches = map(Path, glob.glob(str(source), recursive=True))
        return sorted((path for path in matches if _is_candidate(path) and not path.is_dir()), key=_natural)
    raise ImageError(f"{source} does not exist{_suggestion(source)}")


def walk_images(folder: Path) -> Iterator[Path]:
    """The image files below a folder in no order, chosen as `find_images` does but without the cost of its sorting.

    Raises:
        ImageError: A folder cannot be listed.
    """
    waiting, seen = [folder], set[tuple[int, int]]()  # device and inode, against loops of links
    while waiting:
        folder = waiting.pop()
        try:
            status = folder.stat()
            entries = list(os.scandir(folder))
        except OSError as error:
            raise ImageError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from None
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                waiting.append(path)
            elif _is_candidate(path):
                yield path


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether a folder's entry is a folder itself; a link that leads in circles or to where nobody may look is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_candidate(path: Path) -> bool:
    return path.suffix[1:].lower() in EXTENSIONS


def _natural(path: Path) -> list[tuple[list[str | int], str]]:
    """Sort key: numbers by value. Splitting at digits puts text at even places and numbers at odd ones."""
    return [
        ([int(piece) if piece.isdecimal() else piece.lower() for piece in re.split(r"([0-9]+)", part)], part)
        for part in path.parts
    ]


def _suggestion(missing: Path) -> str:
    """What is there instead: names like the first missing part of a path."""
    while not missing.parent.exists():
        missing = missing.parent
    if not missing.parent.is_dir():
        return f"; {missing.parent} is a file"
    try:
        names = os.listdir(missing.parent)
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, names, n=3)
    return f"; did you mean {', '.join(str(missing.parent / name) for name in close)}?" if close else ""


def _check_file(path: Path) -> None:
    """Refuses what opening would misreport or, a pipe, hang on."""
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink():
            raise ImageError(f"{path} is a link to a file that does not exist; restore it or remove the link") from None
        raise ImageError(f"{path} cannot be read ({error.strerror}); check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{path} is a folder; use find_images to list the images in it")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{path} is not a regular file; save the image to one")
    if status.st_size == 0:
        raise ImageError(f"{path} is empty (0 bytes); replace it or leave it out")


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    # An image with damaged EXIF is a good image that does not say which way is up.
    except Exception:
        return None


def _upright(image: Image.Image, orientation: int | None) -> Image.Image:
    method = _UPRIGHT.get(orientation) if orientation else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey of 16 or 32 bits as bytes. Pillow's own conversion would clip everything above 255 to white."""
    values = np.nan_to_num(values.astype(np.float64), nan=0, posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if mode == "F":
        bounds = next((b for b in ((0, 1), (0, 255)) if b[0] <= low and high <= b[1]), (low, high))
    else:
        bounds = (0, 65535) if low >= 0 and high <= 65535 else (low, high)
    low, high = bounds
    return np.rint((values - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)
