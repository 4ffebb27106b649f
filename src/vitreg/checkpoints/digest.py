"""A name for weights: a file may be replaced between two runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from vitreg.model import ViTConfig


def digest(config: ViTConfig, weights: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits that change with any weight or field of the config."""
    found = hashlib.blake2b(digest_size=16)
    found.update(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for tensor in weights.values():
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
