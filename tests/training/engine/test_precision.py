"""What is computed in bfloat16, and what is not."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing

from peers import error
from training.precision_ranks import run


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run, (2, folder), nprocs=2)
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["clip", "dinov2"])
def test_fsdp_in_bfloat16_rounds_no_logit_scale_prototypes_or_registers(found, recipe):
    """All of these were gathered in bfloat16, and the residual stream with them: 1 / 0.07 was 14.24."""
    ours, theirs = found[f"{recipe}-fsdp"], found[f"{recipe}-ddp"]
    assert (ours["registers"], ours["matrices"]) == (torch.float32, torch.bfloat16)
    assert (theirs["registers"], theirs["matrices"]) == (torch.float32, torch.float32)
    # As they enter the first block.
    assert ours["tokens"].dtype == torch.float32
    assert torch.equal(ours["tokens"], theirs["tokens"])
    for name in ("loss", "logit_scale") if recipe == "clip" else ("loss", "dino", "ibot"):
        # The blocks' norms are rounded.
        tolerance = {"rel": 1e-4} if name == "logit_scale" else {"rel": 5e-3, "abs": 1e-2}
        assert ours["log"][name] == pytest.approx(theirs["log"][name], **tolerance), name
    for name in ("registers", "cls_token", "pos_embed", "blocks.1.mlp.fc1.weight"):
        assert error(ours["weights"][name], theirs["weights"][name]) < 1e-2, name
