"""timm's models as the fixture `narrow` builds them, and their tokens compared."""

from __future__ import annotations

import timm
import torch
from torch import Tensor

from peers import TOLERANCE, perturb, token_errors


def small(architecture: str, **options):
    """A perturbed timm model as its name alone builds it here."""
    return perturb(timm.create_model(architecture, **{"num_classes": 0, "dynamic_img_size": True, **options}))


@torch.no_grad()
def check(vit, model, images: Tensor, tolerance: float = TOLERANCE) -> None:
    """Every token equals the timm model's."""
    found = token_errors(vit(images), model.forward_features(images), model)
    assert max(found.values()) <= tolerance, found
