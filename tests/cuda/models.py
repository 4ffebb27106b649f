"""One small model of each kind, every parameter away from its initial value, and one measure of error."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

import vitreg
from peers import perturb
from vitreg.model import RopeConfig

PLAIN = vitreg.ViTConfig(
    embed_dim=64, depth=3, num_heads=4, mlp_dim=128, patch_size=16, image_size=(64, 64), num_classes=5,
    preprocess=vitreg.Preprocess(size=(64, 64), crop_pct=1.0), name="small",
)  # fmt: skip
DTYPES = {"float32": 2e-3, "bfloat16": 8e-2, "float16": 2e-2}
"""With the relative error that is allowed against the CPU's float32; on a GPU, float32 convolutions may use TF32."""

ROPE = RopeConfig(tuple(2 * math.pi / 100.0 ** (j / 4) for j in range(4)))
FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"num_registers": 4, "layer_scale": True},
    "DINOv3": {"rope": ROPE, "learned_positions": False, "num_registers": 4, "layer_scale": True, "key_bias": False},
    "SwiGLU": {"gated_mlp": True, "activation": "silu"},
    "CLIP": {"norm_pre": True, "activation": "quick_gelu", "final_norm": False, "fc_norm": True, "patch_bias": False},
    "SigLIP": {"class_token": False, "pool": "attention", "activation": "gelu_tanh"},
    "parallel": {"parallel": True, "qk_norm": True, "class_token": False, "pool": "mean"},
    "differential": {"differential": True, "num_registers": 1},
    "test-time": {
        "num_registers": 1,
        "num_test_time_registers": 1,
        "register_neurons": ((1, 7),),
        "register_weight": 2,
    },
}


def small(family: str = "registers") -> vitreg.VisionTransformer:
    """On the CPU, in float32."""
    torch.manual_seed(0)
    vit = vitreg.VisionTransformer(dataclasses.replace(PLAIN, **FAMILIES[family]))
    perturb(vit)
    return vit


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative, in the Euclidean norm, on the CPU."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))
