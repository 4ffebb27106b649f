"""Images in: finding files, reading them, streaming them, and sets with labels, captions, boxes, masks or depth."""

from vitreg.images.ahead import map_ahead
from vitreg.images.batches import Batches, Images, check_batch, in_memory
from vitreg.images.boxes import BoxedImage, BoxSet, open_box_set
from vitreg.images.bundled import bundled_photographs
from vitreg.images.dense import DenseSet
from vitreg.images.depth import MILLIMETERS, DepthSet, open_depth
from vitreg.images.labeled import ImageSet, Subset, spaced, spaced_indices
from vitreg.images.masks import IGNORED, SegmentationSet, open_segmentation
from vitreg.images.reading import EXTENSIONS, MAX_PIXELS, ImageError, as_rgb, find_images, image_size, read_image
from vitreg.images.sets import check_classes, open_image_set, open_split
from vitreg.images.sharded import SetShards, Shards, open_shards
from vitreg.images.stream import ImageBatch, ImageStream, SkippedImage, no_images

__all__ = [
    "EXTENSIONS",
    "IGNORED",
    "MAX_PIXELS",
    "MILLIMETERS",
    "Batches",
    "BoxSet",
    "BoxedImage",
    "DenseSet",
    "DepthSet",
    "ImageBatch",
    "ImageError",
    "ImageSet",
    "ImageStream",
    "Images",
    "SegmentationSet",
    "SetShards",
    "Shards",
    "SkippedImage",
    "Subset",
    "as_rgb",
    "bundled_photographs",
    "check_batch",
    "check_classes",
    "find_images",
    "image_size",
    "in_memory",
    "map_ahead",
    "no_images",
    "open_box_set",
    "open_depth",
    "open_image_set",
    "open_segmentation",
    "open_shards",
    "open_split",
    "read_image",
    "spaced",
    "spaced_indices",
]
