"""DINOv2's views of an image: two global crops, several small local ones, and the patches that are hidden."""

from __future__ import annotations

import random

import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2.functional import pil_to_tensor

from vitreg.checkpoints.hub import import_optional
from vitreg.model import ViTConfig
from vitreg.training.engine.method import Augmentation, Batch, Sample
from vitreg.training.recipes.configs import MultiCropConfig


class MultiCrop(Augmentation):
    """`dinov2/data/augmentations.py`: crops, flips, color jitter, grey, blur, and solarisation of the second crop.

    Two things differ from the published code. Its blur applies with one minus the probability that it names (1, 0.1 and
    0.5, those of DINO, which are meant and used here). And it hides patches in exactly half of a batch's crops, with
    ratios spread evenly over the batch; here every crop draws whether and how much by itself, so that an image's views
    do not depend on the others in its batch, nor on how a batch is spread over processes.

    Rows have `global` [2, 3, H, W], `local` [V, 3, h, w] and `mask` [2, N], true at hidden patches of the global crops.
    A batch of B has `hidden` [M] besides, the numbers of the hidden among its B * 2 * N patches, and `hidden_weight`
    [M], of each in iBOT's loss (as DINOv3's `dinov3/data/collate.py`).

    Args:
        model: whose image size, patch size, mean and standard deviation count.
        config: the crops.

    Raises:
        ValueError: the local size is not a multiple of the patch size, or lightly is missing.
    """

    def __init__(self, model: ViTConfig, config: MultiCropConfig) -> None:
        import_optional("lightly", "self-distillation", "train")
        from lightly.transforms.gaussian_blur import GaussianBlur
        from lightly.transforms.solarize import RandomSolarization

        if config.local_size % model.patch_size:
            raise ValueError(
                f"local_size {config.local_size} is not a multiple of the patch size {model.patch_size}; "
                f"take {config.local_size // model.patch_size * model.patch_size or model.patch_size}"
            )
        self.model, self.config = model, config
        jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        color = [transforms.RandomApply([jitter], p=0.8), transforms.RandomGrayscale(p=0.2)]
        first = [*color, GaussianBlur(prob=1.0, sigmas=(0.1, 2.0))]
        second = [*color, GaussianBlur(prob=0.1, sigmas=(0.1, 2.0)), RandomSolarization(prob=0.2)]
        self._global = [transforms.Compose(first), transforms.Compose(second)]
        self._local = transforms.Compose([*color, GaussianBlur(prob=0.5, sigmas=(0.1, 2.0))])

    def __call__(self, sample: Sample) -> Batch:
        """The crops of one image, normalized, and the masks of the global ones."""
        config, size = self.config, self.model.image_size
        large = [change(_crop(sample.image, size, config.global_scale)) for change in self._global]
        side = (config.local_size, config.local_size)
        small = [self._local(_crop(sample.image, side, config.local_scale)) for _ in range(config.num_local)]
        mask = torch.stack([self._mask() for _ in large])
        return {"global": self._normalize(large), "local": self._normalize(small), "mask": mask}

    def collate(self, batch: Batch) -> Batch:
        """With the places of what is hidden, which a GPU would have to be asked for."""
        return batch | locate_hidden(batch["mask"])

    def _mask(self) -> Bool[Tensor, " N"]:
        from lightly.models.utils import random_block_mask_image

        rows, columns = self.model.grid
        if random.random() >= self.config.mask_probability:
            return torch.zeros(rows * columns, dtype=torch.bool)
        hidden = int(rows * columns * random.uniform(*self.config.mask_ratio))
        # The smallest block is of four patches, unless fewer are to be hidden.
        return random_block_mask_image((rows, columns), hidden, min_num_masks_per_block=min(4, hidden)).flatten()

    def _normalize(self, crops: list[Image.Image]) -> Tensor:
        return self.model.preprocess.normalize(torch.stack([pil_to_tensor(crop) for crop in crops]))


def locate_hidden(mask: Bool[Tensor, "B 2 N"]) -> Batch:
    """`hidden` and `hidden_weight` of a batch."""
    flat = mask.flatten(0, 1)
    weight = 1 / (flat.sum(1, keepdim=True).clamp(min=1) * len(flat))
    return {"hidden": flat.flatten().nonzero().flatten(), "hidden_weight": weight.expand_as(flat)[flat]}


def _crop(image: Image.Image, size: tuple[int, int], scale: tuple[float, float]) -> Image.Image:
    """A random part of the image, resized in one go, and mirrored half of the time."""
    box = transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])  # pyright: ignore
    top, left, height, width = box
    edges = (left, top, left + width, top + height)
    crop = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=edges)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop
