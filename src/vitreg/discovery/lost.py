"""LOST: an object is what is similar to the patch that is similar to the fewest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitreg.common.devices import precise
from vitreg.discovery.region import Region, region_of_seed

# Rows of the Gram matrix at a time: on a CPU what stays in its cache, on a GPU what keeps it busy (256 MB).
_CPU_ROWS = 256
_GPU_ENTRIES = 2**26


def lost(
    features: Float[Tensor, "N D"],
    grid: tuple[int, int],
    *,
    bias: float = 0.0,
    k_patches: int = 100,
    allowed: Bool[Tensor, " N"] | None = None,
) -> Region:
    """The object of one image (Simeoni et al., BMVC 2021, arXiv 2109.14279, section 3; `valeoai/LOST`).

    With the Gram matrix `A = F F^T + bias`:

    1. the degree of a patch is the number of *other* patches with `A > 0`; the seed has the smallest;
    2. the expansion set holds those of the `k_patches` lowest-degree patches with `A > 0` to the seed;
    3. the mask holds the patches whose entries of `A`, summed over the expansion set, are positive;
    4. the object is the 4-connected component of the mask that holds the seed.

    Equal degrees go by position, row by row from the top left. Where the seed is not in the mask (its component
    does not exist, and the reference code raises) the object is the seed alone.

    `A` never exists: degrees are counted in chunks of its upper triangle, and step 3 is linear in the features,
    `A[S].sum(0) = F (F[S].sum(0)) + bias |S|`. Products are float32, but for step 2 and the sum over S, which are
    float64.

    Args:
        features: one row per patch, row by row.
        grid: (rows, columns).
        bias: added to every entry of the Gram matrix.
        k_patches: all patches where there are fewer.
        allowed: patches that take part; the others have degree 0 and belong to no object.

    Raises:
        ValueError: the features are not finite or do not fill the grid, no patch is allowed, or `k_patches` is below 1.
    """
    check_features(features, grid)
    if k_patches < 1:
        raise ValueError(f"k_patches is {k_patches}; it must be at least 1")
    indices = torch.arange(len(features), device=features.device) if allowed is None else allowed.nonzero()[:, 0]
    if not len(indices):
        raise ValueError("no patch is left to discover an object in")
    features = features.float() if allowed is None else features[indices].float()
    degree = degrees(features, bias)
    lowest = degree.argsort(stable=True)[:k_patches]
    candidates = features[lowest].to(precise(features.device))
    members = candidates[candidates @ candidates[0] + bias > 0]
    mask = features @ members.sum(0).float() + bias * len(members) > 0
    if allowed is not None:
        degree, mask = (torch.zeros(len(allowed)).to(part).scatter(0, indices, part) for part in (degree, mask))
    return region_of_seed(int(indices[lowest[0]]), mask, degree, grid)


def check_features(features: Float[Tensor, "N D"], grid: tuple[int, int]) -> None:
    """Raise `ValueError` unless the features are finite and fill the grid."""
    if len(features) != grid[0] * grid[1]:
        raise ValueError(f"{len(features)} features do not fill a grid of {grid[0]} x {grid[1]} patches")
    # The sum is a fast test that finite features fail only where it overflows.
    if not features.sum().isfinite() and not features.isfinite().all():
        raise ValueError("features hold NaN or infinity; run the model in float32 or bfloat16")


def degrees(features: Float[Tensor, "N D"], bias: float = 0.0) -> Int64[Tensor, " N"]:
    """For each patch the number of other patches with `f_p . f_q + bias > 0`; memory linear in N."""
    counts = torch.zeros(len(features), device=features.device)
    for start, stop, gram in upper_triangle(features):
        # In place: floating-point ones and zeros are summed many times faster than booleans.
        gram.gt_(-bias).fill_diagonal_(0)
        counts[start:stop] += gram.sum(1)
        counts[stop:] += gram[:, stop - start :].sum(0)
    return counts.long()


def upper_triangle(features: Float[Tensor, "N D"]) -> Iterator[tuple[int, int, Float[Tensor, "rows columns"]]]:
    """Chunks of the Gram matrix: rows `start` to `stop`, columns from `start` on. Each is overwritten by the next."""
    num, device = len(features), features.device
    rows = min(num, _CPU_ROWS if device.type == "cpu" else max(1, _GPU_ENTRIES // num))
    memory = torch.empty(rows * num, device=device)
    for start in range(0, num, rows):
        stop = min(start + rows, num)
        gram = memory[: (stop - start) * (num - start)].view(stop - start, num - start)
        yield start, stop, torch.mm(features[start:stop], features[start:].T, out=gram)
