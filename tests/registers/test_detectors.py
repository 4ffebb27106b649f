"""Rows that make hidden units fire on some tokens, as strongly as wanted, and on no other."""

from __future__ import annotations

import pytest
import torch

import vitreg
from vitreg.model.block import Mlp
from vitreg.registers.detectors import teach


def tokens(generator: torch.Generator, num: int, center: torch.Tensor) -> torch.Tensor:
    return torch.randn(num, len(center), generator=generator) * torch.linspace(0.1, 2, len(center)) + center


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_other_tokens_of_the_same_kind(activation, gated):
    options = {"depth": 1, "num_heads": 1, "patch_size": 14, "image_size": (28, 28)}
    mlp = Mlp(vitreg.ViTConfig(embed_dim=32, mlp_dim=24, activation=activation, gated_mlp=gated, **options))
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    generator, center = torch.Generator().manual_seed(0), torch.zeros(32)
    center[:2] = 3
    slopes = torch.tensor([[0.2, -0.1, 0.0]])  # what is wanted follows the tokens
    signs = torch.tensor([1.0, 1.0, -1.0 if gated else 0.1])

    def wanted(of: torch.Tensor) -> torch.Tensor:
        return (torch.tensor([40.0, 5.0, 1.0]) + of[:, -1:] * slopes) * signs

    on, off = tokens(generator, 400, center), tokens(generator, 4000, torch.zeros(32))
    teach(mlp, torch.tensor([3, 20, 7]), on, off, wanted(on))

    seen: list[torch.Tensor] = []
    mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., [3, 20, 7]]))
    on, off = tokens(generator, 100, center), tokens(generator, 1000, torch.zeros(32))
    mlp(on[None]), mlp(off[None])
    scale = wanted(on).abs().mean(0)
    assert ((seen[0] - wanted(on)).abs() < 0.12 * scale + 0.3).all()
    assert (seen[1].abs() < 0.1).all()

    rows = torch.tensor([3, 20, 7, *([27, 44, 31] if gated else [])])
    changed = (mlp.fc1.weight != before["fc1.weight"]).any(1).nonzero().flatten()
    assert changed.tolist() == rows.sort().values.tolist()
    assert all(torch.equal(mlp.state_dict()[name], before[name]) for name in ("fc2.weight", "fc2.bias"))
