"""The k nearest training images vote: classification without training."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vitreg.common.devices import precise
from vitreg.common.progress import OnProgress
from vitreg.probes.protocols import KNNConfig
from vitreg.probes.results.score import ProbeResult, Score
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.tasks.classes import check_classes, check_finite

_QUERIES, _KEYS = 256, 16384
_LAST_ROW = 2**32 - 1


def knn(
    train: FeatureStore,
    val: FeatureStore,
    config: KNNConfig = KNNConfig(),
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> ProbeResult:
    """Classify every validation image by its nearest training images.

    The feature is the class token after the last block, and what the model pools where it has none.

    Returns:
        Top-1 for every k, in the order of `config.k`.

    Raises:
        ValueError: the stores are not of one model and the same classes.
    """
    classes = check_classes(train, val)
    keys, queries = _features(train).to(device), _features(val).to(device)
    usable = tuple(k for k in config.k if k <= len(keys))
    predicted = torch.empty(len(usable), len(queries), dtype=torch.int64)
    if usable:
        labels = classes.train.to(device)
        for first in range(0, len(queries), _QUERIES):
            chunk = queries[first : first + _QUERIES]
            neighbors, similarity = nearest(keys, chunk, max(usable))
            votes = (similarity.to(precise(similarity.device)) - 1).div(config.temperature).exp()
            for row, k in enumerate(usable):
                ballot = votes.new_zeros(len(chunk), classes.num_classes)
                ballot.scatter_add_(1, labels[neighbors[:, :k]], votes[:, :k])
                predicted[row, first : first + _QUERIES] = ballot.argmax(1).cpu()
            if on_progress is not None:
                on_progress(min(first + _QUERIES, len(queries)), len(queries))
    right = {k: (row == classes.val).double().numpy() for k, row in zip(usable, predicted, strict=True)}
    scores = tuple(
        Score.mean("top-1", right[k], unit="%", subject=f"k = {k}")
        if k in right
        else Score.none("top-1", f"there are only {len(keys)} training images", unit="%", subject=f"k = {k}")
        for k in config.k
    )
    details = {
        "feature": "pooled" if train.cls(-1) is None else "class token",
        "after_final_norm": train.config.normed,
        "num_train": len(keys),
        "num_val": len(queries),
        **classes.details,
        "temperature": config.temperature,
    }
    return ProbeResult("knn", scores, details)


def nearest(
    keys: Float[Tensor, "N D"], queries: Float[Tensor, "M D"], k: int
) -> tuple[Int[Tensor, "M k"], Float[Tensor, "M k"]]:
    """The rows of `keys` that are most similar to each query, and how similar; of equal ones those that come first.

    All are of unit length; `k` is at most N.
    """
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=keys.device)
    for first in range(0, len(keys), _KEYS):
        # Of the two zeros, which are equal, only one is left by adding the other.
        similarity = (queries @ keys[first : first + _KEYS].T).add_(0.0)
        # One integer that sorts by similarity, then by row: the top k of equal floats would be any of them.
        rows = torch.arange(first, first + similarity.shape[1], device=keys.device)
        ranked = (_mirrored(similarity.view(torch.int32)).long() << 32) + (_LAST_ROW - rows)
        candidates = torch.cat([best, ranked], 1)
        best = candidates.topk(min(k, candidates.shape[1]), dim=1).values
    return _LAST_ROW - (best & _LAST_ROW), _mirrored((best >> 32).int()).view(torch.float32)


def _mirrored(bits: Int[Tensor, "M N"]) -> Int[Tensor, "M N"]:
    """Bits of floats to integers in the same order, and back: those of negative floats are in the reverse order."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _features(store: FeatureStore) -> Tensor:
    features = store.cls(-1)
    features = store.pooled if features is None else features
    check_finite(features, f"the feature in {store.path}")
    return normalize(features, dim=1)
