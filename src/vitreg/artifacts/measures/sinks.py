"""What heads do with a sink: nothing, or do they tell it to all tokens?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitreg.artifacts.measures.faithfulness import is_plain
from vitreg.checkpoints import ObservedViT
from vitreg.common.words import percent
from vitreg.model import Trace, VisionTransformer
from vitreg.model.trace import Summary

SINK = 0.3
"""Tokens are a sink of a head where the class token pays them so much of its attention."""

OUTLIER = 3.0
"""Patches that can be a sink together have norms of so many medians of their image, after the block before."""

NO_OP = 0.5
"""Value norm of a sink, in mean value norms of all tokens, below which a head reads nothing there."""

BROADCAST = 2.0
"""Stable rank up to which what a head gives counts as one vector for all tokens."""

SAMPLED = 8
"""Images of a batch that are looked at, the first."""

Kind = Literal["no-op", "broadcast", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Tokens = Literal["class token", "registers", "outlier patches"]


@dataclass(frozen=True)
class SinkHead:
    """A head in which a sink takes much of the class token's attention, in at least half of the images.

    Attributes:
        block, head: counted from 0.
        tokens: what the sink is, most often: the class token itself, all registers, or patches of outlying norm.
        attention: that it receives from the class token, mean over images.
        value_norm: of the sink's tokens, weighed by attention, as a multiple of the mean of all tokens.
        stable_rank: squared Frobenius norm of what the head gives all tokens over its squared spectral norm.
        kind: `"no-op"`: the sink has nothing to say; `"broadcast"`: all tokens are told what it says.
    """

    block: int
    head: int
    tokens: Tokens
    attention: float
    value_norm: float
    stable_rank: float
    kind: Kind


@dataclass(frozen=True)
class Sinks:
    """The two kinds of attention sinks (Fesser et al., arXiv 2606.08105).

    Attributes:
        num_heads: in each block.
        blocks: per block, the number of heads of each kind.
        heads: the heads that have a sink.
        sentences: the same in words.
    """

    num_heads: int
    blocks: tuple[dict[str, int], ...]
    heads: tuple[SinkHead, ...]
    sentences: tuple[str, ...]


def gram(heads: Float[Tensor, "B H T d"]) -> Float[Tensor, "B H d d"]:
    """All that a stable rank needs of what heads give."""
    heads = heads.float()
    return heads.mT @ heads


def stable_rank(gram: Float[Tensor, "*B d d"]) -> Float[Tensor, "*B"]:
    """Squared Frobenius over squared spectral norm; the latter by 16 power iterations."""
    gram = gram / gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(1e-30)
    vector = gram.sum(-1, keepdim=True) + 1e-4
    for _ in range(16):
        vector = gram @ (vector / vector.norm(dim=-2, keepdim=True))
    return 1 / vector.norm(dim=-2)[..., 0]


class SinkSums:
    """Adds up sinks over batches."""

    def __init__(self, vit: VisionTransformer | ObservedViT) -> None:
        self._vit, self._num_images = vit, 0
        self._sums: dict[str, Tensor] = {}
        self.summaries: dict[str, Summary] = {}
        if isinstance(vit, VisionTransformer) and is_plain(vit.config):
            self.summaries = {
                "value norms": ("values", lambda v: torch.linalg.vector_norm(v[:SAMPLED], dim=-1, dtype=torch.float32)),
                "grams of heads": ("heads", lambda heads: gram(heads[:SAMPLED])),
            }

    def add(self, trace: Trace, names: list[str]) -> None:
        """Add a batch whose attention is from the class token first."""
        if not self.summaries:
            return
        rows, norms = trace.attention, trace.summaries["value norms"]  # [L, B, H, T]
        assert rows is not None
        assert rows.to_cls is not None
        few = slice(SAMPLED)
        before = trace.patch_norms[:-1, few].flatten(2)
        large = F.pad(before >= OUTLIER * before.median(-1, keepdim=True).values, (0, 0, 0, 0, 1, 0))  # none in block 0
        parts = (
            rows.to_cls[:, few, :, :1],
            rows.to_registers[:, few, :, 0],
            rows.to_patches[:, few, :, 0].flatten(3),
        )
        shares = dict(zip(get_args(Tokens), (*parts[:2], parts[2] * large.unsqueeze(2)), strict=True))
        value_norms = norms.split([part.shape[-1] for part in parts], dim=-1)
        of_each = torch.stack([share.sum(-1) for share in shares.values()])  # [3, L, B, H]
        said = torch.stack([(a * v).sum(-1) for a, v in zip(shares.values(), value_norms, strict=True)])
        attention, which = of_each.max(0)
        is_sink = attention >= SINK
        value_norm = said.gather(0, which.unsqueeze(0))[0] / attention.clamp_min(1e-9) / norms.mean(-1)
        values = {"attention": attention, "value_norm": value_norm}
        values |= {tokens: which == i for i, tokens in enumerate(shares)}
        values = {name: value * is_sink for name, value in values.items()}
        for name, value in {
            **values,
            "sinks": is_sink,
            "stable_rank": stable_rank(trace.summaries["grams of heads"]),
        }.items():
            self._sums[name] = self._sums.get(name, 0) + value.double().sum(1).cpu()
        self._num_images += min(len(names), SAMPLED)

    def conclude(self) -> Sinks | None:
        """None where there is no class token whose attention is a softmax that is seen."""
        if not self._num_images:
            return None
        heads = tuple(self._head(*place.tolist()) for place in (self._sums["sinks"] >= self._num_images / 2).nonzero())
        blocks = tuple(
            {kind: sum(head.block == block and head.kind == kind for head in heads) for kind in KINDS}
            for block in range(self._vit.config.depth)
        )
        num_heads = self._sums["sinks"].shape[1]
        return Sinks(num_heads, blocks, heads, _say(heads, num_heads * len(blocks)))

    def _head(self, block: int, head: int) -> SinkHead:
        sums = {name: float(value[block, head]) for name, value in self._sums.items()}
        attention, value_norm = (sums[name] / sums["sinks"] for name in ("attention", "value_norm"))
        rank = sums["stable_rank"] / self._num_images
        kind = "no-op" if value_norm < NO_OP else "broadcast" if rank <= BROADCAST else "other"
        return SinkHead(
            block, head, max(get_args(Tokens), key=lambda name: sums[name]), attention, value_norm, rank, kind
        )


def _say(heads: tuple[SinkHead, ...], num_heads: int) -> tuple[str, ...]:
    """How many heads have a sink, of which kind, and which tokens they are."""
    if not heads:
        return (f"In none of {num_heads} heads a sink takes {percent(SINK)} or more of the class token's attention.",)
    count = {kind: sum(head.kind == kind for head in heads) for kind in KINDS}
    where = {tokens: sum(head.tokens == tokens for head in heads) for tokens in get_args(Tokens)}
    places = ", ".join(f"{tokens} in {number}" for tokens, number in where.items() if number)
    return (
        f"In {len(heads)} of {num_heads} heads a sink takes {percent(SINK)} or more of the class token's attention "
        f"({places}): {count['no-op']} read next to nothing there (no-op), {count['broadcast']} tell all tokens the "
        f"same (broadcast), {count['other']} do neither.",
    )
