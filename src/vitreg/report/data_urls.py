"""Images inside of a page, as data URLs."""

import base64
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def jpeg_url(photo: UInt8[np.ndarray, "H W 3"], side: int, quality: int) -> str:
    """A photograph, of at most `side` pixels."""
    image = Image.fromarray(photo)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _url(image, "JPEG", quality=quality)


def png_url(pixels: UInt8[np.ndarray, "H W 3"], side: int | None = None) -> str:
    """An image without loss; where a side is given, shrunk to it without mixing colors, and of at most 256 of them."""
    image = Image.fromarray(pixels)
    if side is not None:
        image.thumbnail((side, side), Image.Resampling.NEAREST)
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
    return _url(image, "PNG")


def _url(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
