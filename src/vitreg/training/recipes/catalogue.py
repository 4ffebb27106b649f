"""The trainings of the paper (section 3.1), each with any number of registers, as functions that return a config.

Each says what it needs and what to expect. `smoke=True` gives a form that finishes in two minutes on two CPU cores: to
see that everything works, not to get a good model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from vitreg.common.renamed import current_fields
from vitreg.model import ViTConfig
from vitreg.training.data.multi_crop import MultiCropConfig
from vitreg.training.engine.config import OptimizerConfig, TrainingConfig
from vitreg.training.recipes.clip import CLIPConfig
from vitreg.training.recipes.deit3 import DeiT3Config
from vitreg.training.recipes.dinov2 import DINOv2Config
from vitreg.training.recipes.sizes import Size, sized


def deit3(
    *,
    num_images: int,
    num_classes: int,
    num_registers: int = 4,
    size: Size | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    batch_size: int | None = None,
    epochs: int | float | None = None,
    smoke: bool = False,
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
    _above_zero(image_size=image_size, patch_size=patch_size, batch_size=batch_size, epochs=epochs)
    if smoke:
        size, image_size, patch_size = size or "micro", image_size or 64, patch_size or 8
        batch_size, epochs = batch_size or 128, epochs or 150 * 128 / num_images
    size, image_size, patch_size = size or "small", image_size or 224, patch_size or 16
    batch_size = batch_size or 2048
    steps_per_epoch = num_images / batch_size
    num_steps = math.ceil((epochs or 800) * steps_per_epoch)
    drop_path = {"small": 0.05, "base": 0.2, "large": 0.45, "huge": 0.6, "giant": 0.6}
    model = sized(
        size,
        patch_size=patch_size,
        image_size=image_size,
        num_registers=num_registers,
        num_classes=num_classes,
        layer_scale=True,
    )
    gentle = {"mixup": 0.0, "cutmix": 0.0, "three_augment": False, "color_jitter": 0.0, "min_crop": 0.35}
    return TrainingConfig(
        recipe="deit3",
        model=model,
        method=DeiT3Config(**gentle, loss="ce", smoothing=0.1) if smoke else DeiT3Config(),
        optimizer=OptimizerConfig(
            name="lamb",
            lr=1e-2 if smoke else 3e-3 * math.sqrt(batch_size / 2048),
            warmup_steps=num_steps // 10 if smoke else round(5 * steps_per_epoch),
            weight_decay=0.02,
            clip_norm=1.0,
        ),
        num_steps=num_steps,
        batch_size=batch_size,
        layer_scale=0.1 if smoke else 1e-4,
        drop_path=0.0 if smoke else drop_path.get(size, 0.0),
        checkpoint_every=_checkpoint_every(steps_per_epoch),
        diagnose_every=_diagnose_every(num_steps, smoke),
    )


def dinov2(
    *,
    num_images: int,
    num_registers: int = 4,
    size: Size | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    batch_size: int | None = None,
    epochs: int | float | None = None,
    smoke: bool = False,
    num_classes: int = 0,
) -> TrainingConfig:
    """Self-supervised, as DINOv2 (arXiv 2304.07193; `dinov2/configs/train/vitl14.yaml`): the paper's main training.

    DINO, iBOT with a head of its own, KoLeo 0.1, Sinkhorn-Knopp centering, two crops of 224 and eight of 98 pixels,
    teacher momentum 0.994 to 1, weight decay 0.04 to 0.2, AdamW 2e-4 at batch size 1024 (by the square root for
    others). The teacher is what is saved. Labels are not used.

    - Hardware and time: not measured beyond the smoke form. Computed: the published run of ViT-L/14, 625 000 steps of
      1024 images, is 1.3e21 FLOPs, a week of eight H200 at 40 % of 700 TFLOP/s.
    - Expected: the paper reports 84.3 % linear top-1 on ImageNet without and 84.8 % with 4 registers (ViT-L).
    - Command: `torchrun --nproc-per-node 8 -m vitreg train dinov2 --data imagenet/ --arch large --out RUN`
    - Smoke: `vitreg train dinov2 --smoke --data tiny-imagenet-100/ --out RUN`; larger crops, 256 prototypes. `dino`
      falls below 5.5 (log 256 is 5.55) with a `teacher_entropy` below 0.95, in 120 steps; 1 min 36 s on two cores.
    """
    _above_zero(image_size=image_size, patch_size=patch_size, batch_size=batch_size, epochs=epochs)
    if smoke:
        size, image_size, patch_size = size or "micro", image_size or 64, patch_size or 8
        batch_size, epochs = batch_size or 32, epochs or 120 * 32 / num_images
    size, image_size, patch_size = size or "large", image_size or 224, patch_size or 14
    batch_size = batch_size or 1024
    steps_per_epoch = num_images / batch_size
    num_steps = math.ceil(epochs * steps_per_epoch) if epochs else 625_000
    large = size in ("large", "huge", "giant")
    local_size = round(image_size * 98 / 224 / patch_size) * patch_size
    crops = MultiCropConfig(local_size=local_size)
    if smoke:
        crops = MultiCropConfig(num_local=4, local_size=local_size, global_scale=(0.5, 1.0), local_scale=(0.15, 0.5))
    return TrainingConfig(
        recipe="dinov2",
        model=sized(size, patch_size=patch_size, image_size=image_size, num_registers=num_registers, layer_scale=True),
        method=DINOv2Config(
            crops=crops,
            teacher_temperature=(0.03, 0.03) if smoke else (0.04, 0.07),
            teacher_momentum=0.98 if smoke else 0.994,
            num_prototypes=256 if smoke else 131072 if large else 65536,
            hidden_dim=256 if smoke else 2048,
            bottleneck_dim=64 if smoke else 256,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            lr=5e-4 if smoke else 2e-4 * math.sqrt(batch_size / 1024),
            warmup_steps=num_steps // 10 if smoke else num_steps * 80 // 500,
            weight_decay=0.04,
            final_weight_decay=0.2,
            clip_norm=3.0,
        ),
        num_steps=num_steps,
        batch_size=batch_size,
        layer_scale=0.1 if smoke else 1e-5,
        drop_path=0.0 if smoke else 0.4 if large else 0.1,
        checkpoint_every=_checkpoint_every(steps_per_epoch),
        diagnose_every=_diagnose_every(num_steps, smoke),
    )


def clip(
    *,
    num_images: int,
    num_registers: int = 4,
    size: Size | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    batch_size: int | None = None,
    epochs: int | float | None = None,
    smoke: bool = False,
    num_classes: int = 0,
) -> TrainingConfig:
    """Text-supervised, as OpenCLIP (github.com/mlfoundations/open_clip), the paper's ViT-B/16.

    open_clip's text tower, tokenizer and loss; AdamW 5e-4, weight decay 0.2, 2000 steps of warm-up, 32 epochs. The
    image tower is a plain ViT with a projection, without CLIP's first norm, so that with registers it can be saved for
    timm and transformers; the text tower is saved beside it. Micro-batches would not be compared with each other, so
    there is no accumulation.

    - Hardware and time: not measured beyond the smoke form. Computed: 100 million pairs through ViT-B/16 and its text
      tower are 1.2e19 FLOPs, 12 hours of an H200 at 40 % of 700 TFLOP/s.
    - Expected: the paper reports 59.9 % zero-shot on ImageNet without and 60.1 % with 4 registers, from pairs that are
      not public.
    - Command: `torchrun --nproc-per-node 8 -m vitreg train clip --data "pairs-{00000..00999}.tar" --out RUN`
    - Smoke: `vitreg train clip --smoke --data flickr8k-1k/ --out RUN`. The loss falls from 4.65 to below 3.3 in 300
      steps; about 80 s on two cores.
    """
    _above_zero(image_size=image_size, patch_size=patch_size, batch_size=batch_size, epochs=epochs)
    if smoke:
        size, image_size, batch_size = size or "micro", image_size or 64, batch_size or 64
        epochs = epochs or 300 * batch_size / num_images
    size, image_size, patch_size = size or "base", image_size or 224, patch_size or 16
    batch_size = batch_size or 4096
    steps_per_epoch = num_images / batch_size
    num_steps = math.ceil((epochs or 32) * steps_per_epoch)
    method = CLIPConfig.sized(size, **({"min_scale": 0.5, "flip": 0.5} if smoke else {}))
    return TrainingConfig(
        recipe="clip",
        model=sized(
            size,
            patch_size=patch_size,
            image_size=image_size,
            num_registers=num_registers,
            num_classes=method.text_width,
            head_bias=False,
        ),
        method=method,
        optimizer=OptimizerConfig(
            name="adamw",
            lr=5e-4,
            final_lr=0.0,
            warmup_steps=20 if smoke else min(2000, num_steps // 10),
            weight_decay=0.1 if smoke else 0.2,
            clip_norm=1.0,
            beta2=0.98,
            eps=1e-6,
        ),
        num_steps=num_steps,
        batch_size=batch_size,
        checkpoint_every=_checkpoint_every(steps_per_epoch),
        diagnose_every=_diagnose_every(num_steps, smoke),
    )


RECIPES: dict[str, Callable[..., TrainingConfig]] = {"deit3": deit3, "dinov2": dinov2, "clip": clip}

_METHODS = {"deit3": DeiT3Config, "dinov2": DINOv2Config, "clip": CLIPConfig}


def _above_zero(**given: int | float | None) -> None:
    for name, value in given.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")


def _checkpoint_every(steps_per_epoch: float) -> int:
    """About every epoch, so that little is lost and little time is spent."""
    return max(50, min(round(steps_per_epoch), 2000))


def _diagnose_every(num_steps: int, smoke: bool) -> int:
    """Often enough to see when artifacts appear."""
    return max(1, num_steps // (3 if smoke else 20))


def config_from_dict(values: dict[str, Any]) -> TrainingConfig:
    """The config that `TrainingConfig.to_dict` wrote; keys that are not of it are left aside.

    Raises:
        ValueError: an unknown recipe.
    """
    if "precision" in values:  # as the first runs called it
        values = {**values, "dtype": values["precision"]}
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    fields = {key: value for key, value in values.items() if key in known}
    if fields.get("recipe") not in _METHODS:
        raise ValueError(f"recipe {fields.get('recipe')!r} is unknown; choose one of {', '.join(_METHODS)}")
    fields["model"] = ViTConfig.from_dict(fields["model"])
    fields["optimizer"] = OptimizerConfig(**fields["optimizer"])
    fields["method"] = _METHODS[fields["recipe"]].from_dict(current_fields(fields["method"]))
    return TrainingConfig(**fields)
