"""Images with captions, as CLIP is trained on them."""

from __future__ import annotations

import random

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor

from vitreg.checkpoints.text_tower import tokenize
from vitreg.images import ImageSet
from vitreg.model import ViTConfig
from vitreg.training.engine.method import Augmentation, Batch, Sample


class CaptionAugmentation(Augmentation):
    """`image` `[3, H, W]`, a random crop, and `text` `[L]`, one of the image's captions.

    The crop is open_clip's (`transform.py: image_transform`): random size and aspect, bicubic, no flip unless asked
    for, because captions say left and right.

    Args:
        model: says the size in pixels, mean and standard deviation.
        context_length: tokens of a caption.
        min_scale: the smallest part of the image's area that a crop keeps.
        flip: probability of a horizontal flip.
    """

    def __init__(self, model: ViTConfig, *, context_length: int, min_scale: float, flip: float) -> None:
        self.preprocess, self.context_length = model.preprocess, context_length
        crop = v2.RandomResizedCrop(
            model.image_size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip(flip)])

    def __call__(self, sample: Sample) -> Batch:
        """The tensors of one image."""
        pixels: torch.Tensor = pil_to_tensor(self.augment(sample.image))
        text = tokenize([random.choice(sample.captions)], self.context_length)[0]
        return {"image": self.preprocess.normalize(pixels), "text": text}


def check_captions(images: ImageSet) -> None:
    """Every image must have a caption.

    Raises:
        ValueError: names the first of those that have none, and what to do.
    """
    missing = [index for index in range(len(images)) if not images.captions(index)]
    if not missing:
        return
    if len(missing) == len(images):
        raise ValueError(
            f"{images.source} has no captions, which clip learns from; give images with a captions.csv "
            f"(image,caption), tars with .txt members, or Parquet with a caption column"
        )
    raise ValueError(
        f"{len(missing)} of the {len(images)} images in {images.source} have no caption, the first is "
        f"{images.name(missing[0])}; caption them or take them out"
    )
