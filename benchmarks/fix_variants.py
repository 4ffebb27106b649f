"""Which part of a test-time fix changes the class token of the ViT-Ti? The table of docs/registers.md, "Without loss".

    python benchmarks/fix_variants.py PHOTOGRAPHS SMALL_IMAGES

Of each variant, the mean cosine of the class token with the original's, on 100 images of each folder. The forward pass
is written out here, because most variants are not worth having in the package; registers stand last in the sequence.
"""

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import vitreg
from vitreg.images import ImageStream, find_images

UNITS = {6: 189, 7: 417}


@dataclass(frozen=True)
class Variant:
    """How artifacts are moved.

    Attributes:
        count: registers.
        weight, weight_from: tokens that a register counts as in attention from a block on; one before.
        start: the block before which registers enter.
        seen_from: the block whose attention sees them first.
        value: what registers receive: the strongest activation, the mean of the four strongest, or one of these each.
        most: what a patch keeps of an activation.
        copies: registers begin as the tokens with the strongest activations, and keep these.
    """

    count: int = 1
    weight: float = 1
    weight_from: int = 0
    start: int = 6
    seen_from: int = 0
    value: str = "max"
    most: float = 0
    copies: bool = False


VARIANTS = {
    "published": Variant(start=0),
    "counted 4 times": Variant(start=0, weight=4),
    "mean of the four": Variant(start=0, weight=4, value="mean"),
    "four registers, each its own": Variant(start=0, count=4, value="own"),
    "enters before block 6, 4 times": Variant(weight=4),
    "enters before block 6, 3 times": Variant(weight=3),
    "four that enter before block 6, each its own": Variant(count=4, value="own"),
    "3 times from block 8": Variant(weight=3, weight_from=8),
    "3 times, seen from block 8": Variant(weight=3, seen_from=8),
    "3 times from block 8, patches keep up to 1": Variant(weight=3, weight_from=8, most=1),
    "copies of the four artifacts": Variant(count=4, copies=True),
}


def class_tokens(vit, images: torch.Tensor, variant: Variant | None) -> torch.Tensor:
    """The class token after the final norm; None for the original."""
    patches = vit.patch_embed(images).flatten(2).transpose(1, 2) + vit.pos_embed
    x = torch.cat((vit.cls_token.expand(len(images), -1, -1), patches), dim=1)
    own, registers = x.shape[1], 0
    for i, block in enumerate(vit.blocks):
        if variant and i == variant.start and not variant.copies:
            registers = variant.count
            x = torch.cat((x, x.new_zeros(len(x), registers, x.shape[2])), dim=1)
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, vit.config.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = x.new_zeros(1, 1, 1, x.shape[1])
        if variant:
            weight = torch.tensor(variant.weight if i >= variant.weight_from else 1.0)
            bias[..., own:] = weight.log() if i >= variant.seen_from else -60.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(1, 1, x.shape[1], -1))
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
        if variant and i in UNITS:
            if variant.copies and not registers:
                registers = variant.count
                top = hidden[:, :own, UNITS[i]].topk(registers).indices[..., None]
                x = torch.cat((x, x.take_along_dim(top, dim=1)), dim=1)
                hidden = torch.cat((hidden, hidden.take_along_dim(top, dim=1)), dim=1)
            unit = hidden[..., UNITS[i]]
            strongest = unit.topk(4).values
            moved = {"max": strongest[:, :1], "mean": strongest.mean(1, keepdim=True), "own": strongest}[variant.value]
            received = unit[:, own:] if variant.copies else moved.expand(-1, registers)
            hidden[..., UNITS[i]] = torch.cat((unit[:, :own].clamp(max=variant.most), received), dim=1)
        x = x + block.mlp.fc2(hidden)
    return vit.norm(x[:, 0]).float()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+")
    options = parser.parse_args()
    vit = vitreg.load("vit_tiny_patch16_224.augreg_in21k_ft_in1k").bfloat16()
    with torch.inference_mode():
        sets = []
        for folder in options.folders:
            paths = find_images([folder])
            batches = ImageStream(paths[:: max(1, len(paths) // 100)][:100], vit.preprocess)
            sets.append(torch.cat([batch.images for batch in batches]).bfloat16())
        originals = [class_tokens(vit, images, None) for images in sets]
        for name, variant in VARIANTS.items():
            pairs = zip(sets, originals, strict=True)
            cosines = [F.cosine_similarity(class_tokens(vit, images, variant), old).mean() for images, old in pairs]
            print(f"{name:46}", *[f"{cosine:.4f}" for cosine in cosines], flush=True)
