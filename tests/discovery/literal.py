"""LOST and the normalized cut as their papers write them down: whole matrices, no shortcuts."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor


def literal_lost(features: Tensor, grid: tuple[int, int], bias: float = 0.0, k_patches: int = 100):
    """Seed, mask, degrees and box in patches (x0, y0, x1, y1), after Simeoni et al. 2021, section 3."""
    gram = features @ features.T + bias
    others = gram.clone().fill_diagonal_(0)
    degree = (others > 0).sum(1).tolist()
    order = sorted(range(len(degree)), key=lambda p: (degree[p], p))
    seed = order[0]
    members = [p for p in order[:k_patches] if gram[seed, p] > 0]
    total = torch.zeros(len(features), dtype=features.dtype)
    for p in members:
        total = total + gram[p]
    foreground = (total > 0).reshape(grid).tolist()
    # The 4-connected component of the seed, by flooding.
    row, column = divmod(seed, grid[1])
    component, frontier = {(row, column)}, [(row, column)] if foreground[row][column] else []
    while frontier:
        r, c = frontier.pop()
        for place in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
            inside = 0 <= place[0] < grid[0] and 0 <= place[1] < grid[1]
            if inside and foreground[place[0]][place[1]] and place not in component:
                component.add(place)
                frontier.append(place)
    rows, columns = zip(*component, strict=True)
    box = (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
    mask = np.zeros(grid, dtype=bool)
    mask[rows, columns] = True
    return (row, column), mask, np.array(degree).reshape(grid), box


def literal_cut(features: Tensor, tau: float = 0.2, eps: float = 1e-5) -> np.ndarray:
    """Which patches are on the side above the mean, after Wang et al. 2022, by `eigh` of the dense problem."""
    unit = torch.nn.functional.normalize(features, dim=1)
    graph = np.where((unit @ unit.T).numpy() > tau, 1.0, eps)
    root = np.sqrt(graph.sum(1))
    laplacian = np.eye(len(root)) - graph / root[:, None] / root[None, :]
    _, vectors = scipy.linalg.eigh(laplacian, subset_by_index=[1, 1])
    cut = vectors[:, 0] / root
    return cut > cut.mean()
