"""Pictures in: finding files, reading them, and streaming them to a model in batches."""

from vitreg.images.batches import Batches, Images
from vitreg.images.bundled import bundled_photographs
from vitreg.images.reading import EXTENSIONS, MAX_PIXELS, ImageError, find_images, read_image
from vitreg.images.stream import ImageBatch, ImageStream, SkippedImage

__all__ = [
    "EXTENSIONS",
    "MAX_PIXELS",
    "Batches",
    "ImageBatch",
    "ImageError",
    "ImageStream",
    "Images",
    "SkippedImage",
    "bundled_photographs",
    "find_images",
    "read_image",
]
