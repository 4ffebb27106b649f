"""CLIP: an image and its caption are each other's best match in the batch."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Unpack

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from vitreg.checkpoints.text_tower import TextTower, tokenize
from vitreg.images import ImageSet
from vitreg.model import Preprocess, VisionTransformer, ViTConfig
from vitreg.training.engine.config import OptimizerConfig, TrainingConfig
from vitreg.training.engine.method import Augmentation, Batch, ExtraModules, Method, Sample
from vitreg.training.recipes.configs import CLIPConfig
from vitreg.training.recipes.retrieval import retrieval
from vitreg.training.recipes.sizes import Chosen, Scale, smoke_form


def clip(
    *, num_images: int, num_classes: int = 0, num_registers: int = 4, smoke: bool = False, **chosen: Unpack[Chosen]
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
    scale = Scale(num_images, "base", image_size=224, patch_size=16, batch_size=4096, epochs=32)
    if smoke:
        scale = Scale(num_images, "micro", image_size=64, patch_size=16, batch_size=64, num_steps=300)
    scale = scale.choose(chosen)
    model = scale.model(num_registers, head_bias=False)
    method = CLIPConfig(*TEXT_SIZES[scale.size])
    config = TrainingConfig(
        recipe="clip",
        model=dataclasses.replace(model, num_classes=method.text_width),
        method=method,
        optimizer=OptimizerConfig(
            name="adamw",
            lr=5e-4,
            final_lr=0.0,
            warmup_steps=min(2000, scale.num_steps // 10),
            weight_decay=0.2,
            clip_norm=1.0,
            beta2=0.98,
            eps=1e-6,
        ),
        **scale.schedule(),
    )
    if not smoke:
        return config
    for_few_images = dataclasses.replace(method, min_scale=0.5, flip=0.5)
    return smoke_form(config, for_few_images, warmup_steps=20, weight_decay=0.1)


# Width (and width of the common space), layers, heads, context length. From tiny on those of open_clip's ViT-S-16-alt,
# ViT-S-16, ViT-B-16, ViT-L-14, ViT-H-14 and ViT-g-14.
TEXT_SIZES: dict[str, tuple[int, int, int, int]] = {
    "micro": (128, 4, 2, 32),
    "mini": (192, 6, 3, 32),
    "tiny": (256, 10, 4, 77),
    "small": (384, 12, 6, 77),
    "base": (512, 12, 8, 77),
    "large": (768, 12, 12, 77),
    "huge": (1024, 24, 16, 77),
    "giant": (1024, 24, 16, 77),
}


class CLIPAugmentation(Augmentation):
    """`image` [3, H, W], a random crop, and `text` [L], one of the image's captions.

    The crop is open_clip's (`transform.py: image_transform`): random size and aspect, bicubic, no flip unless asked
    for, because captions say left and right.
    """

    def __init__(self, config: CLIPConfig, preprocess: Preprocess) -> None:
        bicubic = v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(preprocess.size, scale=(config.min_scale, 1.0), interpolation=bicubic)
        self._augment = v2.Compose([crop, v2.RandomHorizontalFlip(config.flip)])
        self._preprocess, self._context_length = preprocess, config.context_length

    def __call__(self, sample: Sample) -> Batch:
        text = tokenize([random.choice(sample.captions)], self._context_length)[0]
        return {"image": self._preprocess.normalize(pil_to_tensor(self._augment(sample.image))), "text": text}


class CLIP(Method):
    """An image and a text tower under open_clip's loss (Radford et al., arXiv 2103.00020, figure 3).

    Every image is compared with the captions of all processes; their gradients' mean is that of one process with the
    whole batch. Micro-batches of an accumulated step are not compared with each other.

    Attributes:
        vit: the image tower; its head, which reads the class token, is the projection.
        text: the text tower, and the scale of the logits.

    Raises:
        ValueError: the model has no projection, or open_clip is not installed.
    """

    def __init__(self, model: ViTConfig, config: CLIPConfig) -> None:
        super().__init__()
        if not model.num_classes:
            raise ValueError(
                f"the model has no projection to the text tower's space; give it num_classes={config.text_width}"
            )
        self.vit = VisionTransformer(model)
        self.text = TextTower(
            embed_dim=model.num_classes,
            width=config.text_width,
            layers=config.text_layers,
            heads=config.text_heads,
            context_length=config.context_length,
        )

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`loss`, `logit_scale`, and `accuracy`: images whose caption is the best of the batch, in percent."""
        from open_clip.loss import ClipLoss

        images, texts = self.vit.classify(batch["image"]), self.text(batch["text"])
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # Features are gathered with their gradients, which are then summed over the processes' losses. Each loss being
        # the mean over its own rows, the averages over processes are the one batch's loss and gradient.
        clip = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
        with torch.autocast(images.device.type, enabled=False):
            images, texts = (F.normalize(features.float(), dim=-1) for features in (images, texts))
            scale = self.text.logit_scale.float().exp()
            of_images, of_texts = clip.get_logits(images, texts, scale)
            labels = clip.get_ground_truth(images.device, len(images))
            loss = (F.cross_entropy(of_images, labels) + F.cross_entropy(of_texts, labels)) / 2
        accuracy = 100 * (of_images.argmax(1) == labels).float().mean()
        return {"loss": loss, "logit_scale": scale.detach().squeeze(), "accuracy": accuracy}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Logits are at most 100 cosines, as in open_clip (`train.py`)."""
        self.text.logit_scale.clamp_(0, math.log(100))

    def extra_modules(self) -> dict[str, nn.Module]:
        return {"text": self.text}

    def evaluate(
        self, vit: VisionTransformer, extra_modules: ExtraModules, images: ImageSet, batch_size: int
    ) -> dict[str, float]:
        """Retrieval: `image_to_text_r1`, `_r5`, `text_to_image_r1`, `_r5` in percent."""
        tower = TextTower.from_state(self.text.options, extra_modules["text"]).to(next(vit.parameters()).device)
        return retrieval(vit, tower, images, batch_size)
