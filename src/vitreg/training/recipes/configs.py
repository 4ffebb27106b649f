"""What the recipes' methods can be set to. The command line is built from it, so nothing here imports PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vitreg.training.engine.config import MethodConfig, TrainingConfig
from vitreg.training.engine.throughput import block_flops, forward_flops

if TYPE_CHECKING:
    from vitreg.images import ImageSet
    from vitreg.model import ViTConfig
    from vitreg.training.recipes.clip import CLIP, CLIPAugmentation
    from vitreg.training.recipes.deit3 import DeiT3, DeiT3Augmentation
    from vitreg.training.recipes.dinov2 import DINOv2
    from vitreg.training.recipes.distill import Distill, DistillAugmentation
    from vitreg.training.recipes.multi_crop import MultiCrop


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
        from vitreg.training.recipes.deit3 import DeiT3

        return DeiT3(model, self)

    def flops(self, model: ViTConfig, kept: float) -> float:
        # The head is too small to count.
        return 3 * forward_flops(model, model.grid, kept)

    def augmentation(self, model: ViTConfig, images: ImageSet) -> DeiT3Augmentation:
        if images.labels is None:
            raise ValueError(f"{images.source} has no labels, from which deit3 learns; give one folder for each class")
        if len(images.classes) != model.num_classes:
            raise ValueError(
                f"{images.source} has {len(images.classes)} classes, the model {model.num_classes}; "
                f"train on the set that the run began with"
            )
        from vitreg.training.recipes.deit3 import DeiT3Augmentation

        return DeiT3Augmentation(self, model.preprocess, model.num_classes)


@dataclass(frozen=True)
class MultiCropConfig:
    """DINOv2's crops (`dinov2/configs/ssl_default_config.yaml`).

    Attributes:
        num_local: local crops of an image; the global ones are always two.
        local_size: side of a local crop in pixels; global ones have the model's image size.
        global_scale: smallest and largest share of the image's area that a global crop takes.
        local_scale: the same of local crops.
        mask_probability: how likely a global crop has hidden patches.
        mask_ratio: smallest and largest share of its patches that are hidden then.
    """

    num_local: int = 8
    local_size: int = 96
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    mask_probability: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)

    def __post_init__(self) -> None:
        if self.num_local < 1:
            raise ValueError(f"num_local is {self.num_local}; self-distillation needs at least 1 local crop")
        for name in ("global_scale", "local_scale", "mask_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} is {low} to {high}; it must rise, above 0 and at most to 1")
        if not 0 <= self.mask_probability <= 1:
            raise ValueError(f"mask_probability is {self.mask_probability}; it must be 0 to 1")


@dataclass(frozen=True)
class DINOv2Config(MethodConfig):
    """DINOv2's settings (`dinov2/configs/ssl_default_config.yaml` and `train/vitl14.yaml`).

    Attributes:
        crops: views of an image.
        num_prototypes, hidden_dim, bottleneck_dim: of a `DINOHead`.
        separate_heads: patches have a head of their own.
        centering: how the teacher's outputs are kept from collapsing.
        student_temperature: of the student's softmax.
        teacher_temperature: of the targets, at the start and after the warm-up.
        temperature_warmup: the part of the training in which it rises linearly.
        teacher_momentum: at the start; it rises to 1 by a cosine.
        frozen_prototypes: the part of the training in which the prototypes stay as they are.
        ibot_weight, koleo_weight: of iBOT's and KoLeo's losses; DINO's counts 1.
    """

    crops: MultiCropConfig = field(default_factory=MultiCropConfig)
    num_prototypes: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    separate_heads: bool = True
    centering: Literal["sinkhorn", "mean"] = "sinkhorn"
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    temperature_warmup: float = 0.06
    teacher_momentum: float = 0.994
    frozen_prototypes: float = 0.002
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1

    def __post_init__(self) -> None:
        if min(self.teacher_temperature) < 0.025:
            raise ValueError(f"teacher_temperature is {self.teacher_temperature}; below 0.025 float32 does not reach")

    def build(self, model: ViTConfig) -> DINOv2:
        from vitreg.training.recipes.dinov2 import DINOv2

        return DINOv2(model, self)

    def flops(self, model: ViTConfig, kept: float) -> float:
        """Those of student, teacher and heads, with as many hidden patches as are to be expected."""
        crops, side = self.crops, self.crops.local_size // model.patch_size
        student = 2 * forward_flops(model, model.grid, kept)
        student += crops.num_local * forward_flops(model, (side, side), kept)
        teacher = 2 * forward_flops(model, model.grid)
        hidden = 2 * model.grid[0] * model.grid[1] * crops.mask_probability * sum(crops.mask_ratio) / 2
        hidden_dim, bottleneck_dim = self.hidden_dim, self.bottleneck_dim
        head = 2 * (hidden_dim * (model.embed_dim + hidden_dim + bottleneck_dim) + bottleneck_dim * self.num_prototypes)
        return 3 * (student + (2 + crops.num_local + hidden) * head) + teacher + (2 + hidden) * head

    def augmentation(self, model: ViTConfig, images: ImageSet) -> MultiCrop:
        from vitreg.training.recipes.multi_crop import MultiCrop

        return MultiCrop(model, self.crops)


@dataclass(frozen=True)
class CLIPConfig(MethodConfig):
    """CLIP's text tower and augmentation; `num_classes` of the model is the width of the common space.

    Attributes:
        text_width, text_layers, text_heads: the size of the text tower.
        context_length: tokens of a caption, its marks of start and end included.
        min_scale: the smallest part of an image's area that a crop keeps; less than open_clip's 0.9 for small data.
        flip: probability of a horizontal flip.
    """

    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    context_length: int = 77
    min_scale: float = 0.9
    flip: float = 0.0

    def __post_init__(self) -> None:
        if self.text_heads < 1 or self.text_width % self.text_heads:
            raise ValueError(f"text_width {self.text_width} is not a multiple of text_heads {self.text_heads}")
        if self.context_length < 3:
            raise ValueError(f"context_length is {self.context_length}; it must be at least 3: two marks and a token")
        if not 0 < self.min_scale <= 1 or not 0 <= self.flip <= 1:
            raise ValueError(f"min_scale {self.min_scale} must be above 0, flip {self.flip} at least 0, both at most 1")

    def check(self, config: TrainingConfig) -> None:
        if config.accumulation > 1:
            raise ValueError(
                "clip compares the images of a whole batch; leave accumulation at 1, add processes instead"
            )

    def build(self, model: ViTConfig) -> CLIP:
        from vitreg.training.recipes.clip import CLIP

        return CLIP(model, self)

    def flops(self, model: ViTConfig, kept: float) -> float:
        """Those of both towers, each caption of full length."""
        text = self.text_layers * block_flops(self.context_length, self.text_width, 8 * self.text_width)
        return 3 * (forward_flops(model, model.grid, kept) + text)

    def augmentation(self, model: ViTConfig, images: ImageSet) -> CLIPAugmentation:
        missing = [index for index in range(len(images)) if not images.captions(index)]
        if len(missing) == len(images):
            raise ValueError(
                f"{images.source} has no captions, which clip learns from; give images with a captions.csv "
                f"(image,caption), tars with .txt members, or Parquet with a caption column"
            )
        if missing:
            raise ValueError(
                f"{len(missing)} of the {len(images)} images in {images.source} have no caption, the first is "
                f"{images.name(missing[0])}; caption them or take them out"
            )
        from vitreg.training.recipes.clip import CLIPAugmentation

        return CLIPAugmentation(self, model.preprocess)


@dataclass(frozen=True)
class DistillConfig(MethodConfig):
    """Distillation of a model's tokens into a smaller one.

    Attributes:
        teacher: what `vitreg.load` takes.
        start: a file of ours to begin from, of which the student has the shape; registers are new where it has none.
            How it projects the teacher's tokens is in `projection.safetensors` beside it, where that exists.
        levels: so many depths are matched, at equal steps, the last block among them.
        teacher_blocks: with which of the teacher's blocks; by default those at the same part of its depth.
        norm_weight, register_weight, attention_weight, output_weight: of the losses; the tokens' direction counts 1.
        min_crop: smallest part of an image's area that is seen.
        num_views: crops of an image that are seen again and again; 0 makes a new one each time.
        cache: folder for what the teacher says of these, so that it is computed once; empty keeps nothing.
    """

    teacher: str = ""
    start: str = ""
    levels: int = 4
    teacher_blocks: tuple[int, ...] = ()
    norm_weight: float = 0.5
    register_weight: float = 0.1
    attention_weight: float = 0.1
    output_weight: float = 1.0
    min_crop: float = 0.3
    num_views: int = 0
    cache: str = ""

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ValueError("distillation needs a teacher: give a model with --teacher, as to vitreg diagnose")
        if self.levels < 1:
            raise ValueError(f"levels is {self.levels}; match at least the last block")
        if self.teacher_blocks and len(self.teacher_blocks) != self.levels:
            raise ValueError(
                f"{self.levels} levels of the student are to be matched with {len(self.teacher_blocks)} blocks of the "
                "teacher; give as many (--levels, --teacher-blocks)"
            )
        if self.cache and not self.num_views:
            raise ValueError("a cache is of crops that are seen again: give --num-views, for instance 8")

    def check(self, config: TrainingConfig) -> None:
        if self.levels > config.model.depth:
            raise ValueError(f"levels is {self.levels}, but the student has {config.model.depth} blocks; give fewer")
        if config.drop_path:
            raise ValueError("drop_path leaves images out of blocks, whose tokens distillation matches; set it to 0")

    def build(self, model: ViTConfig) -> Distill:
        from vitreg.training.recipes.distill import Distill

        return Distill(model, self)

    def flops(self, model: ViTConfig, kept: float) -> float:
        """The student's: a teacher with a cache soon costs nothing, and another's size is not known here."""
        return 3 * forward_flops(model, model.grid, kept)

    def augmentation(self, model: ViTConfig, images: ImageSet) -> DistillAugmentation:
        from vitreg.training.recipes.distill import DistillAugmentation

        return DistillAugmentation(self, model.preprocess)


METHODS: dict[str, type[MethodConfig]] = {
    "deit3": DeiT3Config,
    "dinov2": DINOv2Config,
    "clip": CLIPConfig,
    "distill": DistillConfig,
}
