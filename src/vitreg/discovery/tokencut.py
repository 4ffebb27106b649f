"""TokenCut: an object is one side of the normalized cut of the patches' graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse.linalg
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitreg.common.devices import precise
from vitreg.discovery.lost import check_features, upper_triangle
from vitreg.discovery.region import Region, region_of_seed

TAU = 0.2
"""Least cosine of an edge; the value of the repository's runner, `main_tokencut.py`."""
EPS = 1e-5
"""Weight of all other edges, so that the graph is connected."""

# A graph of so many entries is kept (half of them, in float64: 64 MB); a larger one is computed for every product.
_KEPT_ENTRIES = 2**24
# Patches with equal edges have equal coordinates, rounding apart; the first of them is the seed.
_TIE = 1e-6


def tokencut(features: Float[Tensor, "N D"], grid: tuple[int, int], *, bias: float = 0.0) -> Region:
    """The object of one image (Wang et al., CVPR 2022, arXiv 2202.11539; `YangtaoWANG95/TokenCut`).

    Patches whose cosine (plus `bias`) exceeds `TAU` are joined by an edge of weight 1, all others by one of `EPS`.
    `cut_coordinates` is cut at its mean. The seed is the patch farthest from 0, its side is the foreground, and the
    object is the foreground's 4-connected component that holds the seed. Where no partition is better than another (a
    image of equal patches) the object is everything.

    Args:
        features: one row per patch, row by row; they are normalized here.
        grid: (rows, columns).
        bias: added to every cosine.

    Returns:
        The region; its `degree` counts the edges of weight 1 to other patches.

    Raises:
        ValueError: the features are not finite or do not fill the grid.
    """
    check_features(features, grid)
    graph = Graph(torch.nn.functional.normalize(features.float(), dim=-1), TAU - bias)
    degree = torch.from_numpy(graph.edges - graph.loops()).long()
    cut = cut_coordinates(graph)
    if cut is None:
        return region_of_seed(0, torch.ones(len(features), dtype=torch.bool), degree, grid)
    size = np.abs(cut)
    seed = int(np.flatnonzero(size >= (1 - _TIE) * size.max())[0])
    mask = cut > cut.mean()
    return region_of_seed(seed, torch.from_numpy(mask if mask[seed] else ~mask), degree, grid)


class Graph:
    """The zeros and ones `f_p . f_q > threshold`, known by their products with vectors.

    Attributes:
        edges: ones in each row.
    """

    def __init__(self, features: Float[Tensor, "N D"], threshold: float) -> None:
        self.features, self.threshold = features, threshold
        self.dtype = precise(features.device)
        self._kept: list[tuple[int, int, Tensor]] | None = None
        if len(features) ** 2 <= _KEPT_ENTRIES:
            self._kept = list(self._chunks())
        self.edges = self.times(np.ones(len(features)))

    def _chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop, gram in upper_triangle(self.features):
            yield start, stop, gram.gt_(self.threshold).to(self.dtype, copy=True)

    def times(self, vector: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
        """The product with a vector, from the upper triangle."""
        x = torch.from_numpy(vector).to(self.features.device, self.dtype)
        y = torch.zeros_like(x)
        for start, stop, rows in self._kept or self._chunks():
            y[start:stop] += rows @ x[start:]
            y[stop:] += rows[:, stop - start :].T @ x[start:stop]
        return y.cpu().double().numpy()

    def loops(self) -> Float64[np.ndarray, " N"]:
        """Which patches have an edge to themselves, 1 or 0."""
        return (self.features.square().sum(1) > self.threshold).cpu().double().numpy()


def cut_coordinates(graph: Graph) -> Float64[np.ndarray, " N"] | None:
    """The second smallest solution of `(D - E) x = lambda D x`, E being 1 on the graph's edges and `EPS` elsewhere.

    The equivalent symmetric problem, the largest eigenvector of `D^-1/2 E D^-1/2` beside the known first,
    `D^1/2 1`, is solved by Lanczos iterations (ARPACK), which need products with E alone: memory is linear in N.

    Returns:
        The solution up to its sign, None where all are equally good: every patch has an edge to every other, or none.
    """
    edges, num = graph.edges, len(graph.edges)
    if edges.min() == edges.max() and edges[0] in (0, 1, num):
        return None
    root = np.sqrt(EPS * num + (1 - EPS) * edges)
    first = root / np.linalg.norm(root)

    def product(y: np.ndarray) -> np.ndarray:
        y = y.ravel()
        x = (y - first * (first @ y)) / root
        image = (EPS * x.sum() + (1 - EPS) * graph.times(x)) / root
        return image - first * (first @ image)

    operator = scipy.sparse.linalg.LinearOperator((num, num), product, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    start = np.random.default_rng(0).standard_normal(num)
    _, second = scipy.sparse.linalg.eigsh(operator, k=1, which="LA", v0=start)
    return second[:, 0] / root
