"""Rows of `fc1` that make hidden units fire on registers, as strongly as wanted, and on no other token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitreg.model.block import Mlp

SHRINKAGE = 0.01
"""Added to the variances of the tokens, in mean variances: with few images the rows would fit these only."""

RIDGE = 1.0
"""Weight of the rows' squares, in units of the tokens' deviations and of what is wanted. Much less follows what is
wanted on these images to the digit, and misses it on others."""

MARGIN, LEAST_MARGIN = 0.3, 4.0
"""So far below zero other tokens are to enter the non-linearity: as a part of what is wanted, and at least."""

GATE = 20.0
"""What is wanted of a gate on registers; the non-linearity leaves it as it is."""


@torch.no_grad()
def teach(
    mlp: Mlp,
    units: Int[Tensor, " K"],
    on: Float[Tensor, "N D"],
    off: Float[Tensor, "M D"],
    wanted: Float[Tensor, "N K"],
) -> None:
    """Change the rows of hidden units, in place, so that the units are `wanted` on some tokens and zero on others.

    Args:
        mlp: without a norm, with biases.
        units: which.
        on: tokens as they enter the MLP.
        off: the others.
        wanted: what is to enter `fc2` on the tokens `on`.
    """
    units = units.to(on.device)
    if mlp.gated:
        # A gate that knows registers from other tokens, and a value that is right on registers.
        gate = torch.full_like(wanted, GATE)
        _write(mlp.fc1, units + mlp.fc1.out_features // 2, _fit(on, off, wanted / mlp.act(gate), apart=False))
        entering = gate
    else:
        entering = wanted.clamp(min=0)
        for _ in range(20):  # inverts the non-linearity, whose slope there is between 0.4 and 1.2
            entering = entering + wanted.clamp(min=0) - mlp.act(entering)
    _write(mlp.fc1, units, _fit(on, off, entering, apart=True))


def _write(fc1: nn.Linear, rows: Int[Tensor, " K"], fitted: tuple[Tensor, Tensor]) -> None:
    weight, bias = fitted
    fc1.weight[rows], fc1.bias[rows] = weight.to(fc1.weight), bias.to(fc1.bias)


def _fit(
    on: Float[Tensor, "N D"], off: Float[Tensor, "M D"], wanted: Float[Tensor, "N K"], *, apart: bool
) -> tuple[Float[Tensor, "K D"], Float[Tensor, " K"]]:
    """Weight and bias of linear functions: a ridge regression on the tokens `on`, with a squared hinge on those `off`.

    It is convex, in coordinates in which the tokens' covariance within both classes is one.
    """
    mean = off.mean(0)
    within = on.T.cov() + off.T.cov()
    within.diagonal().add_(SHRINKAGE * within.diagonal().mean())
    whiten = torch.linalg.inv(torch.linalg.cholesky(within)).T
    on, off = (on - mean) @ whiten, (off - mean) @ whiten
    scale = wanted.square().mean(0).sqrt().clamp(min=torch.finfo(wanted.dtype).eps)
    wanted = wanted / scale
    margin = (LEAST_MARGIN / scale).clamp(min=MARGIN)

    with torch.enable_grad():
        center = on.mean(0)
        slope = (1 + margin) / (center.square().sum() + 1) if apart else torch.zeros_like(margin)
        weight = (center[:, None] * slope).requires_grad_()
        bias = (-margin if apart else torch.ones_like(margin)).clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            total = (on @ weight + bias - wanted).square().sum() / len(on) + RIDGE * weight.square().sum()
            if apart:
                total = total + (off @ weight + bias + margin).clamp(min=0).square().sum() / len(on)
            total.backward()
            return total

        optimizer.step(loss)
    weight = whiten @ (weight.detach() * scale)
    return weight.T, bias.detach() * scale - mean @ weight
