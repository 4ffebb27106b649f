"""The attention of blocks whose code is not ours, taken from the calls that they make to PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitreg.model.attention import attention_rows

SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}


class AttentionCalls(TorchFunctionMode):
    """While it is entered, keeps the attention rows of chosen tokens wherever all tokens attend to all.

    These are calls of the fused kernel, of a softmax over a square of all tokens, or of multi-head attention.

    Args:
        batch, num_tokens: of the stream; attention within windows has other sizes and is not kept.
        rows: the tokens whose rows are kept.
        order: of the tokens they attend to; None for the module's own.
    """

    def __init__(self, batch: int, num_tokens: int, rows: Int[Tensor, " Q"], order: Int[Tensor, " T"] | None) -> None:
        super().__init__()
        self.kept: list[Float[Tensor, "B H Q T"]] = []
        self._batch, self._num_tokens, self._rows, self._order = batch, num_tokens, rows, order

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            out, weights = func(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})
            self._keep_rows(weights)
            return out, weights if kwargs.get("need_weights", True) else None
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._keep_products(*args, **kwargs)
        elif func in SOFTMAX and isinstance(output, Tensor):
            self._keep_rows(output)
        return output

    def _keep_products(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.ndim != 4 or not self._of_all(query.shape) or not self._of_all(key.shape) or is_causal:
            return
        if key.shape[1] != query.shape[1]:  # groups of heads share their keys
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        if attn_mask is None:
            usual = query.shape[-1] ** -0.5
            scaled = query if scale is None or scale == usual else query * (scale / usual)
            return self._keep(attention_rows(scaled, key, self._rows.to(key.device)))
        rows = self._rows.to(key.device)
        scores = query[:, :, rows].float() @ key.float().transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        mask = attn_mask.expand(*attn_mask.shape[:-2], self._num_tokens, self._num_tokens)[..., rows, :]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        self._keep(scores.softmax(-1))

    def _keep_rows(self, weights: Tensor) -> None:
        square = weights.ndim == 4 and weights.shape[-1] == weights.shape[-2]
        if square and self._of_all(weights.shape):
            self._keep(weights[:, :, self._rows.to(weights.device)].float())

    def _of_all(self, shape: Sequence[int]) -> bool:
        return shape[0] == self._batch and shape[2] == self._num_tokens

    def _keep(self, rows: Tensor) -> None:
        self.kept.append(rows if self._order is None else rows[..., self._order.to(rows.device)])
