"""The Transformer block."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.model.attention import Attention, Record
from vitreg.model.config import ViTConfig
from vitreg.model.differential import DifferentialAttention
from vitreg.model.rope import Rotation


class QuickGELU(nn.Module):
    """OpenAI CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation(name: str) -> nn.Module:
    """The non-linearity that `ViTConfig.activation` names."""
    return {
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "quick_gelu": QuickGELU(),
        "silu": nn.SiLU(),
    }[name]


class Mlp(nn.Module):
    """Two linear layers; with `gated_mlp`, `fc1` holds the gate's rows first and the value's after them."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gated = config.gated_mlp
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim * (1 + self.gated), bias=config.mlp_bias)
        self.act = activation(config.activation)
        self.norm = nn.LayerNorm(config.mlp_dim, config.norm_eps) if config.mlp_norm else nn.Identity()
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim, bias=config.mlp_bias)

    def forward(self, x: Float[Tensor, "B T D"], record: Record | None = None) -> Float[Tensor, "B T D"]:
        """`record` receives the hidden units that enter `fc2`: a neuron writes its value times a column."""
        x = self.fc1(x)
        if self.gated:
            gate, value = x.chunk(2, dim=-1)
            x = self.act(gate) * value
        else:
            x = self.act(x)
        x = self.norm(x)
        if record is not None:
            record("activations", x)
        return self.fc2(x)


class Block(nn.Module):
    """Pre-norm Transformer block: `x + s1 attn(norm1(x))`, then `x + s2 mlp(norm2(x))`.

    With `parallel`, both branches read `norm1(x)` and share one scale (ViT-22B, arXiv 2302.05442).

    Args:
        config: the architecture.
        index: number of the block; only differential attention depends on it.
    """

    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        self.parallel = config.parallel
        self.norm1 = nn.LayerNorm(config.embed_dim, config.norm_eps)
        self.attn = DifferentialAttention(config, index) if config.differential else Attention(config)
        self.mlp = Mlp(config)
        self.scale1 = nn.Parameter(torch.empty(config.embed_dim)) if config.layer_scale else None
        self.norm2 = self.scale2 = None
        if not self.parallel:
            self.norm2 = nn.LayerNorm(config.embed_dim, config.norm_eps)
            self.scale2 = nn.Parameter(torch.empty(config.embed_dim)) if config.layer_scale else None

    def forward(
        self, x: Float[Tensor, "B T D"], rotation: Rotation | None = None, record: Record | None = None
    ) -> Float[Tensor, "B T D"]:
        """One step of the residual stream; `record` sees the intermediates of attention and MLP."""
        normed = self.norm1(x)
        branch = self.attn(normed, rotation, record)
        if self.norm2 is None:
            return _add(x, branch + self.mlp(normed, record), self.scale1)
        x = _add(x, branch, self.scale1)
        return _add(x, self.mlp(self.norm2(x), record), self.scale2)


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """Residual addition; LayerScale in the same pass over memory."""
    return x + branch if scale is None else torch.addcmul(x, branch, scale)
