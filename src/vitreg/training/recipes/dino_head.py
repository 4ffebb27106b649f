"""DINO's projection head: what a token has in common with each of many prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class DINOHead(nn.Module):
    """An MLP, then the cosine to every prototype (DINO, arXiv 2104.14294, appendix C, with a normalized last layer).

    The same function as lightly's `DINOProjectionHead`, whose `weight_norm` keeps a derived tensor on the module, so
    that it cannot be copied after a forward pass. Here prototypes are normalized where they are used, which FSDP
    allows too. DINOv2 learns a factor per prototype besides; DINO found it unstable, and here it is 1.

    Args:
        embed_dim: width of a token.
        hidden_dim: of the MLP.
        bottleneck_dim: in which the cosines are taken.
        num_prototypes: outputs.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        # Only directions count, but their length is what learning rates are relative to: that of nn.Linear, as in DINO.
        bound = bottleneck_dim**-0.5
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim).uniform_(-bound, bound))

    def forward(self, tokens: Float[Tensor, "*B D"], *, frozen: bool = False) -> Float[Tensor, "*B K"]:
        """Cosines in float32.

        Args:
            tokens: normed tokens of the Vision Transformer.
            frozen: give the prototypes gradients of zero. They stay in the graph, because DDP waits for all gradients.
        """
        prototypes = F.normalize(self.prototypes.float(), dim=-1)
        if frozen:
            prototypes = prototypes.detach() + 0 * prototypes
        x = self.mlp(tokens)
        return F.linear(F.normalize(x.float(), dim=-1).to(x.dtype), prototypes.to(x.dtype)).float()
