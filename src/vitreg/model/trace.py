"""Looking inside a forward pass without slowing it down."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, SupportsIndex, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitreg.model.attention import attention_rows
from vitreg.model.config import ViTConfig
from vitreg.model.differential import differential_rows
from vitreg.model.observed_config import ObservedConfig
from vitreg.model.tokens import Tokens

Facet = Literal["queries", "keys", "values"]
IN_HEADS = ("queries", "keys", "values", "heads")
Query = Literal["cls", "registers"] | SupportsIndex | tuple[SupportsIndex, SupportsIndex]

Summary = tuple[str, Callable[[Tensor], Tensor]]
"""Of which intermediate, and what is computed of it while it exists: `"queries"`, `"keys"`, `"values"` and `"heads"`,
what the heads give, `[B, H, T, d]`; `"activations"`, `"mlp"`, what the MLP gives, and `"stream"`, all tokens after the
block, `[B, T, D]`."""


@dataclass(frozen=True)
class AttentionRows:
    """Rows of the attention matrices of the traced blocks: what each chosen query attends to.

    A row sums to one over `to_cls`, `to_registers` and `to_patches` together, less what goes to the fixed keys of a
    block that has some (`ViTConfig.prefix_rows`). With differential attention it is the
    difference of two softmaxes that weighs the values: entries may be negative, and a row sums to 1 - lambda.

    Attributes:
        queries: a name for each row: `"class token"`, `"register 1"`, `"patch (row, column)"`.
        to_patches: `[L, B, H, Q, h, w]`.
        to_registers: `[L, B, H, Q, R]`.
        to_cls: `[L, B, H, Q]`, None where the model has no class token.
    """

    queries: tuple[str, ...]
    to_patches: Float[Tensor, "L B H Q h w"]
    to_registers: Float[Tensor, "L B H Q R"]
    to_cls: Float[Tensor, "L B H Q"] | None


@dataclass(frozen=True)
class Trace:
    """What happened in one forward pass.

    Norms are L2, float32, taken after each block and before the final norm.
    Norms cover every block. Everything else covers `blocks`, in that order, and is None unless asked for.

    Attributes:
        tokens: the output, as `vit(images)` returns it.
        blocks: the blocks that the recordings below belong to.
        patch_norms: `[depth, B, h, w]`.
        cls_norms: `[depth, B]`, None without a class token.
        register_norms: `[depth, B, R]`.
        attention: rows of the attention matrices.
        queries, keys, values: as they enter the softmax (after q/k norm and RoPE), heads side by side,
            `[L, B, ., D]`. With differential attention the halves of a head belong to one softmax each.
        patches: hidden states of the patches after each block, `[L, B, N, D]`.
        activations: hidden units of the MLPs, after the non-linearity, `[L, B, ., mlp_dim]`.
        hidden: hidden states of all tokens after each block, before the final norm, `[L, B, ., D]`.
        embeddings: patch embeddings, before position embedding and block 0, `[B, N, D]`.
        largest: hidden states of the K patches with the largest norms, after every block.
        summaries: by name, what was computed of an intermediate of each block, `[L, ...]`.
    """

    tokens: Tokens
    blocks: tuple[int, ...]
    patch_norms: Float[Tensor, "depth B h w"]
    cls_norms: Float[Tensor, "depth B"] | None
    register_norms: Float[Tensor, "depth B R"]
    attention: AttentionRows | None = None
    queries: Tokens | None = None
    keys: Tokens | None = None
    values: Tokens | None = None
    patches: Float[Tensor, "L B N D"] | None = None
    activations: Tokens | None = None
    hidden: Tokens | None = None
    embeddings: Float[Tensor, "B N D"] | None = None
    largest: Float[Tensor, "depth B K D"] | None = None
    summaries: Mapping[str, Tensor] = field(default_factory=dict)


class Recorder:
    """Collects one trace while the blocks run; one per forward pass.

    Args:
        config: of the model.
        grid: of the images.
        blocks, attention_from, facets, largest, summaries: as for `VisionTransformer.trace`.
        also: whether to keep `"activations"`, `"patches"` and `"hidden"` of these blocks.

    Raises:
        ValueError: a block, query or facet that the model or the image does not have.
    """

    def __init__(
        self,
        config: ViTConfig | ObservedConfig,
        grid: tuple[int, int],
        *,
        blocks: Iterable[int] | None,
        attention_from: Query | Sequence[Query] | None,
        facets: Sequence[Facet],
        also: Mapping[str, bool],
        largest: int,
        summaries: Mapping[str, Summary],
    ) -> None:
        self.config, self.grid, self.num_largest = config, grid, largest
        self.summaries = summaries
        self.summarized: dict[str, list[Tensor]] = {}
        depth = config.depth
        self.blocks = tuple(_block(b, depth) for b in (range(depth) if blocks is None else blocks))
        if unknown := [f for f in facets if f not in get_args(Facet)]:
            raise ValueError(f"facets {unknown} are unknown; choose from {', '.join(get_args(Facet))}")
        self.keep = {*facets, *(name for name, wanted in also.items() if wanted)}
        self.rows = _rows(config, grid, attention_from)
        self.embeddings: Tensor | None = None
        self.norms: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.largest: list[Tensor] = []
        self.kept: dict[str, list[Tensor]] = {}
        self._queries: Tensor | None = None
        self._lambda: Tensor | None = None
        self._bias: Tensor | None = None
        self._prefix: Tensor | None = None

    @property
    def _waiting(self) -> int:
        """Registers that the block that runs does not have yet."""
        return self.config.num_waiting(len(self.norms))

    @property
    def _copies(self) -> int:
        """Tokens that its attention sees before the sequence."""
        return 0 if self._waiting else self.config.num_attention_copies

    def wants(self, block: int) -> bool:
        """Whether anything inside this block is recorded (norms are taken from outside)."""
        return block in self.blocks and bool(self.rows or self.summaries or self.keep - {"patches", "hidden"})

    def record(self, name: str, value: Tensor) -> None:
        """Take what a block hands out while it runs."""
        whole = value if name in ("lambda", "bias", "prefix") else self._whole(value, (0, 0))
        if name in IN_HEADS:
            whole = whole[:, :, self._copies :]
        self._summarize(name, whole)
        if name == "lambda":
            self._lambda = value
        elif name == "bias":
            self._bias = value
        elif name == "prefix":
            self._prefix = value
        elif name == "queries" and self.rows:
            self._queries = value
        elif name == "keys" and self.rows:
            assert self._queries is not None
            self.attention.append(self._attention_rows(self._queries, value))
            # Not later: a view of q holds the memory of q, k and v, which the MLP is about to reuse.
            self._queries = None
        if name in self.keep:
            if name in IN_HEADS:
                whole = whole.transpose(1, 2).flatten(2)
            self.kept.setdefault(name, []).append(whole)

    def _whole(self, value: Tensor, inner: tuple[int, ...] = ()) -> Tensor:
        """With zeros for the registers that have not entered; `inner` is the padding of axes after the tokens'."""
        if not self._waiting:
            return value
        axis = -1 - len(inner) // 2
        before, after = value.tensor_split([self.config.test_time_registers.start], dim=axis)
        return torch.cat((F.pad(before, (*inner, 0, self._waiting)), after), dim=axis)

    def _summarize(self, name: str, value: Tensor) -> None:
        for key, (source, summary) in self.summaries.items():
            if source == name:
                self.summarized.setdefault(key, []).append(summary(value))

    def _attention_rows(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The rows asked for, `[B, H, Q, T]`; a register's share is that of all its copies."""
        place = self.config.test_time_registers
        copies, waiting = self._copies, self._waiting
        chosen = torch.tensor([row for row, _ in self.rows], device=keys.device)
        absent = (chosen >= place.start) & (chosen < place.stop) & bool(waiting)
        chosen = chosen + copies - waiting * (chosen >= place.stop)
        bias, fixed = self._bias, 0
        if self._prefix is not None:
            fixed = self._prefix.shape[1]
            keys = torch.cat((self._prefix.expand(len(keys), -1, -1, -1), keys), dim=2)
            bias, self._prefix = None if bias is None else F.pad(bias, (fixed, 0)), None
        if self._lambda is None:
            rows = attention_rows(queries, keys, chosen, bias)
        else:
            rows = differential_rows(queries, keys, chosen, self._lambda)
        rows = rows[..., fixed:]
        if copies:
            rows, of_copies = rows[..., copies:].clone(), rows[..., :copies]
            each = of_copies.unflatten(-1, (-1, self.config.num_test_time_registers)).sum(-2)
            rows[..., place] += each
        return self._whole(rows).masked_fill(absent[:, None], 0.0) if waiting else rows

    def after_block(self, block: int, x: Tensor) -> None:
        """Take the residual stream after a block."""
        self.norms.append(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32))
        if self.num_largest:
            patches, norms = self._split(x).patches, self._split(self.norms[-1].unsqueeze(-1)).patches
            top = norms.topk(min(self.num_largest, patches.shape[1]), dim=1).indices
            self.largest.append(patches.take_along_dim(top, dim=1))
        if block in self.blocks:
            self._summarize("stream", x)
        if "patches" in self.keep and block in self.blocks:
            self.kept.setdefault("patches", []).append(self._split(x).patches)
        if "hidden" in self.keep and block in self.blocks:
            self.kept.setdefault("hidden", []).append(x)

    def finish(self, tokens: Tokens) -> Trace:
        """Name the parts of everything that was recorded."""
        cls_norms, register_norms, patch_norms = self._parts(torch.stack(self.norms))
        kept = {name: self._in_order(values) for name, values in self.kept.items()}
        patches = kept.pop("patches", None)
        return Trace(
            tokens=tokens,
            blocks=self.blocks,
            patch_norms=patch_norms,
            cls_norms=cls_norms,
            register_norms=register_norms,
            attention=self._named_rows() if self.attention else None,
            patches=patches,
            embeddings=self.embeddings,
            largest=torch.stack(self.largest) if self.largest else None,
            summaries={name: self._in_order(values) for name, values in self.summarized.items()},
            **{name: self._split(value) for name, value in kept.items()},
        )

    def _named_rows(self) -> AttentionRows:
        to_cls, to_registers, to_patches = self._parts(self._in_order(self.attention))
        return AttentionRows(tuple(name for _, name in self.rows), to_patches, to_registers, to_cls)

    def _in_order(self, values: list[Tensor]) -> Tensor:
        """Blocks run from first to last; the caller may have asked for them in another order, or twice."""
        ran = sorted(set(self.blocks))
        if len(values) == 1 == len(self.blocks):
            return values[0].unsqueeze(0)
        return torch.stack([values[ran.index(block)] for block in self.blocks])

    def _parts(self, values: Float[Tensor, "*B T"]) -> tuple[Tensor | None, Tensor, Tensor]:
        """One number a token: of the class token, the registers and the patches, these by row and column."""
        parts = self._split(values.unsqueeze(-1))
        cls = None if parts.cls is None else parts.cls.squeeze(-1)
        return cls, parts.registers.squeeze(-1), parts.patches.squeeze(-1).unflatten(-1, self.grid)

    def _split(self, sequence: Tensor) -> Tokens:
        return Tokens.split(sequence, class_token=self.config.class_token, grid=self.grid, normed=False)


