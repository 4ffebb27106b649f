"""Multi-head self-attention, fused, and its rows recomputed on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitreg.model.config import ViTConfig
from vitreg.model.norm import norm_layer
from vitreg.model.rel_pos import Grid, RelPosBias
from vitreg.model.rope import Rotation, rotate

Record = Callable[[str, Tensor], None]
"""Called with the name and the value of an intermediate of a block while it runs; see `trace`."""

Position = Rotation | Grid
"""Where the patches are: RoPE's cosines and sines, or the grid for a bias that follows from it."""

# A private function of PyTorch's, which may be gone one day: then the CPU counts as one without tiles.
TILED_CPU = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
TILE, MAX_PADDED = 16, 1024

# The rows recomputed at once: softmax over [B, H, rows, T] stays below 64 MiB in float32.
ROW_BUDGET = 2**24


class Attention(nn.Module):
    """`softmax(q k^T / sqrt(d)) v` over all tokens, through PyTorch's fused kernel.

    Args:
        config: the architecture.
        block: number of the block, on which its prefix and its registers depend.

    Attributes:
        prefix: keys and values that every image has besides, `[2, H, P, d]`, or None.
    """

    def __init__(self, config: ViTConfig, block: int = 0) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.interleaved = config.mixed_rope or bool(config.rope and config.rope.interleaved)
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.q_norm = norm_layer(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = norm_layer(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.norm = norm_layer(config, dim) if config.attention_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=config.proj_bias)
        self.rel_pos = RelPosBias(config, block) if config.rel_pos else None
        rows = dict(config.prefix_rows).get(block)
        self.prefix = nn.Parameter(torch.empty(2, config.num_heads, rows, config.head_dim)) if rows else None
        self.masks_key_bias = config.qkv_bias and not config.key_bias

    def forward(
        self, x: Float[Tensor, "B T D"], position: Position | None = None, record: Record | None = None
    ) -> Float[Tensor, "B T D"]:
        """Mix the tokens; `record` receives bias, queries, keys and values of the softmax, and what the heads give."""
        if self.masks_key_bias:  # DINOv3 holds the keys' bias at zero (`LinearKMaskedBias`)
            query_bias, key_bias, value_bias = self.qkv.bias.chunk(3)
            bias = torch.cat((query_bias, torch.zeros_like(key_bias), value_bias))
            qkv = F.linear(x, self.qkv.weight, bias)
        else:
            qkv = self.qkv(x)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = None
        if self.rel_pos is not None:
            bias = self.rel_pos(position, q)
            if record is not None:
                record("bias", bias)
        elif position is not None:
            rotation = cast("Rotation", position)
            q = rotate(q, rotation, interleaved=self.interleaved)
            k = rotate(k, rotation, interleaved=self.interleaved)
        if record is not None:
            if self.prefix is not None:
                record("prefix", self.prefix[0])
            record("queries", q)
            record("keys", k)
            record("values", v)
        if self.prefix is not None:
            keys, values = self.prefix.expand(k.shape[0], -1, -1, -1, -1).unbind(1)
            k, v = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
            bias = None if bias is None else F.pad(bias, (keys.shape[2], 0))
        x = self.mix(q, k, v) if bias is None else _attend(q, k, v, bias)
        if record is not None:
            record("heads", x)
        x = x.transpose(1, 2).flatten(2)
        return self.proj(self.norm(x))

    def mix(
        self, q: Float[Tensor, "B H T d"], k: Float[Tensor, "B H K d"], v: Float[Tensor, "B H K d"]
    ) -> Float[Tensor, "B H T d"]:
        """The values, weighed by the softmax of the products of queries and keys."""
        return _attend(q, k, v)


def _attend(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B H K d"],
    v: Float[Tensor, "B H K d"],
    bias: Float[Tensor, "1 H T K"] | None = None,
) -> Float[Tensor, "B H T d"]:
    """The fused kernel, on keys and values padded to whole tiles where that is faster.

    With AMX, PyTorch's half-precision kernel takes about twice as long for 201 or 261 tokens as for the next multiple
    of 16; registers and the class token make the length odd. Above a thousand tokens padding gains nothing.
    """
    tokens = k.shape[2]
    missing = -tokens % TILE
    if not (TILED_CPU and missing and tokens <= MAX_PADDED and q.device.type == "cpu" and q.dtype != torch.float32):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    mask = F.pad(q.new_zeros(1, 1, 1, tokens) if bias is None else bias, (0, missing), value=-torch.inf)
    pad = (0, 0, 0, missing)
    mask = mask.expand(1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, F.pad(k, pad), F.pad(v, pad), attn_mask=mask)


def attention_rows(
    queries: Float[Tensor, "B H T d"],
    keys: Float[Tensor, "B H K d"],
    rows: Int[Tensor, " Q"],
    bias: Float[Tensor, "1 H T K"] | None = None,
) -> Float[Tensor, "B H Q K"]:
    """The chosen rows of the attention matrix, float32, exactly as the fused kernel weighs the values.

    Cost and memory are those of the rows asked for: `softmax(q[rows] k^T / sqrt(d) + bias[rows])`, some at a time.
    """
    batch, heads, tokens, head_dim = keys.shape
    chunk = max(1, ROW_BUDGET // (batch * heads * tokens))
    chosen = queries[:, :, rows].float() * head_dim**-0.5
    keys = keys.float().transpose(-1, -2)  # in half precision a product would round before the softmax
    parts = []
    for part, numbers in zip(chosen.split(chunk, dim=2), rows.split(chunk), strict=True):
        scores = _scores(part, keys)
        parts.append((scores if bias is None else scores + bias[:, :, numbers]).softmax(-1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _scores(queries: Float[Tensor, "B H Q d"], keys: Float[Tensor, "B H d K"]) -> Float[Tensor, "B H Q K"]:
    """Their product; on a CPU head by head, because keys are a view of the fused projection that matmul would copy."""
    if queries.device.type != "cpu":
        return queries @ keys
    return torch.stack([q @ k for q, k in zip(queries.unbind(1), keys.unbind(1), strict=True)], dim=1)
