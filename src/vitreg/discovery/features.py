"""The features that discovery compares: which tensor of which block, centered or not, of unit length or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.common.devices import precise
from vitreg.discovery.protocol import FACETS
from vitreg.model import VisionTransformer


def patch_features(
    vit: VisionTransformer, images: Float[Tensor, "B 3 H W"], facets: Iterable[str], blocks: Sequence[int]
) -> dict[tuple[str, int], Float[Tensor, "B N D"]]:
    """The patches' features from one forward pass, for every facet and block.

    Queries, keys and values are as they enter the softmax (after q/k norm and RoPE), heads side by side. `"tokens"`
    are the hidden states after the block and the model's final norm: for the last block what `vit(images)` returns.

    Raises:
        ValueError: a facet or block that the model does not have.
    """
    wanted = set(facets)
    with torch.inference_mode():
        trace = vit.trace(
            images,
            blocks=blocks,
            facets=[facet for facet in ("keys", "queries", "values") if facet in wanted],
            patches="tokens" in wanted,
        )
        found: dict[tuple[str, int], Tensor] = {}
        for facet in sorted(wanted):
            recorded = getattr(trace, "patches" if facet == "tokens" else facet)
            if recorded is None:
                raise ValueError(f"the model has no {facet}; choose another of {', '.join(FACETS)}")
            for i, block in enumerate(blocks):
                found[facet, block] = vit.norm(recorded[i]) if facet == "tokens" else recorded.patches[i]
    return found


def condition(features: Float[Tensor, "*B N D"], *, normalize: bool, center: bool) -> Float[Tensor, "*B N D"]:
    """Features as they are compared, in float32.

    Args:
        features: one row per patch.
        normalize: divide by the L2 norm (Jiang et al., arXiv 2506.08010: helps every method).
        center: subtract the mean over the image's patches first (Bach et al., TMLR 2025).
    """
    features = features.float()
    if center:
        # In float64 the mean of equal features is exactly these, so that nothing is left to blow up to unit length.
        exact = features.to(precise(features.device))
        features = (exact - exact.mean(-2, keepdim=True)).float()
    return torch.nn.functional.normalize(features, dim=-1) if normalize else features
