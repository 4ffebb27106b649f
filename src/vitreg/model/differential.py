"""Differential attention: the difference of two softmaxes, which cancels what both attend to."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitreg.model.attention import Attention, Position, Record, attention_rows
from vitreg.model.config import ViTConfig


class DifferentialAttention(Attention):
    """`(softmax(q1 k1^T / sqrt(d/2)) - lambda softmax(q2 k2^T / sqrt(d/2))) v`, then an RMSNorm of each head.

    Differential Transformer, arXiv 2410.05258, equations 1 to 3; timm's `DiffAttention`. A head of d channels holds
    q1 and k1 in the first half of its queries and keys, q2 and k2 in the second, and d channels of values.
    `lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init`.

    Args:
        config: the architecture.
        block: number of the block, which sets `lambda_init`.
    """

    def __init__(self, config: ViTConfig, block: int) -> None:
        super().__init__(config, block)
        half = config.head_dim // 2
        if config.qk_norm:
            self.q_norm, self.k_norm = (HalvesNorm(half, config.norm_eps) for _ in range(2))
        self.lambda_init = lambda_init(block)
        self.lambda_q1, self.lambda_k1 = (nn.Parameter(torch.empty(half)) for _ in range(2))
        self.lambda_q2, self.lambda_k2 = (nn.Parameter(torch.empty(half)) for _ in range(2))
        self.sub_norm = nn.RMSNorm(config.head_dim, eps=1e-5)

    def reset_lambdas(self) -> None:
        """The paper's initial values; `lambda` starts near `lambda_init`."""
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)

    def lambda_full(self) -> Float[Tensor, ""]:
        """The weight of the second softmax, float32; one for all heads."""
        first, second = self.lambda_q1 * self.lambda_k1, self.lambda_q2 * self.lambda_k2
        return first.sum().float().exp() - second.sum().float().exp() + self.lambda_init

    def forward(
        self, x: Float[Tensor, "B T D"], position: Position | None = None, record: Record | None = None
    ) -> Float[Tensor, "B T D"]:
        """As `Attention`; `record` receives `lambda` first."""
        if record is not None:
            record("lambda", self.lambda_full())
        return super().forward(x, position, record)

    def mix(
        self, q: Float[Tensor, "B H T d"], k: Float[Tensor, "B H K d"], v: Float[Tensor, "B H K d"]
    ) -> Float[Tensor, "B H T d"]:
        """Both softmaxes in one fused call: a query whose other half is zero meets one half of the keys only.

        Separate calls would give the kernel keys half as wide as the values; on a CPU it then builds the T x T matrix.
        """
        first, second = q.chunk(2, dim=-1)
        nothing = torch.zeros_like(first)
        both = torch.cat((torch.cat((first, nothing), -1), torch.cat((nothing, second), -1)), dim=2)
        signal, noise = F.scaled_dot_product_attention(both, k, v, scale=first.shape[-1] ** -0.5).chunk(2, dim=2)
        return self.sub_norm(signal - self.lambda_full() * noise) * (1 - self.lambda_init)


class HalvesNorm(nn.LayerNorm):
    """Normalizes both halves of a head apart, with the same weights."""

    def forward(self, input: Float[Tensor, "B H T d"]) -> Float[Tensor, "B H T d"]:
        return super().forward(input.unflatten(-1, (2, -1))).flatten(-2)


def lambda_init(block: int) -> float:
    """The paper's schedule over depth: 0.2 in the first block, towards 0.8 in the last."""
    return 0.8 - 0.6 * math.exp(-0.3 * block)


def differential_rows(
    queries: Float[Tensor, "B H T d"],
    keys: Float[Tensor, "B H K d"],
    rows: Int[Tensor, " Q"],
    weight: Float[Tensor, ""],
) -> Float[Tensor, "B H Q K"]:
    """The chosen rows of what weighs the values: the first softmax minus `weight` (lambda) times the second.

    Entries may be negative, and a row sums to `1 - lambda`. The RMSNorm of the heads, which follows, is not part of it.
    """
    halves = zip(queries.chunk(2, dim=-1), keys.chunk(2, dim=-1), strict=True)
    signal, noise = (attention_rows(q, k, rows) for q, k in halves)
    return signal - weight * noise
