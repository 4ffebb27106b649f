"""Object discovery: images in, boxes out, for any model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vitreg.checkpoints import from_module
from vitreg.discovery.features import condition, patch_features
from vitreg.discovery.lost import lost
from vitreg.discovery.protocol import DEFAULT, FACETS, Method, Protocol
from vitreg.discovery.region import Region
from vitreg.discovery.tokencut import tokencut
from vitreg.images import (
    ImageBatch,
    ImageError,
    Images,
    ImageStream,
    SkippedImage,
    check_batch,
    find_images,
    image_size,
    in_memory,
)
from vitreg.model import VisionTransformer

MIN_GRID = 3
"""Patches that an image must have along each side: fewer are no object and background around it."""


@dataclass(frozen=True, eq=False)
class Detection:
    """An object of one image.

    Attributes:
        box: x0, y0, x1, y1 in pixels of the image; x1 and y1 are the first column and row beyond the object.
        seed: (row, column) of the patch that it was found from.
        mask: the patches of the object; patches lie from the image's top left corner.
        degree: to how many other patches each patch is similar.
        others: the image's further objects, in the order in which they were found.
        path: the image's file, None for an image of a batch.
    """

    box: tuple[int, int, int, int]
    seed: tuple[int, int]
    mask: Bool[np.ndarray, "h w"] = field(repr=False)
    degree: Int64[np.ndarray, "h w"] = field(repr=False)
    others: tuple[Detection, ...] = ()
    path: Path | None = None


def discover_objects(
    vit: VisionTransformer | nn.Module,
    images: Images,
    *,
    method: str = "lost",
    facet: str = DEFAULT.facet,
    block: int = DEFAULT.block,
    normalize: bool = DEFAULT.normalize,
    center: bool = DEFAULT.center,
    bias: float = DEFAULT.bias,
    k_patches: int = DEFAULT.k_patches,
    max_objects: int = 1,
    batch_size: int = 8,
) -> list[Detection]:
    """Find the main object of every image, without labels or training.

    Files are read at their own resolution and padded at the right and the bottom, with the checkpoint's mean color, to
    a multiple of the patch size; boxes end where the image does. Images of equal padded size go through the model
    together. The defaults are the documented protocol, the same for every model (docs/discovery.md).

    Args:
        vit: any model, with registers or without, as for `diagnose`.
        images: a batch or image, normalized as `vit.preprocess` does, of any size; files, folders or globs; or images
            of Pillow or arrays of their pixels.
        method: `"lost"` (Simeoni et al. 2021) or `"tokencut"` (Wang et al. 2022; always of cosines, whatever
            `normalize` says, and without `k_patches`).
        facet: the features compared: `"keys"`, `"queries"` or `"values"` of the block's attention, or its `"tokens"`.
        block: the block they are from, counted from 0, negative from the end.
        normalize: divide the features by their L2 norm.
        center: subtract the mean feature of the image first.
        bias: added to every similarity.
        k_patches: patches of lowest degree that the seed may be expanded with; all of them in a smaller image.
        max_objects: find so many by repeating LOST on the patches outside the objects found before.
        batch_size: images at a time.

    Returns:
        One detection an image, in the order of the images.

    Raises:
        ValueError: an image cannot be read or is smaller than 3 x 3 patches, or an argument does not fit.
    """
    if facet not in FACETS:
        raise ValueError(f"facet {facet!r} is unknown; choose from {', '.join(FACETS)}")
    protocol = Protocol(facet, block, normalize, center, bias, k_patches)
    vit = from_module(vit)
    device = next(vit.parameters()).device
    opened = in_memory(images)
    if opened is not None:
        keep = replace(vit.preprocess, crop="pad", multiple_of=1)
        batches = ImageStream(opened, keep, batch_size=batch_size, strict=True, device=device)
    elif isinstance(images, Tensor | np.ndarray):
        parts = check_batch(torch.as_tensor(images)).split(batch_size)
        batches = (ImageBatch(p.to(device), [], [], [(p.shape[-2], p.shape[-1])] * len(p)) for p in parts)
    elif isinstance(images, str | Path | list | tuple):
        paths = find_images(images)
        stream = native_stream(vit, paths, batch_size=batch_size, strict=True)
        by_path: dict[Path, Detection] = {}
        for batch, found in detect(vit, stream, protocol, method=method, max_objects=max_objects):
            by_path.update(zip(batch.paths, found, strict=True))
        return [replace(by_path[path], path=path) for path in paths]
    else:
        raise ValueError(f"images is a {type(images).__name__}; give a batch, files, or open images in a list")
    return [d for _, found in detect(vit, batches, protocol, method=method, max_objects=max_objects) for d in found]


def native_stream(vit: VisionTransformer, paths: Sequence[Path], *, batch_size: int, strict: bool) -> ImageStream:
    """Images at their own resolution, padded to the patch size; equal sizes follow each other, for full batches."""
    preprocess = replace(vit.preprocess, crop="pad", multiple_of=vit.config.patch_size)

    def padded_size(path: Path) -> tuple[int, int]:
        # What cannot be read is reported when it is.
        with contextlib.suppress(ImageError):
            return preprocess.output_size(*image_size(path))
        return (0, 0)

    device = next(vit.parameters()).device
    ordered = sorted(paths, key=padded_size)
    return ImageStream(ordered, preprocess, batch_size=batch_size, strict=strict, device=device)


def detect(
    vit: VisionTransformer,
    batches: Iterable[ImageBatch],
    protocol: Protocol,
    *,
    method: str = "lost",
    max_objects: int = 1,
) -> Iterator[tuple[ImageBatch, list[Detection]]]:
    """The detections of every batch, as it comes. A stream that is not strict skips what is too small, and lists it.

    Raises:
        ValueError: an argument does not fit, or (unless the stream skips it) an image is smaller than 3 x 3 patches.
    """
    if method not in get_args(Method):
        raise ValueError(f"method {method!r} is unknown; choose from {', '.join(get_args(Method))}")
    if max_objects < 1 or (max_objects > 1 and method != "lost"):
        raise ValueError(f"max_objects is {max_objects}; it must be at least 1, and 1 with method 'tokencut'")
    patch = vit.config.patch_size
    for batch in batches:
        batch = _large_enough(batch, batches, patch)
        if not batch.sizes:
            continue
        images = pad(batch.images, patch)
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        features = patch_features(vit, images, [protocol.facet], [protocol.block])[protocol.facet, protocol.block]
        detections = []
        for i, size in enumerate(batch.sizes):
            regions = find_regions(features[i], grid, protocol, method=method, max_objects=max_objects)
            first, *others = (Detection(r.box(patch, *size), r.seed, r.mask, r.degree) for r in regions)
            detections.append(replace(first, others=tuple(others)))
        yield batch, detections


def _large_enough(batch: ImageBatch, source: Iterable[ImageBatch], patch: int) -> ImageBatch:
    """The batch without images that are too small, which are errors unless they are from a stream that skips."""
    keep = []
    for i, size in enumerate(batch.sizes):
        try:
            check_size(size, patch, str(batch.paths[i]) if batch.paths else "an image of the batch")
            keep.append(i)
        except ValueError as error:
            if not isinstance(source, ImageStream) or source.strict:
                raise
            source.skipped.append(SkippedImage(batch.paths[i], str(error)))
    if len(keep) == len(batch.sizes):
        return batch
    rows = ([values[i] for i in keep] for values in (batch.numbers, batch.paths, batch.sizes))
    return ImageBatch(batch.images[keep], *rows)


def find_regions(
    features: Float[Tensor, "N D"],
    grid: tuple[int, int],
    protocol: Protocol,
    *,
    method: str = "lost",
    max_objects: int = 1,
) -> list[Region]:
    """The objects of one image: at least one, at most `max_objects`, until no patch is left."""
    features = condition(features, normalize=protocol.normalize, center=protocol.center)
    if method == "tokencut":
        return [tokencut(features, grid, bias=protocol.bias)]
    allowed: Tensor | None = None
    regions: list[Region] = []
    while len(regions) < max_objects and (allowed is None or allowed.any()):
        found = lost(features, grid, bias=protocol.bias, k_patches=protocol.k_patches, allowed=allowed)
        left = ~torch.from_numpy(found.mask).flatten().to(features.device)
        allowed = left if allowed is None else allowed & left
        regions.append(found)
    return regions


def pad(images: Float[Tensor, "B 3 H W"], patch: int) -> Float[Tensor, "B 3 h w"]:
    """Pad right and bottom with 0, the mean color, to a multiple of the patch size."""
    height, width = images.shape[-2:]
    return torch.nn.functional.pad(images, (0, -width % patch, 0, -height % patch))


def check_size(size: tuple[int, int], patch: int, name: str) -> None:
    """Raise `ValueError` for an image, of (height, width) pixels, that is smaller than 3 x 3 patches."""
    if min(size) < MIN_GRID * patch:
        raise ValueError(
            f"{name} has {size[1]} x {size[0]} pixels; object discovery needs {MIN_GRID} x {MIN_GRID} patches of "
            f"{patch} pixels: enlarge it"
        )
