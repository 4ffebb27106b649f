"""The Transformer block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vitreg.model.attention import Attention, Position, Record
from vitreg.model.config import ViTConfig
from vitreg.model.differential import DifferentialAttention
from vitreg.model.norm import block_norm, norm_layer

Subset = tuple[Int[Tensor, " _"], float]
"""The images of a batch that take a branch, in order, and the factor of what it adds to them (stochastic depth)."""


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
    """Two linear layers; with `gated_mlp`, `fc1` holds the gate's rows first and the value's after them.

    The activations of register neurons are moved: per image and per unit, the strongest over all tokens goes to the
    test-time registers, and zero to every other token ("Vision Transformers Don't Need Trained Registers", Jiang et
    al., arXiv 2506.08010, Algorithm 2).
    """

    register_neurons: Tensor | None

    def __init__(self, config: ViTConfig, register_neurons: tuple[int, ...] = (), hidden: int = 0) -> None:
        super().__init__()
        hidden = hidden or config.mlp_dim
        self.gated = config.gated_mlp
        self.signed = config.signed_units
        self.test_time_registers = config.test_time_registers
        # Not on the meta device, from which weights are assigned but buffers are not.
        neurons = torch.tensor(register_neurons, device="cpu") if register_neurons else None
        self.register_buffer("register_neurons", neurons, persistent=False)
        self.fc1 = nn.Linear(config.embed_dim, hidden * (1 + self.gated), bias=config.mlp_bias)
        self.act = activation(config.activation)
        self.norm = norm_layer(config, hidden) if config.mlp_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, config.embed_dim, bias=config.mlp_bias)

    def forward(self, x: Float[Tensor, "B T D"], record: Record | None = None) -> Float[Tensor, "B T D"]:
        """`record` receives the hidden units, a neuron writes its value times a column of `fc2`, and the output."""
        x = self.fc1(x)
        if self.gated:
            gate, value = x.chunk(2, dim=-1)
            x = self.act(gate) * value
        else:
            x = self.act(x)
        x = self.norm(x)
        if self.register_neurons is not None:
            x = move_activations(x, self.register_neurons, self.test_time_registers, signed=self.signed)
        if record is not None:
            record("activations", x)
        x = self.fc2(x)
        if record is not None:
            record("mlp", x)
        return x


def move_activations(
    x: Float[Tensor, "B T F"],
    neurons: Int[Tensor, " K"],
    registers: slice,
    *,
    signed: bool,
    valid: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T F"]:
    """Move the strongest activation of each register neuron, over all tokens, to the test-time registers; in place.

    Args:
        x: hidden units of every token.
        neurons: which units.
        registers: where in the sequence the test-time registers are.
        signed: whether units may be negative (`ViTConfig.signed_units`): then the largest magnitude is the strongest.
        valid: false at padding, which has no say; the first token is never padding.
    """
    units = x[..., neurons]
    seen = units if valid is None else torch.where(valid[..., None], units, units[:, :1])
    strongest = seen.amax(1, keepdim=True)
    if signed:
        lowest = seen.amin(1, keepdim=True)
        strongest = torch.where(-lowest > strongest, lowest, strongest)
    moved = torch.zeros_like(units)
    moved[:, registers] = strongest
    # In place: a copy of all units would cost more than the rest of the fix, and no derivative needs the old ones.
    return x.index_copy_(-1, neurons, moved)


class Block(nn.Module):
    """Pre-norm Transformer block: `x + s1 attn(norm1(x))`, then `x + s2 mlp(norm2(x))`.

    With `post_norm`, the norms take what the branches give: `x + s1 norm1(attn(x))`.
    With `parallel`, both branches read `norm1(x)` and share one scale (ViT-22B, arXiv 2302.05442).

    A test-time register stands for the several artifacts of an image, each of which had a share in the softmax. With a
    `register_weight` of w, attention sees it w times: what w equal registers would do, without their cost elsewhere.

    Args:
        config: the architecture.
        index: number of the block, on which register neurons, prefix and differential attention depend.
    """

    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        self.parallel, self.post_norm = config.parallel, config.post_norm
        self.test_time_registers = config.test_time_registers
        self.num_copies = 0 if config.num_waiting(index) else config.num_attention_copies
        self.norm1 = block_norm(config)
        self.attn = (DifferentialAttention if config.differential else Attention)(config, index)
        self.mlp = Mlp(config, tuple(unit for block, unit in config.register_neurons if block == index))
        self.ls1 = nn.Parameter(torch.empty(config.embed_dim)) if config.layer_scale else None
        self.norm2 = self.ls2 = None
        if not self.parallel:
            self.norm2 = block_norm(config)
            self.ls2 = nn.Parameter(torch.empty(config.embed_dim)) if config.layer_scale else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        position: Position | None = None,
        record: Record | None = None,
        subsets: tuple[Subset, Subset] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """One step of the residual stream.

        Args:
            x: the tokens.
            position: of the patches.
            record: sees the intermediates of attention and MLP.
            subsets: the images that take the first branch and those that take the second; all of them by default.
        """
        first, second = subsets or (None, None)
        x = _add(x, lambda part: self._attention_branch(part, position, record), self.ls1, first)
        if self.norm2 is None:
            return x
        norm2 = self.norm2
        if self.post_norm:
            return _add(x, lambda part: norm2(self.mlp(part, record)), self.ls2, second)
        return _add(x, lambda part: self.mlp(norm2(part), record), self.ls2, second)

    def _attention_branch(self, x: Tensor, position: Position | None, record: Record | None) -> Tensor:
        """Attention; with `parallel` both branches in one."""
        normed = x if self.post_norm else self.norm1(x)
        branch = self._attend(normed, position, record) if self.num_copies else self.attn(normed, position, record)
        if self.post_norm:
            return self.norm1(branch)
        return branch + self.mlp(normed, record) if self.parallel else branch

    def _attend(self, normed: Tensor, position: Position | None, record: Record | None) -> Tensor:
        """Attention in which test-time registers count several times; their copies come first."""
        registers = normed[:, self.test_time_registers]
        copies = registers.repeat(1, self.num_copies // registers.shape[1], 1)
        return self.attn(torch.cat((copies, normed), dim=1), position, record)[:, self.num_copies :]


def _add(x: Tensor, branch: Callable[[Tensor], Tensor], scale: Tensor | None, subset: Subset | None) -> Tensor:
    """Residual addition; LayerScale in the same pass over memory. What is not in the subset costs nothing."""
    if subset is None:
        return x + branch(x) if scale is None else torch.addcmul(x, branch(x), scale)
    images, factor = subset
    added = branch(x.index_select(0, images))
    added = added if scale is None else added * scale
    return x.index_add(0, images, added.to(x.dtype), alpha=factor)
