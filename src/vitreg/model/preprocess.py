"""What a checkpoint expects of its images: size, crop, interpolation, mean and standard deviation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vitreg.common.renamed import accepts_old_names

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_ASPECT = 16
"""With `crop="none"` longer images are squeezed to this aspect: 3000 x 1 would become 672000 x 224."""

Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos"]
Crop = Literal["center", "squash", "border", "none", "pad"]


class _Geometry(NamedTuple):
    """Resize to `height` x `width`, then take the `rows` x `columns` window at `top`, `left`."""

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int


@accepts_old_names
@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform of a checkpoint, equal to timm's (`timm.data.create_transform`).

    Attributes:
        size: Height and width in pixels that the image is cropped to.
        mean: Per channel (RGB), of values in 0..1.
        std: Per channel (RGB), of values in 0..1.
        interpolation: Pillow's filter; all but "nearest" are antialiased.
        crop_pct: The part of the resized image that the crop keeps (timm's `crop_pct`).
        crop: "center" resizes the short side to `size / crop_pct` and takes the center. "squash" resizes
            both sides to it, whatever the aspect (SigLIP). "border" resizes the long side to it and pads with
            the mean. "none" keeps the whole image and its aspect: short side to `min(size)`, both sides to
            the nearest multiple of `multiple_of`, so images differ in size; aspects beyond `MAX_ASPECT` are
            squeezed to it. "pad" keeps every pixel as it is and pads right and bottom with the mean to the next
            multiple of `multiple_of`.
        multiple_of: The patch size. Where it does not divide `size`, the rows and columns left over at the
            bottom and right are dropped. A patch embedding, a convolution without padding, never sees them,
            so the tokens are the checkpoint's own (SigLIP so400m: resized to 384, 378 are handed on).
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.875
    crop: Crop = "center"
    multiple_of: int = 1

    def __post_init__(self) -> None:
        for name, given, known in (
            ("interpolation", self.interpolation, get_args(Interpolation)),
            ("crop", self.crop, get_args(Crop)),
        ):
            if given not in known:
                raise ValueError(f"{name} is {given!r}; choose one of {', '.join(known)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} must be three numbers each (RGB), std above 0")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}; it must be above 0 and at most 1")
        if self.multiple_of < 1 or len(self.size) != 2 or min(self.size) < self.multiple_of:
            raise ValueError(f"size {self.size} must be height and width, each at least one patch ({self.multiple_of})")

    @classmethod
    def from_timm(cls, config: Mapping[str, Any], *, multiple_of: int = 1) -> "Preprocess":
        """From timm's data configuration (`timm.data.resolve_model_data_config(model)`, a `pretrained_cfg`).

        Args:
            config: May hold `input_size` (channels, height, width), `mean`, `std`, `interpolation`,
                `crop_pct` and `crop_mode`; what is missing or None gets timm's default.
            multiple_of: The patch size of the model.

        Raises:
            ValueError: The model is not for RGB images, or names an interpolation or crop unknown here.
        """
        channels, height, width = config.get("input_size") or (3, 224, 224)
        if channels != 3:
            raise ValueError(f"the checkpoint takes {channels} channels; vitreg reads RGB images, 3 channels")
        return cls(
            size=(height, width),
            mean=tuple(config.get("mean") or IMAGENET_MEAN),
            std=tuple(config.get("std") or IMAGENET_STD),
            interpolation=config.get("interpolation") or "bicubic",
            crop_pct=config.get("crop_pct") or 0.875,
            crop=config.get("crop_mode") or "center",
            multiple_of=multiple_of,
        )

    def with_size(self, height: int, width: int) -> "Preprocess":
        """The same preprocessing for images of another size in pixels."""
        return replace(self, size=(height, width))

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """The image as the model wants it: resized, cropped, normalized float32."""
        return self.normalize(self.pixels(image))

    def pixels(self, image: Image.Image) -> UInt8[Tensor, "3 h w"]:
        """The geometric part alone: the image resized and cropped, values 0..255."""
        if image.mode != "RGB":
            image = image.convert("RGB")
        window = self._window(image, self._geometry(image.height, image.width))
        # The transpose is numpy's, because torch's would start threads of its own in every decoding thread.
        return torch.from_numpy(window.transpose(2, 0, 1).copy())

    def normalize(self, pixels: UInt8[Tensor, "*batch 3 h w"]) -> Float[Tensor, "*batch 3 h w"]:
        """Values 0..255 to the model's float32, on the pixels' device: `(pixels / 255 - mean) / std`."""
        scale, shift = self._scale_and_shift(pixels.device)
        return pixels.to(torch.float32).mul_(scale).add_(shift)

    def unnormalize(self, images: Float[Tensor, "*batch 3 h w"]) -> UInt8[Tensor, "*batch 3 h w"]:
        """Back from the model's values to 0..255, rounded; exact for what `normalize` returned."""
        scale, shift = self._scale_and_shift(images.device)
        return images.float().sub(shift).div_(scale).round_().clamp_(0, 255).to(torch.uint8)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of `height` x `width` pixels comes out with."""
        geometry = self._geometry(height, width)
        return geometry.rows, geometry.columns

    def region(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of a `height` x `width` image that comes out: x0, y0, x1, y1 in its own pixels.

        Use it to place on the original what was found in the output. With `crop="border"` and `"pad"` it reaches
        beyond the image, by the padding.
        """
        geometry = self._geometry(height, width)
        per_row, per_column = height / geometry.height, width / geometry.width
        return (
            geometry.left * per_column,
            geometry.top * per_row,
            (geometry.left + geometry.columns) * per_column,
            (geometry.top + geometry.rows) * per_row,
        )

    def _scale_and_shift(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (self.mean, self.std))
        return (1 / (255 * std)).to(device, torch.float32), (-mean / std).to(device, torch.float32)

    def _geometry(self, height: int, width: int) -> _Geometry:
        """The size arithmetic of timm 1.0 (`transforms_imagenet_eval`), its roundings included."""
        if self.crop == "none":
            return self._whole(height, width)
        if self.crop == "pad":
            rows, columns = (math.ceil(side / self.multiple_of) * self.multiple_of for side in (height, width))
            return _Geometry(height, width, 0, 0, rows, columns)
        target = [math.floor(side / self.crop_pct) for side in self.size]
        if self.crop == "squash":
            resized = target
        elif self.crop == "center" and target[0] == target[1]:
            # torchvision's Resize cuts the long side off to an integer ...
            short = min(height, width)
            resized = [int(target[0] * side / short) for side in (height, width)]
        else:
            # ... and timm's ResizeKeepRatio rounds it.
            ratios = [side / wanted for side, wanted in zip((height, width), target, strict=True)]
            ratio = min(ratios) if self.crop == "center" else max(ratios)
            resized = [max(1, round(side / ratio)) for side in (height, width)]
        top, left = (_offset(have, keep) for have, keep in zip(resized, self.size, strict=True))
        rows, columns = (side - side % self.multiple_of for side in self.size)
        return _Geometry(resized[0], resized[1], top, left, rows, columns)

    def _whole(self, height: int, width: int) -> _Geometry:
        scale = min(self.size) / min(height, width)
        longest = MAX_ASPECT * min(self.size)
        rows, columns = (
            max(1, round(min(side * scale, longest) / self.multiple_of)) * self.multiple_of for side in (height, width)
        )
        return _Geometry(rows, columns, 0, 0, rows, columns)

    def _window(self, image: Image.Image, geometry: _Geometry) -> np.ndarray:
        """The window of the resized image as height x width x 3 bytes, padding where it reaches beyond."""
        height, width, top, left, rows, columns = geometry
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + columns, width), min(top + rows, height)
        if image.size == (width, height):
            seen = np.asarray(image.crop((x0, y0, x1, y1)))
        elif self.interpolation in ("bicubic", "bilinear") and max(height, width) <= MAX_ASPECT * min(height, width):
            seen = _resize(image, height, width, self.interpolation)[y0:y1, x0:x1]
        else:
            # Pillow computes the window alone; all of a 3000 x 1 image would be 200 million pixels.
            per_column, per_row = image.width / width, image.height / height
            box = (x0 * per_column, y0 * per_row, x1 * per_column, y1 * per_row)
            filter_ = Image.Resampling[self.interpolation.upper()]
            seen = np.asarray(image.resize((x1 - x0, y1 - y0), filter_, box=box))
        if seen.shape[:2] == (rows, columns):
            return seen
        canvas = np.empty((rows, columns, 3), np.uint8)
        canvas[:] = [round(255 * value) for value in self.mean]
        canvas[y0 - top : y1 - top, x0 - left : x1 - left] = seen
        return canvas


def _resize(image: Image.Image, height: int, width: int, interpolation: str) -> np.ndarray:
    """Pillow's antialiased resize by torch's vector kernels: about twice as fast, rounding apart."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = functional.interpolate(pixels, (height, width), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _offset(have: int, keep: int) -> int:
    """Where torchvision's CenterCrop starts; negative where it pads."""
    return round((have - keep) / 2) if have >= keep else -((keep - have) // 2)
