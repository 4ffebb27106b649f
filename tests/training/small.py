"""The smallest training that has all the parts of a real one."""

from __future__ import annotations

import dataclasses
from typing import Any

from vitreg.training import TrainingConfig, deit3

OPTIMIZER = ("name", "lr", "warmup_steps", "weight_decay", "layer_decay", "clip_norm")


def small_config(steps: int = 6, **changes: Any) -> TrainingConfig:
    """DeiT-III on four classes: two blocks of 32 channels, 4 registers, images of 32 pixels, batches of 8."""
    config = deit3(num_images=60, num_classes=4, size="micro", image_size=32, patch_size=16, batch_size=8)
    model = dataclasses.replace(config.model, depth=2, embed_dim=32, mlp_dim=64, name="small")
    given = {name: changes.pop(name) for name in OPTIMIZER if name in changes}
    optimizer = dataclasses.replace(config.optimizer, **{"lr": 3e-3, "warmup_steps": 2, **given})
    fields = {"drop_path": 0.2, "log_every": 1, "checkpoint_every": steps, "diagnose_every": 0, **changes}
    return dataclasses.replace(config, **{"model": model, "optimizer": optimizer, "num_steps": steps, **fields})
