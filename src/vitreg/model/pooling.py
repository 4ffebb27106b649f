"""From tokens to one feature per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.model.block import Mlp
from vitreg.model.config import ViTConfig
from vitreg.model.norm import norm_layer


class AttentionPool(nn.Module):
    """A learned query attends to the tokens, then an MLP (SigLIP's "MAP" head; big_vision `MAPHead`).

    Without the MLP it is open_clip's `AttentionalPooler` as CoCa reads it, whose first query is the image's.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.pool_dim or config.embed_dim
        self.num_heads = config.pool_heads or config.num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(config.embed_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = self.mlp = None
        if not config.pool_dim:
            self.norm, self.mlp = norm_layer(config, dim), Mlp(config, hidden=config.pool_mlp_dim)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B F"]:
        """Pool the patches, and the class token where the model does (never the registers)."""
        q = self.q(self.latent).expand(tokens.shape[0], -1, -1)
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if self.norm is not None and self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return x.squeeze(1)
