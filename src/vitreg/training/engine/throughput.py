"""How much work a step is, and how fast the machine could do it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vitreg.model import ViTConfig


def forward_flops(config: ViTConfig, grid: tuple[int, int], kept: float = 1.0) -> float:
    """Floating-point operations of a forward pass for one image, without a head.

    Args:
        config: the model.
        grid: rows and columns of patches.
        kept: the share of the residual branches that stochastic depth computes.
    """
    patches = grid[0] * grid[1]
    tokens = patches + config.num_prefix_tokens
    hidden = (3 if config.gated_mlp else 2) * config.mlp_dim
    embedding = 2 * patches * 3 * config.patch_size**2 * config.embed_dim
    return embedding + kept * config.depth * block_flops(tokens, config.embed_dim, hidden)


def block_flops(tokens: int, dim: int, hidden: int) -> int:
    """Multiplications and additions of a Transformer block: the four projections, both attention products, the MLP.

    Args:
        tokens: of a sequence.
        dim: width of a token.
        hidden: rows of all of the MLP's matrices together.
    """
    return 2 * tokens * dim * (4 * dim + hidden) + 4 * tokens**2 * dim


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Floating-point operations a second of a large matrix product: what a step is measured against."""
    import torch

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        wait()
        before = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - before)
    return 2 * side**3 / best
