"""`torch.compile` without a graph break, in a process of its own, as the tests' shape checks do not trace."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

SCRIPT = textwrap.dedent(
    """
    import sys, timm, torch
    from vitreg import Tokens, from_timm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(sys.argv[1], depth=2, embed_dim=96, num_heads=3, num_classes=5).eval()
    vit = from_timm(model)
    patch = vit.config.patch_size
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    for rows, columns in ((4, 4), (5, 6), (6, 5)):
        images = torch.randn(2, 3, rows * patch, columns * patch)
        with torch.no_grad():
            ours, expected = compiled(images), vit(images)
        assert isinstance(ours, Tokens) and ours.grid == (rows, columns), ours
        torch.testing.assert_close(ours.sequence(), expected.sequence(), rtol=1e-4, atol=1e-5)
    # Training at one size: PyTorch 2.15 cannot compile the gradient of an antialiased resize for any size.
    torch._dynamo.reset()
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager", dynamic=False)
    compiled(images).patches.square().sum().backward()
    assert vit.patch_embed.weight.grad.abs().sum() > 0
    """
)


ARCHITECTURES = ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb", "vit_dpwee_patch16_reg1_gap_256"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_compiles_as_one_graph(architecture):
    run = subprocess.run([sys.executable, "-c", SCRIPT, architecture], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
