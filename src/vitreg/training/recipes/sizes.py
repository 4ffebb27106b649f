"""What recipes share: the Vision Transformers that they train, how much they train them, and their smoke form."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from vitreg.training.engine.config import MethodConfig, TrainingConfig

if TYPE_CHECKING:
    from vitreg.model import ViTConfig

Size = Literal["micro", "mini", "tiny", "small", "base", "large", "huge", "giant"]

# Width, depth, heads, hidden units. Micro is for trying things out, mini is what the package carries; tiny to huge are
# those of ViT and DeiT-III; giant is DINOv2's, with SwiGLU.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "micro": (128, 6, 2, 512),
    "mini": (192, 8, 3, 576),
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1536, 40, 24, 4096),
}


def sized(size: Size, *, patch_size: int, image_size: int, num_registers: int, **fields: Any) -> ViTConfig:
    """The config of a size, to be trained from scratch on square images, with other `fields` of `ViTConfig`.

    Raises:
        ValueError: an unknown size, or an image size that is no multiple of the patch size.
    """
    from vitreg.model import Preprocess, ViTConfig

    if size not in SIZES:
        raise ValueError(f"size {size!r} is unknown; choose one of {', '.join(SIZES)}")
    if image_size % patch_size:
        raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch_size}")
    shape = dict(zip(("embed_dim", "depth", "num_heads", "mlp_dim"), SIZES[size], strict=True))
    swiglu = {"gated_mlp": True, "activation": "silu"} if size == "giant" else {}
    side = (image_size, image_size)
    preprocess = Preprocess(size=side, crop_pct=1.0, multiple_of=patch_size)
    given = {"patch_size": patch_size, "image_size": side, "num_registers": num_registers, "preprocess": preprocess}
    return ViTConfig(**{**shape, **swiglu, **given, **fields})


class Chosen(TypedDict, total=False):
    """What can be chosen for every recipe; what is None or left out is the recipe's own."""

    size: Size | None
    image_size: int | None
    patch_size: int | None
    batch_size: int | None
    epochs: int | float | None


@dataclass(frozen=True)
class Scale:
    """How large a model (as for `sized`) sees how many images.

    Attributes:
        num_steps: the length where there are no epochs; after `choose` it is the length.
    """

    num_images: int
    size: Size
    image_size: int
    patch_size: int
    batch_size: int
    epochs: int | float | None = None
    num_steps: int = 0

    def choose(self, chosen: Chosen) -> Scale:
        """With what was chosen instead.

        Raises:
            TypeError: something that cannot be chosen.
            ValueError: a number that is not above 0.
        """
        given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        for name, value in given.items():
            if name not in Chosen.__annotations__:
                raise TypeError(f"a recipe takes no {name!r}; choose among {', '.join(Chosen.__annotations__)}")
            if name != "size" and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        scale = dataclasses.replace(self, **given)
        if not scale.epochs:
            return scale
        return dataclasses.replace(scale, num_steps=math.ceil(scale.epochs * (self.num_images / scale.batch_size)))

    def model(self, num_registers: int, **fields: Any) -> ViTConfig:
        """The Vision Transformer, with other fields of `ViTConfig`."""
        shape = {"patch_size": self.patch_size, "image_size": self.image_size}
        return sized(self.size, num_registers=num_registers, **shape, **fields)

    def schedule(self) -> dict[str, Any]:
        """Fields of `TrainingConfig`: about a checkpoint an epoch; diagnoses enough to see when artifacts appear."""
        return {
            "num_steps": self.num_steps,
            "batch_size": self.batch_size,
            "checkpoint_every": max(50, min(round(self.num_images / self.batch_size), 2000)),
            "diagnose_every": max(1, self.num_steps // 20),
        }


def smoke_form(config: TrainingConfig, method: MethodConfig, **optimizer: Any) -> TrainingConfig:
    """A recipe for a small model and few steps: LayerScale from 0.1, no stochastic depth, three diagnoses.

    Args:
        config: the recipe's, of a small `Scale`.
        method: with gentler settings.
        optimizer: settings of it that differ, besides a warm-up of a tenth of the steps.
    """
    return dataclasses.replace(
        config,
        method=method,
        optimizer=dataclasses.replace(config.optimizer, **{"warmup_steps": config.num_steps // 10, **optimizer}),
        layer_scale=0.1,
        drop_path=0.0,
        diagnose_every=max(1, config.num_steps // 3),
    )
