"""The norm of a model: LayerNorm, or RMSNorm, which neither centers nor shifts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitreg.model.config import ViTConfig


def norm_layer(config: ViTConfig, dim: int) -> nn.LayerNorm | nn.RMSNorm:
    """The norm that `ViTConfig.rms_norm` names, over `dim` channels."""
    return nn.RMSNorm(dim, config.norm_eps) if config.rms_norm else nn.LayerNorm(dim, config.norm_eps)


def block_norm(config: ViTConfig) -> nn.LayerNorm | nn.RMSNorm:
    """The norm of a block's tokens."""
    return norm_layer(config, config.embed_dim) if config.rms_norm else BlockNorm(config.embed_dim, config.norm_eps)


class BlockNorm(nn.LayerNorm):
    """Takes weights that FSDP gathered in half precision for tokens in float32, which a CPU's layer norm refuses."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
