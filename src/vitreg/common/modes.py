"""Modules in evaluation mode, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every part of the modules is in the mode it was in."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    if any(was_training for _, was_training in modes):  # setting hundreds of modes takes a hundredth of a small pass
        for module in modules:
            module.eval()
    try:
        yield
    finally:
        for part, was_training in modes:
            if part.training != was_training:
                part.training = was_training
