"""Everything that decides what a training run does, as data that is stored with the run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vitreg.images import ImageSet
    from vitreg.model import ViTConfig
    from vitreg.training.engine.method import Augmentation, Method


@dataclass(frozen=True)
class MethodConfig:
    """What makes one recipe's training signal; each recipe has its own, beside the method it configures."""

    def check(self, config: TrainingConfig) -> None:
        """Refuse a run that the method cannot be trained in.

        Raises:
            ValueError: says what to change.
        """

    def build(self, model: ViTConfig) -> Method:
        """The method, with a freshly initialized model."""
        raise NotImplementedError

    def flops(self, model: ViTConfig, kept: float) -> float:
        """Floating-point operations of a step, for one image; a backward pass has twice those of its forward pass.

        Args:
            model: the Vision Transformer.
            kept: the share of its residual branches that stochastic depth computes.
        """
        raise NotImplementedError

    def augmentation(self, model: ViTConfig, images: ImageSet) -> Augmentation:
        """What is made of the images.

        Raises:
            ValueError: the images lack what the method learns from, such as labels or captions.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights follow gradients.

    Attributes:
        name: AdamW, or LAMB with DeiT-III's defaults (timm's).
        lr: peak learning rate.
        final_lr: at the end of the cosine.
        warmup_steps: linear from 1e-6 to the peak.
        weight_decay: of matrices; nothing else decays.
        final_weight_decay: what the weight decay follows a cosine to; by default it stays.
        layer_decay: factor of the learning rate from one block to the one before it.
        clip_norm: global norm that gradients are scaled down to; by default they are not.
        beta2: of the second moment; DINOv2 and DeiT-III 0.999, CLIP 0.98.
        eps: added to the root of the second moment.
    """

    name: Literal["adamw", "lamb"] = "adamw"
    lr: float = 1e-3
    final_lr: float = 1e-6
    warmup_steps: int = 0
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    layer_decay: float = 1.0
    clip_norm: float | None = None
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a run goes on, on what, and what it tells and keeps.

    Attributes:
        num_steps: optimizer steps.
        batch_size: images a step, over all processes and micro-batches.
        accumulation: micro-batches that a process splits its part of a batch into.
        layer_scale: what LayerScale starts from, where the model has it.
        drop_path: rate of stochastic depth, the same in every block.
        ema_decay: of the averaged weights that are diagnosed and saved; 0 keeps no average.
        dtype: bfloat16 keeps the weights in float32 and computes in bfloat16.
        sharding: ddp copies the model to every process, fsdp spreads it over them (FSDP2).
        compile: run the blocks through `torch.compile`.
        gradient_checkpointing: recompute blocks in the backward pass, to save memory.
        seed: of the initial weights, the order of the images, their augmentation and everything random.
        log_every: steps between progress reports; every step is in log.jsonl.
        checkpoint_every: steps between checkpoints.
        diagnose_every: steps between diagnoses; 0 diagnoses at the end only.
        num_diagnosed: held-out images that are diagnosed.
    """

    num_steps: int
    batch_size: int
    accumulation: int = 1
    layer_scale: float = 1e-5
    drop_path: float = 0.0
    ema_decay: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    sharding: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    diagnose_every: int = 500
    num_diagnosed: int = 256


@dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    """A training run.

    Attributes:
        recipe: its name.
        model: the Vision Transformer.
        method: the recipe's own settings.
        optimizer: how weights follow gradients.
    """

    recipe: str
    model: ViTConfig
    method: MethodConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "num_diagnosed"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("diagnose_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("ema_decay", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        self.method.check(self)

    @property
    def half(self) -> bool:
        """Whether the networks compute in bfloat16."""
        return self.dtype == "bfloat16"

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `recipes.catalogue.config_from_dict` is the inverse."""
        return dataclasses.asdict(self)
