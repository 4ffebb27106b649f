"""The trainings of the paper (section 3.1), each with any number of registers, as functions that return a config.

Each says what it needs and what to expect. `smoke=True` gives a form that finishes in two minutes on two CPU cores: to
see that everything works, not to get a good model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from vitreg.model import ViTConfig
from vitreg.training.config import OptimizerConfig, TrainingConfig
from vitreg.training.sizes import Size, sized
from vitreg.training.supervised import SupervisedConfig


def deit3(
    *,
    num_images: int,
    num_classes: int,
    num_registers: int = 4,
    size: Size | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    batch_size: int | None = None,
    epochs: float | None = None,
    smoke: bool = False,
) -> TrainingConfig:
    """Supervised, as DeiT-III (arXiv 2204.07118, table 1, ImageNet-1k column; github.com/facebookresearch/deit).

    3-Augment, mixup or CutMix, binary cross-entropy, LAMB 3e-3 at batch size 2048, LayerScale, stochastic depth.
    Repeated augmentation is left out; pictures are mixed in pairs, each pair in its own way, instead of a whole batch
    in one way.

    - Hardware and time: not measured beyond the smoke form.
    - Expected: DeiT-III reports 81.4 % (S) and 83.8 % (B) top-1 on ImageNet-1k after 800 epochs; with 4 registers a
      later study has 80.81 against 81.05 without (S, Bach et al.).
    - Command: `torchrun --nproc-per-node 8 -m vitreg train deit3 --data imagenet/ --size small --registers 4 --out RUN`
    - Smoke: `vitreg train deit3 --smoke --data tiny-imagenet-100/ --out RUN`
    """
    if smoke:
        size, image_size, patch_size = size or "micro", image_size or 64, patch_size or 8
        batch_size, epochs = batch_size or 128, epochs or 360 * 128 / num_images
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
    gentle = {"mixup": 0.0, "cutmix": 0.0, "three_augment": False, "colour_jitter": 0.0, "min_crop": 0.35}
    return TrainingConfig(
        recipe="deit3",
        model=model,
        method=SupervisedConfig(**gentle, loss="ce", smoothing=0.1) if smoke else SupervisedConfig(),
        optimizer=OptimizerConfig(
            name="lamb",
            lr=1e-2 if smoke else 3e-3 * math.sqrt(batch_size / 2048),
            warmup_steps=num_steps // 10 if smoke else round(5 * steps_per_epoch),
            weight_decay=0.02,
            clip_norm=1.0,
        ),
        num_steps=num_steps,
        batch_size=batch_size,
        drop_path=0.0 if smoke else drop_path.get(size, 0.0),
        checkpoint_every=_checkpoint_every(steps_per_epoch),
        diagnose_every=_diagnose_every(num_steps),
    )


RECIPES: dict[str, Callable[..., TrainingConfig]] = {"deit3": deit3}

_METHODS = {"deit3": SupervisedConfig}


def _checkpoint_every(steps_per_epoch: float) -> int:
    """About every epoch, so that little is lost and little time is spent."""
    return max(50, min(round(steps_per_epoch), 2000))


def _diagnose_every(num_steps: int) -> int:
    """About twenty times a run: enough to see when artifacts appear."""
    return max(1, num_steps // 20)


def config_from_dict(values: dict[str, Any]) -> TrainingConfig:
    """The config that `TrainingConfig.to_dict` wrote; keys that are not of it are left aside.

    Raises:
        ValueError: an unknown recipe.
    """
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    fields = {key: value for key, value in values.items() if key in known}
    if fields.get("recipe") not in _METHODS:
        raise ValueError(f"recipe {fields.get('recipe')!r} is unknown; choose one of {', '.join(_METHODS)}")
    fields["model"] = ViTConfig.from_dict(fields["model"])
    fields["optimizer"] = OptimizerConfig(**fields["optimizer"])
    fields["method"] = _METHODS[fields["recipe"]](**fields["method"])
    return TrainingConfig(**fields)
