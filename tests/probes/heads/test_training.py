"""The loop that heads are trained in: where it goes on, ends and reports."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from vitreg.probes.heads.training import cosine, descend, fit, shuffled


def order(number: int) -> torch.Tensor:
    return torch.randperm(10, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("batch_size", [3, 10, 24])
def test_batches_go_through_one_pass_after_another_and_go_on_where_they_were(batch_size):
    whole = list(shuffled(order, 10, batch_size, 9))
    assert [len(batch) for batch in whole] == [batch_size] * 9
    seen = torch.cat(whole)
    passes = torch.cat([order(number) for number in range(len(seen) // 10 + 1)])
    assert torch.equal(seen, passes[: len(seen)])
    for done in range(9):
        left = list(shuffled(order, 10, batch_size, 9, done))
        assert all(torch.equal(one, other) for one, other in zip(left, whole[done:], strict=True))


def test_what_must_be_kept_is_kept_before_progress_is_told_and_training_may_end_early():
    told: list[object] = []
    fit(
        iter([[1, 2], [3], [4]]),
        told.append,
        5,
        done=2,
        ends=lambda epoch: told.append(f"kept {epoch}") or epoch == 4,
        on_progress=lambda *done: told.append(done),
    )
    assert told == [1, 2, "kept 3", (3, 5), 3, "kept 4", (4, 5)]


def test_the_cosine_is_that_of_torch():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = CosineAnnealingLR(optimizer, 7)
    for step in range(7):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(cosine(step, 7))
        descend(3 * parameter.sum(), optimizer, schedule, clip=0.5)
    assert parameter.item() == pytest.approx(-0.5 * sum(cosine(step, 7) for step in range(7)))
