"""Where in the image is this patch? What a patch token still knows of its place.

A linear classifier names the position of a patch from its token alone (Figure 5b and Table 5 of "Vision Transformers
Need Registers"); `patch_kinds.SUBJECTS` says what the rows are trained and tested on. Outliers are neither weighted nor
drawn more often: the shared probe sees patches as the model makes them.

Where artifacts are always in the same places, such as the corners, *being* an outlier already says where a patch is,
and the probe may be better on outliers than on normal patches although they hold nothing of their neighborhood. So
compare each row with its constant guess in `details`, and see in how many positions the patches of a row really are.
The class with the largest logit need not be the nearest guess: where the probe knows little, the middle of the grid has
the smaller distance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.common.devices import precise
from vitreg.common.progress import OnProgress
from vitreg.probes.heads.position_head import PositionConfig, PositionHead, TrainingSet, train_heads
from vitreg.probes.results.score import ProbeResult, Score
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.tasks.patch_kinds import SUBJECTS, Counts, Group, Subject, marked_patches


def position(
    train: FeatureStore,
    val: FeatureStore,
    config: PositionConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> ProbeResult:
    """Train the position probe and test it.

    Scores are the share of patches whose position is named exactly (`position top-1`) and the mean distance between
    the named and the true position on the grid (`position distance`, Euclidean, in patches), for every subject.

    Args:
        train: features of training images.
        val: of others, by the same model.
        config: how it is trained; by default a `PositionConfig()`.
        device: where it is trained.
        on_progress: called with the number of epochs done and their largest number.

    Raises:
        ValueError: the stores are of different models or lack patch tokens of the block, or too few images have any.
    """
    config = config or PositionConfig()
    train.check_same_model(val)
    val = val.with_threshold_of(train)
    found = TrainingSet.of(train, config)
    val_positions = _positions(val, config.block)
    counts = Counts(*({group: int(n.sum()) for group, n in of.items()} for of in (found.positions, val_positions)))
    subjects = {subject: counts.trained_on(subject) for subject in SUBJECTS if not counts.why_missing(subject)}

    def advance(epoch: int) -> None:
        if on_progress is not None:
            on_progress(epoch, config.epochs)

    heads = train_heads(train, found, list(dict.fromkeys(subjects.values())), config, device, advance)
    sums = _test(val, heads, subjects, config.block, device)
    scores: list[Score] = []
    for column, (name, options) in enumerate(_FIGURES.items()):
        for subject in SUBJECTS:
            options = {**options, "subject": subject.name}
            if reason := counts.why_missing(subject):
                scores.append(Score.none(name, reason, **options))
            else:
                of_subject = sums[subject]
                scores.append(Score.mean(name, of_subject[:, column], of_subject[:, 2], **options))
    details = {
        **counts.details,
        "epochs": {str(group): head.epochs for group, head in heads.items()},
        "constant guess": {
            str(group): _constant_guess(found.positions[group], val_positions[group], val.grid)
            for group in Group
            if counts.train[group] and counts.val[group]
        },
    }
    return ProbeResult("position", tuple(scores), details)


_FIGURES: dict[str, dict[str, Any]] = {
    "position top-1": {"unit": "%"},
    "position distance": {"unit": "patches", "lower_is_better": True},
}


def _positions(store: FeatureStore, block: int) -> dict[Group, Int[Tensor, " P"]]:
    """How many patches of each group are at every position."""
    outlier = torch.cat([outlier for _, _, outlier in marked_patches(store, block)])
    return {group: group.members(outlier).sum(0) for group in Group}


def _distances(grid: tuple[int, int]) -> Float[Tensor, "P P"]:
    """Between positions, in patches."""
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in grid))
    return torch.cdist(places, places)


def _test(
    val: FeatureStore,
    heads: dict[Group, PositionHead],
    subjects: dict[Subject, Group],
    block: int,
    device: torch.device | str,
) -> dict[Subject, np.ndarray]:
    """For every image of a subject: patches that are right, the sum of distances, and how many patches there are."""
    distances = _distances(val.grid).to(device)
    truth = torch.arange(len(distances), device=device)
    found: dict[Subject, list[Tensor]] = {subject: [] for subject in subjects}
    for _, tokens, outlier in marked_patches(val, block):
        tokens, outlier = tokens.to(device), outlier.to(device)
        figures = {group: _figures(head(tokens), truth, distances) for group, head in heads.items()}
        for subject, group in subjects.items():
            member = subject.tested_on.members(outlier)
            found[subject].append((figures[group] * member.unsqueeze(-1)).sum(1).cpu())
    return {subject: torch.cat(parts).numpy() for subject, parts in found.items()}


def _figures(guess: Int[Tensor, "n P"], truth: Int[Tensor, " P"], distances: Tensor) -> Float[Tensor, "n P 3"]:
    return torch.stack([guess == truth, distances[guess, truth], torch.ones_like(guess)], -1).to(precise(guess.device))


def _constant_guess(train: Int[Tensor, " P"], val: Int[Tensor, " P"], grid: tuple[int, int]) -> dict[str, float]:
    """What can be had without looking: the best constant answer of training patches, on the validation patches.

    Returns:
        `top_1` (percent) of the most frequent position, `distance` of the one that is nearest to all, and `positions`,
        the perplexity of where the validation patches are: 4 where they are in the four corners equally often.
    """
    share = val.double() / val.sum()
    distances = _distances(grid).double()
    nearest = int((distances @ train.double()).argmin())
    return {
        "top_1": 100 * float(share[int(train.argmax())]),
        "distance": float(distances[nearest] @ share),
        "positions": math.exp(float(torch.special.entr(share).sum())),
    }
