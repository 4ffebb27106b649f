"""Supervised training as in DeiT-III: 3-Augment, mixup or CutMix, one binary cross-entropy per class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms import v2

from vitreg.images import ImageSet
from vitreg.model import Preprocess, VisionTransformer, ViTConfig
from vitreg.training.data.held_out import stream_images
from vitreg.training.engine.config import MethodConfig
from vitreg.training.engine.method import Augmentation, Batch, ExtraModules, Method, Sample
from vitreg.training.engine.throughput import forward_flops


@dataclass(frozen=True)
class DeiT3Config(MethodConfig):
    """DeiT-III's training signal ("DeiT III: Revenge of the ViT", arXiv 2204.07118, and its repository).

    Attributes:
        loss: bce (one binary cross-entropy per class; every class that is in the mixture counts fully) or ce.
        smoothing: of the labels, with ce.
        mixup, cutmix: alpha of the Beta distributions; 0 turns one off.
        three_augment: grey, solarise or blur each image.
        color_jitter: brightness, contrast and saturation.
        min_crop: smallest part of an image's area that is seen.
    """

    loss: str = "bce"
    smoothing: float = 0.0
    mixup: float = 0.8
    cutmix: float = 1.0
    three_augment: bool = True
    color_jitter: float = 0.3
    min_crop: float = 0.08

    def __post_init__(self) -> None:
        if self.loss not in ("bce", "ce"):
            raise ValueError(f"loss {self.loss!r} is unknown; choose bce or ce")
        if self.loss == "bce" and self.smoothing:
            raise ValueError("smoothing would make every class a target of bce; leave it at 0, or choose loss ce")

    def build(self, model: ViTConfig) -> DeiT3:
        """A classifier."""
        return DeiT3(self, model)

    def flops(self, model: ViTConfig, kept: float) -> float:
        """Those of the model; its head is too small to count."""
        return 3 * forward_flops(model, model.grid, kept)

    def augmentation(self, model: ViTConfig, images: ImageSet) -> DeiT3Augmentation:
        """Augmented images with soft targets.

        Raises:
            ValueError: there are no labels, or another number of classes than the model has.
        """
        if images.labels is None:
            raise ValueError(f"{images.source} has no labels, from which deit3 learns; give one folder for each class")
        if len(images.classes) != model.num_classes:
            raise ValueError(
                f"{images.source} has {len(images.classes)} classes, the model {model.num_classes}; "
                f"train on the set that the run began with"
            )
        return DeiT3Augmentation(self, model.preprocess, model.num_classes)


class DeiT3Augmentation(Augmentation):
    """3-Augment of each image (timm's "3a" policy), then mixup or CutMix of neighbors (timm's `Mixup`).

    Images 2i and 2i + 1 of the order are mixed, each pair in its own way, so that it does not matter how a batch is
    split over processes.
    """

    def __init__(self, config: DeiT3Config, preprocess: Preprocess, num_classes: int) -> None:
        from timm.data.auto_augment import auto_augment_transform
        from timm.data.mixup import Mixup

        steps: list = [
            v2.RandomResizedCrop(
                preprocess.size, scale=(config.min_crop, 1.0), interpolation=v2.InterpolationMode.BICUBIC
            ),
            v2.RandomHorizontalFlip(),
        ]
        if config.three_augment:
            steps.append(auto_augment_transform("3a", {}))
        if config.color_jitter:
            steps.append(v2.ColorJitter(config.color_jitter, config.color_jitter, config.color_jitter))
        self._augment = v2.Compose(steps)
        self._preprocess, self._num_classes = preprocess, num_classes
        self._mixup = None
        if config.mixup or config.cutmix:
            self._mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.smoothing,
                num_classes=num_classes,
            )
        self._smoothing = config.smoothing

    def __call__(self, sample: Sample) -> Batch:
        """`image` [3, H, W] and `label`."""
        pixels = torch.from_numpy(np.asarray(self._augment(sample.image)).transpose(2, 0, 1).copy())
        return {"image": self._preprocess.normalize(pixels), "label": torch.tensor(sample.label)}

    def mix(self, pair: Batch) -> Batch:
        """`image` [2, 3, H, W] and `target` [2, classes]."""
        from timm.data.mixup import mixup_target

        images, labels = pair["image"], pair["label"]
        if self._mixup is None:
            return {"image": images, "target": mixup_target(labels, self._num_classes, smoothing=self._smoothing)}
        images, target = self._mixup(images, labels)
        return {"image": images, "target": target}


class DeiT3(Method):
    """A Vision Transformer with a linear classifier on its pooled feature, which registers never reach."""

    def __init__(self, config: DeiT3Config, model: ViTConfig) -> None:
        super().__init__()
        from timm.loss.binary_cross_entropy import BinaryCrossEntropy
        from timm.loss.cross_entropy import SoftTargetCrossEntropy

        self.vit = VisionTransformer(model)
        bce = config.loss == "bce"
        self.loss = BinaryCrossEntropy(target_threshold=0.0) if bce else SoftTargetCrossEntropy()

    def forward(self, batch: Batch, progress: float) -> dict[str, Float[Tensor, ""]]:
        """The loss, in float32, against soft targets."""
        return {"loss": self.loss(self.vit.classify(batch["image"]).float(), batch["target"])}

    @torch.inference_mode()
    def evaluate(
        self, vit: VisionTransformer, extra_modules: ExtraModules, images: ImageSet, batch_size: int
    ) -> dict[str, float]:
        """`top1`: per cent of the images whose class has the largest logit."""
        if images.labels is None:
            return {}
        right = total = 0
        device = vit.patch_embed.weight.device
        for batch, indices in stream_images(images, vit.preprocess, batch_size=batch_size, device=device):
            labels = torch.tensor([images.labels[i] for i in indices], device=device)
            right += int((vit.classify(batch).argmax(-1) == labels).sum())
            total += len(indices)
        return {"top1": 100 * right / total} if total else {}