def _block(block: int, depth: int) -> int:
    if not -depth <= block < depth:
        raise ValueError(f"block {block} does not exist: the model has blocks 0 to {depth - 1} (or -1 for the last)")
    return block % depth


def _rows(
    config: ViTConfig | ObservedConfig, grid: tuple[int, int], attention_from: Query | Sequence[Query] | None
) -> list[tuple[int, str]]:
    """Position in the sequence and name of every query that was asked for."""
    rows: list[tuple[int, str]] = []
    for query in [] if attention_from is None else _listed(attention_from):
        if query == "cls":
            if not config.class_token:
                raise ValueError("the model has no class token to ask attention from; use patches or registers")
            rows.append((0, "class token"))
        elif query == "registers":
            if not config.num_registers:
                raise ValueError("the model has no registers to ask attention from; use 'cls' or patches")
            for r in range(config.num_registers):
                kind = "summary token" if r < config.num_summary_tokens else "register"
                rows.append((int(config.class_token) + r, f"{kind} {r + 1}"))
        else:
            row, column = _patch(query, grid)
            rows.append((config.num_prefix_tokens + row * grid[1] + column, f"patch ({row}, {column})"))
    return rows


def _listed(attention_from: Query | Sequence[Query]) -> list[Query]:
    """One query or several, as several; NumPy's and PyTorch's integers are queries, their vectors several."""
    if isinstance(attention_from, str):
        return [attention_from]
    try:
        number = operator.index(attention_from)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return list(attention_from)  # pyright: ignore[reportArgumentType]
    return [number]


def _patch(query: Query, grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of a patch given so, or by its number."""
    if isinstance(query, str):
        raise ValueError(f"attention_from {query!r} is unknown; choose 'cls', 'registers', or patches")
    if isinstance(query, Sequence):
        row, column = map(operator.index, query)
    else:
        row, column = divmod(operator.index(query), grid[1])
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise ValueError(f"patch {query} is outside the grid of {grid[0]} rows and {grid[1]} columns")
    return row, column
