"""What the tests of transformers share: its models, small and perturbed, and how outputs are compared."""

import pytest
import torch

from vitreg.model import VisionTransformer

hf = pytest.importorskip("transformers")

BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = {"intermediate_size": 48}
SQUARE = {"image_size": 56, "patch_size": 14}
SIZES = [(56, 56), (98, 98), (42, 70), (28, 56)]
TOLERANCE = 1e-5


def perturb(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter away from its initial value: tokens, positions, norms, biases and LayerScale count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert error(ours, theirs) <= tolerance


def same_tokens(vit: VisionTransformer, x: torch.Tensor, sequence: torch.Tensor) -> None:
    """The named parts against a sequence whose order the peer documents: class token, registers, patches."""
    tokens = vit(x)
    first = int(vit.config.class_token)
    patches = first + vit.num_registers
    if tokens.cls is not None:
        close(tokens.cls, sequence[:, 0])
    if vit.num_registers:
        close(tokens.registers, sequence[:, first:patches])
    close(tokens.patches, sequence[:, patches:])


def vit_model(**options):
    return hf.ViTModel(hf.ViTConfig(**BASE, **MLP, **SQUARE, **options))


def dinov2_config(registers: bool, **options):
    kind = hf.Dinov2WithRegistersConfig if registers else hf.Dinov2Config
    return kind(**BASE, **SQUARE, **{"mlp_ratio": 2, **options})


def dinov3_model(**options):
    return hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**BASE, **MLP, **SQUARE, **{"num_register_tokens": 4, **options}))


def clip_config():
    vision = dict(**BASE, **MLP, **SQUARE, projection_dim=24)
    text = dict(**BASE, **MLP, vocab_size=64, max_position_embeddings=8)
    return hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


def siglip_config(**options):
    vision = dict(**BASE, **MLP, **SQUARE, **options)
    text = dict(**BASE, **MLP, vocab_size=64, max_position_embeddings=8)
    return hf.SiglipConfig(text_config=text, vision_config=vision)


def siglip2_config():
    vision = dict(**BASE, **MLP, patch_size=14, num_patches=16)
    text = dict(**BASE, **MLP, vocab_size=64, max_position_embeddings=8)
    return hf.Siglip2Config(text_config=text, vision_config=vision)
