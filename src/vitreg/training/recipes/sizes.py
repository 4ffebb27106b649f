"""The Vision Transformers that recipes train, tiny to giant."""

from __future__ import annotations

from typing import Any, Literal

from vitreg.model import Preprocess, ViTConfig

Size = Literal["micro", "tiny", "small", "base", "large", "huge", "giant"]

# Width, depth, heads, hidden units. Micro is for trying things out; tiny to huge are those of ViT and DeiT-III;
# giant is DINOv2's, with SwiGLU.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "micro": (128, 6, 2, 512),
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1536, 40, 24, 4096),
}


def sized(size: Size, *, patch_size: int, image_size: int, num_registers: int, **fields: Any) -> ViTConfig:
    """The config of a size, to be trained from scratch.

    Args:
        size: tiny to giant.
        patch_size: in pixels.
        image_size: side of the (square) images in pixels.
        num_registers: 4 in the paper.
        fields: others of `ViTConfig`.

    Raises:
        ValueError: an unknown size, or an image size that is no multiple of the patch size.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r} is unknown; choose one of {', '.join(SIZES)}")
    if image_size % patch_size:
        raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch_size}")
    width, depth, heads, hidden = SIZES[size]
    swiglu = {"gated_mlp": True, "activation": "silu"} if size == "giant" else {}
    preprocess = Preprocess(size=(image_size, image_size), crop_pct=1.0, multiple_of=patch_size)
    return ViTConfig(
        **{
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_dim": hidden,
            "patch_size": patch_size,
            "image_size": (image_size, image_size),
            "num_registers": num_registers,
            "preprocess": preprocess,
            **swiglu,
            **fields,
        }
    )
