"""Distillation token by token: a small Vision Transformer learns what a large one's residual stream holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from vitreg.checkpoints import load
from vitreg.images import ImageSet, ImageStream
from vitreg.model import Preprocess, Trace, VisionTransformer, ViTConfig
from vitreg.training.engine.config import OptimizerConfig, TrainingConfig
from vitreg.training.engine.method import Augmentation, Batch, ExtraModules, Method, Sample
from vitreg.training.engine.randomness import fixed_randomness
from vitreg.training.recipes.configs import DistillConfig
from vitreg.training.recipes.sizes import Chosen, Scale, smoke_form
from vitreg.training.recipes.teacher import Teacher, attention_row, output_of, without_registers


def distill(
    *,
    teacher: str,
    start: str = "",
    num_images: int,
    num_classes: int = 0,
    num_registers: int = 4,
    smoke: bool = False,
    **chosen: Unpack[Chosen],
) -> TrainingConfig:
    """Any model that `vitreg.load` takes into one of ours: every token, before the final norm, at several depths.

    Artifacts come along: a student without registers learns its teacher's, position by position, in a residual stream
    of its own; one with registers learns from a teacher that was fixed (`vitreg fix`), and its registers what the
    teacher's hold. So a pair is inherited, not emerged. The class token's attention is matched too, and the output of
    the teacher's head where it has one. Needs no labels.

    With `start` the student begins with weights that are there; `benchmarks/cut_student.py` cuts such from a teacher.

    - Command: `vitreg train distill --teacher fixed.safetensors --data photographs/ --cache tokens/ --out RUN`
    - Smoke: `vitreg train distill --teacher dinov2_vits14 --smoke --data photographs/ --out RUN`
    """
    method = DistillConfig(teacher=teacher, start=start)
    source = load(teacher).config
    patch_size, image_size = source.patch_size, source.image_size[0]
    scale = Scale(num_images, "mini", image_size=image_size, patch_size=patch_size, batch_size=64, epochs=100)
    if smoke:
        scale = dataclasses.replace(scale, size="micro", batch_size=16, epochs=None, num_steps=60)
    scale = scale.choose(chosen)
    if start:
        shape = [name for name in ("size", "image_size", "patch_size") if chosen.get(name) is not None]
        if shape:
            raise ValueError(f"the student has the shape of {start}; leave out its {' and '.join(shape)}")
        model = dataclasses.replace(load(start).config, num_registers=num_registers, name="", changes=())
    else:
        model = scale.model(
            num_registers,
            num_classes=source.num_classes,
            head_bias=source.head_bias,
            class_token=source.class_token,
            pool="token" if source.class_token else "mean",
        )
        preprocess = dataclasses.replace(source.preprocess, size=model.preprocess.size, multiple_of=scale.patch_size)
        model = dataclasses.replace(model, preprocess=preprocess)
    config = TrainingConfig(
        recipe="distill",
        model=model,
        method=method,
        optimizer=OptimizerConfig(
            name="adamw",
            lr=1e-3,
            warmup_steps=min(500, scale.num_steps // 10),
            weight_decay=0.05,
            clip_norm=1.0,
            beta2=0.98,
        ),
        **scale.schedule(),
    )
    return smoke_form(config, method) if smoke else config


class DistillAugmentation(Augmentation):
    """`image` [3, H, W], a random crop that may be flipped, and `view`, its number where they are fixed, else -1."""

    def __init__(self, config: DistillConfig, preprocess: Preprocess) -> None:
        bicubic = v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(preprocess.size, scale=(config.min_crop, 1.0), interpolation=bicubic)
        self._augment = v2.Compose([crop, v2.RandomHorizontalFlip()])
        self._preprocess, self._num_views = preprocess, config.num_views

    def __call__(self, sample: Sample) -> Batch:
        view = -1
        if self._num_views:
            view = sample.index * self._num_views + int(torch.randint(self._num_views, ()))
            with fixed_randomness(view):
                image = self._augment(sample.image)
        else:
            image = self._augment(sample.image)
        return {"image": self._preprocess.normalize(pil_to_tensor(image)), "view": torch.tensor(view)}


class Distill(Method):
    """A student of a frozen teacher.

    The student's blocks at equal steps of its depth are matched with the teacher's at the same part of its depth. A
    token is matched in direction (one minus cosine) and in the logarithm of its norm, so that an artifact counts as
    much as any token and its norm is met; the mean of the registers is matched with that of the teacher's, if it has
    any. The attention of the class token, mean of the heads, is matched by the Kullback-Leibler divergence, where
    registers count together. Where the widths differ, the teacher's tokens are projected (`Teacher`).

    Attributes:
        vit: the student.
        projection: rows of the teacher's space, orthonormal; zero until the first step.

    Raises:
        ValueError: the teacher sees another grid of patches, or has a class token where the student has none; a
            projection is of other widths.
    """

    projection: Tensor

    def __init__(self, model: ViTConfig, config: DistillConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = VisionTransformer(model)
        for module in self.vit.modules():  # without LayerScale, 0.02 is too small for narrow models
            if isinstance(module, torch.nn.Linear) and module is not self.vit.head:
                torch.nn.init.xavier_uniform_(module.weight)
        self.blocks = tuple(round(model.depth * (i + 1) / config.levels) - 1 for i in range(config.levels))
        teacher = load(config.teacher)
        if teacher.config.class_token != model.class_token or teacher.config.num_classes != model.num_classes:
            raise ValueError(
                f"{config.teacher} has class_token={teacher.config.class_token} and "
                f"num_classes={teacher.config.num_classes}; the student needs the same"
            )
        if teacher.config.patch_size != model.patch_size:
            raise ValueError(
                f"{config.teacher} has patches of {teacher.config.patch_size} pixels, the student of "
                f"{model.patch_size}; tokens are matched one by one, so give the student the same"
            )
        equal = tuple(round(teacher.config.depth * (block + 1) / model.depth) - 1 for block in self.blocks)
        at = config.teacher_blocks or equal
        self.teacher = Teacher(teacher, at, model, config)
        self._fitted = False
        self.register_buffer("projection", torch.zeros(model.embed_dim, teacher.config.embed_dim))
        if config.start:
            self._begin(config.start)

    def _begin(self, start: str) -> None:
        """With the weights of a file, and its projection; registers that it does not have stay as they are."""
        vit = load(start)
        if vit.num_registers != self.vit.num_registers:
            vit.registers = self.vit.registers
        self.vit.load_state_dict(vit.state_dict())
        path = Path(start).with_name("projection.safetensors")
        if Path(start).is_file() and path.is_file():
            found = load_file(path)["projection"]
            if found.shape != self.projection.shape:
                raise ValueError(
                    f"{path} projects {list(found.shape)[::-1]} channels, student and teacher have "
                    f"{list(self.projection.shape)[::-1]}; give the one that was made with them"
                )
            self.projection.copy_(found)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`loss` and its terms: `direction` and `norm` of tokens, `register`, `attention`, `output`."""
        images, config = batch["image"], self.config
        if not self._fitted and not self.projection.any():  # it may come from a checkpoint
            self.projection.copy_(self.teacher.fit_projection(images))
        self._fitted = True
        target = self.teacher(images, batch["view"], self.projection)
        trace = self.vit.trace(
            images, blocks=self.blocks, hidden=True, attention_from="cls" if self.vit.config.class_token else None
        )
        output = output_of(self.vit, trace.tokens)
        assert trace.hidden is not None
        with torch.autocast(images.device.type, enabled=False):
            direction, norm = _distances(without_registers(trace.hidden).float(), target.tokens.transpose(0, 1))
            register = attention = direction.new_zeros(())
            if target.register.shape[2] and self.vit.num_registers:
                mean = trace.hidden.registers.float().mean(-2)
                register = sum(_distances(mean, target.register[:, :, 0].transpose(0, 1)), register)
            if trace.hidden.cls is not None:
                attention = _divergence(trace, target.attention.transpose(0, 1))
            off = 1 - F.cosine_similarity(output.float(), target.output, dim=-1).mean()
        loss = direction + config.norm_weight * norm + config.register_weight * register
        loss = loss + config.attention_weight * attention + config.output_weight * off
        terms = {"direction": direction, "norm": norm, "register": register, "attention": attention, "output": off}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    @torch.inference_mode()
    def evaluate(
        self, vit: VisionTransformer, extra_modules: ExtraModules, images: ImageSet, batch_size: int
    ) -> dict[str, float]:
        """`output_cosine` between student's and teacher's outputs, and `token_cosine` of their last patch tokens."""
        output = token = 0.0
        total = 0
        device = vit.patch_embed.weight.device
        for batch in ImageStream(images, vit.preprocess, batch_size=batch_size, device=device):
            target = self.teacher(batch.images, None, self.projection.to(device))
            trace = vit.trace(batch.images, blocks=[-1], patches=True)
            assert trace.patches is not None
            output += float(F.cosine_similarity(output_of(vit, trace.tokens), target.output, dim=-1).sum())
            patches = target.tokens[:, -1, int(vit.config.class_token) :]
            token += float(F.cosine_similarity(trace.patches[-1], patches, dim=-1).mean(-1).sum())
            total += len(batch.images)
        return {"output_cosine": output / total, "token_cosine": token / total} if total else {}


def _distances(found: Float[Tensor, "*T D"], wanted: Float[Tensor, "*T D"]) -> tuple[Tensor, Tensor]:
    """One minus cosine, and the squared difference of the logarithms of norms; means over all tokens."""
    direction = 1 - F.cosine_similarity(found, wanted, dim=-1).mean()
    found_norm, wanted_norm = (tokens.norm(dim=-1).clamp_min(1e-3).log() for tokens in (found, wanted))
    return direction, F.mse_loss(found_norm, wanted_norm)


def _divergence(trace: Trace, wanted: Float[Tensor, "L B T"]) -> Tensor:
    """Of the teacher's rows `[class token, (registers,) patches]` from the student's."""
    found = attention_row(trace)
    if found.shape[-1] > wanted.shape[-1]:  # registers that the teacher has not: what goes to the others counts
        found = torch.cat((found[..., :1], found[..., 2:]), dim=-1)
        found = found / found.sum(-1, keepdim=True)
    divergence = wanted * ((wanted + 1e-6).log() - (found.float() + 1e-6).log())
    return divergence.sum(-1).mean()
