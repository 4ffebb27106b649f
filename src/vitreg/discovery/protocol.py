"""The documented settings that figures are reported with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Facet = Literal["keys", "queries", "values", "tokens"]
FACETS: tuple[Facet, ...] = get_args(Facet)
Method = Literal["lost", "tokencut"]
Axis = Literal["blocks", "facets", "normalize", "center", "bias"]
"""What a sweep can go over."""


@dataclass(frozen=True)
class Protocol:
    """What is compared, and how. The defaults are the protocol for every model (docs/discovery.md: how it was chosen).

    Attributes:
        facet: queries, keys or values of the block's attention, or the tokens after the block.
        block: counted from 0, negative from the end.
        normalize: divide features by their L2 norm.
        center: subtract the mean feature of the image first.
        bias: added to every entry of the Gram matrix.
        k_patches: size of the set that the seed is expanded from.
    """

    facet: Facet = "keys"
    block: int = -2
    normalize: bool = True
    center: bool = True
    bias: float = 0.05
    k_patches: int = 100


DEFAULT = Protocol()
