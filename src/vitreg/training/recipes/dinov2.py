"""The self-supervised recipe: DINOv2 (arXiv 2304.07193), that is DINO, iBOT and KoLeo together."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Unpack

import torch
from torch import Tensor, nn

from vitreg.checkpoints.hub import import_optional
from vitreg.model import Masked, Tokens, VisionTransformer, ViTConfig
from vitreg.training.engine.config import OptimizerConfig, TrainingConfig
from vitreg.training.engine.distributed import ema_update
from vitreg.training.engine.method import Batch, Method
from vitreg.training.recipes.configs import DINOv2Config, MultiCropConfig
from vitreg.training.recipes.dino_head import DINOHead
from vitreg.training.recipes.dino_losses import (
    MeanCentering,
    SinkhornKnopp,
    dino_loss,
    entropies,
    gather_features,
    ibot_loss,
)
from vitreg.training.recipes.sizes import Chosen, Scale, smoke_form


def dinov2(
    *, num_images: int, num_classes: int = 0, num_registers: int = 4, smoke: bool = False, **chosen: Unpack[Chosen]
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
    scale = Scale(num_images, "large", image_size=224, patch_size=14, batch_size=1024, num_steps=625_000)
    if smoke:
        scale = Scale(num_images, "micro", image_size=64, patch_size=8, batch_size=32, epochs=120 * 32 / num_images)
    scale = scale.choose(chosen)
    large = scale.size in ("large", "huge", "giant")
    crops = MultiCropConfig(local_size=round(scale.image_size * 98 / 224 / scale.patch_size) * scale.patch_size)
    config = TrainingConfig(
        recipe="dinov2",
        model=scale.model(num_registers, layer_scale=True),
        method=DINOv2Config(crops=crops, num_prototypes=131072 if large else 65536),
        optimizer=OptimizerConfig(
            name="adamw",
            lr=2e-4 * math.sqrt(scale.batch_size / 1024),
            warmup_steps=scale.num_steps * 80 // 500,
            weight_decay=0.04,
            final_weight_decay=0.2,
            clip_norm=3.0,
        ),
        layer_scale=1e-5,
        drop_path=0.4 if large else 0.1,
        **scale.schedule(),
    )
    if not smoke:
        return config
    small = DINOv2Config(
        crops=dataclasses.replace(crops, num_local=4, global_scale=(0.5, 1.0), local_scale=(0.15, 0.5)),
        teacher_temperature=(0.03, 0.03),
        teacher_momentum=0.98,
        num_prototypes=256,
        hidden_dim=256,
        bottleneck_dim=64,
    )
    return smoke_form(config, small, lr=5e-4)


class DINOv2(Method):
    """A student that is taught by the moving average of itself (`dinov2/train/ssl_meta_arch.py`).

    The teacher sees two large crops of an image. The student sees these, with patches hidden in half of them, and
    small local ones. DINO's loss compares class tokens of different views, iBOT's the hidden patches with what the
    teacher made of them, and KoLeo spreads the student's class tokens. Registers take no part in a loss and are never
    hidden: they learn by what they do for the other tokens.

    Batches over several micro-batches (accumulation) are centered, and spread by KoLeo, each by itself.

    Attributes:
        vit: the student.
        mask_token: what stands in place of hidden patches.
        heads: the student's, for class tokens and for patches, which share one unless the config separates them.
        teacher_vit: the teacher, the product; learns no gradient.
        teacher_heads: the teacher's.

    Raises:
        ValueError: the model has no class token, or has a head, which nothing would train; or lightly is missing.
    """

    def __init__(self, model: ViTConfig, config: DINOv2Config) -> None:
        super().__init__()
        if model.num_classes or not model.class_token:
            raise ValueError(
                f"self-distillation trains a model with a class token and without a head; this one has "
                f"class_token={model.class_token} and num_classes={model.num_classes}"
            )
        import_optional("lightly", "self-distillation", "train")
        from lightly.loss.koleo_loss import KoLeoLoss

        self.config = config
        self.vit = VisionTransformer(model)
        self.mask_token = nn.Parameter(torch.zeros(model.embed_dim))
        shape = model.embed_dim, config.hidden_dim, config.bottleneck_dim, config.num_prototypes
        self.heads = nn.ModuleList(DINOHead(*shape) for _ in range(1 + config.separate_heads))
        self.teacher_vit = copy.deepcopy(self.vit).requires_grad_(False).eval()
        self.teacher_heads = copy.deepcopy(self.heads).requires_grad_(False)
        sinkhorn = config.centering == "sinkhorn"
        self.center_views = SinkhornKnopp() if sinkhorn else MeanCentering(config.num_prototypes)
        self.center_patches = SinkhornKnopp() if sinkhorn else MeanCentering(config.num_prototypes)
        self.koleo = KoLeoLoss()

    def train(self, mode: bool = True) -> DINOv2:
        """The teacher stays in evaluation mode: its targets have no stochastic depth."""
        super().train(mode)
        self.teacher_vit.eval()
        return self

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The loss, its three terms, the teacher's temperature and, against collapse, `entropies` of its targets."""
        config, temperature = self.config, self.teacher_temperature(progress)
        views, mask, hidden = batch["global"].flatten(0, 1), batch["mask"].flatten(0, 1), batch["hidden"]
        targets, patch_targets = self._targets(views, hidden, temperature)
        # All crops of an image lie next to each other, as stochastic depth, drawn for the global batch, expects.
        large = self.vit(views, masked=Masked(mask, self.mask_token))
        small = self.vit(batch["local"].flatten(0, 1))
        large_cls, small_cls = (_cls(tokens).unflatten(0, (len(batch["global"]), -1)) for tokens in (large, small))
        frozen = progress < config.frozen_prototypes
        view_outputs = self.heads[0](torch.cat([large_cls, small_cls], dim=1), frozen=frozen)
        patch_outputs = self.heads[-1](_some(large, hidden), frozen=frozen)
        with torch.autocast(views.device.type, enabled=False):  # in float32, whatever the networks are
            dino = dino_loss(view_outputs, targets, config.student_temperature)
            ibot = ibot_loss(patch_outputs, patch_targets, batch["hidden_weight"], config.student_temperature)
            # View by view: crops of one image are meant to be close.
            koleo = torch.stack([self.koleo(gather_features(view.float())) for view in large_cls.unbind(1)]).sum()
            teacher_entropy, marginal_entropy = entropies(targets.flatten(0, 1))
        return {
            "loss": dino + config.ibot_weight * ibot + config.koleo_weight * koleo,
            "dino": dino.detach(),
            "ibot": ibot.detach(),
            "koleo": koleo.detach(),
            "teacher_temperature": dino.new_full((), temperature),
            "teacher_entropy": teacher_entropy,
            "marginal_entropy": marginal_entropy,
        }

    @torch.no_grad()
    def _targets(self, views: Tensor, hidden: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Of the class tokens [B, 2, K] and of the patches that are hidden from the student [M, K]."""
        seen = self.teacher_vit(views)
        cosines, patch_cosines = self.teacher_heads[0](_cls(seen)), self.teacher_heads[-1](_some(seen, hidden))
        with torch.autocast(views.device.type, enabled=False):
            targets = self.center_views(cosines, temperature).unflatten(0, (-1, 2))
            return targets, self.center_patches(patch_cosines, temperature)

    def teacher_temperature(self, progress: float) -> float:
        first, last = self.config.teacher_temperature
        warmup = self.config.temperature_warmup
        return last if progress >= warmup else first + (last - first) * progress / warmup

    def teacher_momentum(self, progress: float) -> float:
        return 1 - (1 - self.config.teacher_momentum) * (1 + math.cos(math.pi * progress)) / 2

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        teacher = [*self.teacher_vit.parameters(), *self.teacher_heads.parameters()]
        student = [*self.vit.parameters(), *self.heads.parameters()]
        ema_update(teacher, student, self.teacher_momentum(progress))

    @property
    def export_model(self) -> VisionTransformer:
        return self.teacher_vit


def _cls(tokens: Tokens) -> Tensor:
    assert tokens.cls is not None  # refused at construction
    return tokens.cls


def _some(tokens: Tokens, patches: Tensor) -> Tensor:
    return tokens.patches.flatten(0, 1).index_select(0, patches)
