"""Is a foreign module the model that a fix was made from?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vitreg.checkpoints.to_timm import snap
from vitreg.common.words import counted
from vitreg.model import VisionTransformer

AFTER_BLOCKS = ("norm.", "fc_norm.", "attention_pool.", "head.")
"""Weights that no register depends on: a model may have another head than the one that was fixed."""

FREE = (
    *("name", "architecture", "changes", "preprocess", "image_size", "position_interpolation"),
    *("pool", "pool_heads", "pool_mlp_dim", "pool_dim", "final_norm", "fc_norm", "num_classes", "head_bias"),
    *("num_registers", "num_test_time_registers", "register_neurons", "register_weight", "register_start"),
)
"""Fields of the config in which both may differ likewise; the weights tell another size."""


def check_plain(model: nn.Module) -> None:
    """Whether a module is as its library made it.

    Raises:
        ValueError: it is compiled, sharded, quantized, or has no weights.
    """
    for name, module in model.named_modules():
        kind = type(module)
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"{name or 'the model'} is compiled; install registers first, then compile")
        odd = [p for p in module.parameters(recurse=False) if type(p.data) is not Tensor or not p.is_floating_point()]
        if odd or kind.__module__.startswith("bitsandbytes") or ".quantized" in kind.__module__:
            what = type(odd[0].data).__name__ if odd and type(odd[0].data) is not Tensor else kind.__name__
            raise ValueError(
                f"{name or 'the model'} is quantized or sharded ({what}); install registers into the model it was made "
                f"from, then quantize or shard that"
            )
        if any(p.is_meta for p in module.parameters(recurse=False)):
            raise ValueError(f"{name or 'the model'} has no weights yet (device meta); load them first")


def check_same(original: VisionTransformer, fixed: VisionTransformer) -> None:
    """Whether a fix is of this model: all before the end of the last block must be equal, but for rounding.

    Raises:
        ValueError: it is of another model, or has no registers that this one lacks.
    """
    own, has = original.num_registers, fixed.num_registers
    advice = "convert this model with vitreg.from_timm, from_transformers or from_open_clip and fix that"
    if has <= own:
        raise ValueError(
            f"fixed has {counted(has, 'register')}, as many as the model itself; give a model that "
            f"add_test_time_registers or add_registers added some to"
        )
    ours, theirs = fixed.config, original.config
    if ours.rope and theirs.rope:
        ours = replace(ours, rope=snap(ours.rope, theirs.rope))
    a, b = ours.to_dict(), theirs.to_dict()
    if different := [f"{name} {a[name]} is {b[name]} there" for name in a if name not in FREE and a[name] != b[name]]:
        raise ValueError(f"fixed was not made from this model: its {', its '.join(different[:3])}; {advice}")
    expected, state = fixed.state_dict(), original.state_dict()
    expected["registers"] = expected["registers"][:, :own]
    state.setdefault("registers", expected["registers"])  # where the model has none
    names = [name for name in expected if not name.startswith(AFTER_BLOCKS)]
    if different := [name for name in names if not _same_weight(expected[name], state.get(name))]:
        raise ValueError(
            f"fixed was not made from this model: {len(different)} of {len(names)} weights differ, for example "
            f"{different[0]}; {advice}"
        )


def _same_weight(ours: Tensor, theirs: Tensor | None) -> bool:
    """Equal, or in different precision as near as the coarser one can be."""
    if theirs is None or ours.shape != theirs.shape:
        return False
    ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
    if ours.dtype == theirs.dtype:
        return torch.equal(ours, theirs)
    rounding = max(torch.finfo(ours.dtype).eps, torch.finfo(theirs.dtype).eps)
    return torch.allclose(ours.float(), theirs.float(), rtol=2 * rounding, atol=rounding * float(theirs.abs().max()))
