"""Supervised training as in DeiT-III: 3-Augment, mixup or CutMix, one binary cross-entropy per class."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from vitreg.images import ImageSet, ImageStream
from vitreg.model import Preprocess, VisionTransformer, ViTConfig
from vitreg.training.engine.config import OptimizerConfig, TrainingConfig
from vitreg.training.engine.method import Augmentation, Batch, ExtraModules, Method, Sample
from vitreg.training.recipes.configs import DeiT3Config
from vitreg.training.recipes.sizes import Chosen, Scale, smoke_form


def deit3(
    *, num_images: int, num_classes: int, num_registers: int = 4, smoke: bool = False, **chosen: Unpack[Chosen]
) -> TrainingConfig:
    """Supervised, as DeiT-III (arXiv 2204.07118, table 1, ImageNet-1k column; github.com/facebookresearch/deit).

    3-Augment, mixup or CutMix, binary cross-entropy, LAMB 3e-3 at batch size 2048, LayerScale, stochastic depth.
    Repeated augmentation is left out; images are mixed in pairs, each pair in its own way, instead of a whole batch
    in one way.

    - Hardware and time: not measured beyond the smoke form. Computed: 800 epochs of ViT-S/16 on ImageNet-1k are 2.8e19
      FLOPs, 28 hours of an H200 at 40 % of 700 TFLOP/s, or 3.5 of eight.
    - Expected: DeiT-III reports 81.4 % (S) and 83.8 % (B) top-1 on ImageNet-1k after 800 epochs; with 4 registers a
      later study has 80.81 against 81.05 without (S, Bach et al.).
    - Command: `torchrun --nproc-per-node 8 -m vitreg train deit3 --data imagenet/ --arch small --out RUN`
    - Smoke: `vitreg train deit3 --smoke --data tiny-imagenet-100/ --out RUN`; gentler augmentation and cross-entropy.
      The loss falls by at least 0.15, from 4.65, in 150 steps; 1 min 47 s on two cores.
    """
    scale = Scale(num_images, "small", image_size=224, patch_size=16, batch_size=2048, epochs=800)
    if smoke:
        scale = Scale(num_images, "micro", image_size=64, patch_size=8, batch_size=128, epochs=150 * 128 / num_images)
    scale = scale.choose(chosen)
    drop_path = {"small": 0.05, "base": 0.2, "large": 0.45, "huge": 0.6, "giant": 0.6}
    config = TrainingConfig(
        recipe="deit3",
        model=scale.model(num_registers, num_classes=num_classes, layer_scale=True),
        method=DeiT3Config(),
        optimizer=OptimizerConfig(
            name="lamb",
            lr=3e-3 * math.sqrt(scale.batch_size / 2048),
            warmup_steps=round(5 * num_images / scale.batch_size),
            weight_decay=0.02,
            clip_norm=1.0,
        ),
        layer_scale=1e-4,
        drop_path=drop_path.get(scale.size, 0.0),
        **scale.schedule(),
    )
    if not smoke:
        return config
    gentle = DeiT3Config(
        loss="ce", smoothing=0.1, mixup=0.0, cutmix=0.0, three_augment=False, color_jitter=0.0, min_crop=0.35
    )
    return smoke_form(config, gentle, lr=1e-2)


class DeiT3Augmentation(Augmentation):
    """3-Augment of each image (timm's "3a" policy), then mixup or CutMix of neighbors (timm's `Mixup`).

    Images 2i and 2i + 1 of the order are mixed, each pair in its own way, so that it does not matter how a batch is
    split over processes.
    """

    def __init__(self, config: DeiT3Config, preprocess: Preprocess, num_classes: int) -> None:
        from timm.data.auto_augment import auto_augment_transform
        from timm.data.mixup import Mixup

        bicubic = v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(preprocess.size, scale=(config.min_crop, 1.0), interpolation=bicubic)
        steps: list = [crop, v2.RandomHorizontalFlip()]
        if config.three_augment:
            steps.append(auto_augment_transform("3a", {}))
        if config.color_jitter:
            steps.append(v2.ColorJitter(config.color_jitter, config.color_jitter, config.color_jitter))
        self._augment, self._preprocess = v2.Compose(steps), preprocess
        self._mixup = Mixup(
            config.mixup,
            config.cutmix,
            prob=1.0 if config.mixup or config.cutmix else 0.0,  # without, it makes targets of labels
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )

    def __call__(self, sample: Sample) -> Batch:
        """`image` [3, H, W] and `label`."""
        pixels = pil_to_tensor(self._augment(sample.image))
        return {"image": self._preprocess.normalize(pixels), "label": torch.tensor(sample.label)}

    def mix(self, pair: Batch) -> Batch:
        """`image` [2, 3, H, W] and `target` [2, classes]."""
        images, target = self._mixup(pair["image"], pair["label"])
        return {"image": images, "target": target}


class DeiT3(Method):
    """A Vision Transformer with a linear classifier on its pooled feature, which registers never reach."""

    def __init__(self, model: ViTConfig, config: DeiT3Config) -> None:
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
        for batch in ImageStream(images, vit.preprocess, batch_size=batch_size, device=device):
            labels = torch.tensor([images.labels[i] for i in batch.numbers], device=device)
            right += int((vit.classify(batch.images).argmax(-1) == labels).sum())
            total += len(labels)
        return {"top1": 100 * right / total} if total else {}
