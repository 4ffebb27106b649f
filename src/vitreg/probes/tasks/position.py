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
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.common.devices import precise
from vitreg.common.progress import OnProgress
from vitreg.probes.heads.position_head import PositionHead, train_heads
from vitreg.probes.protocols import PositionConfig
from vitreg.probes.results.score import ProbeResult
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.tasks.patch_kinds import Group, Positions, Subject, marked_patches, subject_sums


def position(
    train: FeatureStore,
    val: FeatureStore,
    config: PositionConfig = PositionConfig(),
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> ProbeResult:
    """Train the position probe and test it.

    Scores are the share of patches whose position is named exactly (`position top-1`) and the mean distance between
    the named and the true position on the grid (`position distance`, Euclidean, in patches), for every subject.

    Raises:
        ValueError: the stores are of different models or lack patch tokens of the block, or too few images have any.
    """
    train.check_same_model(val)
    val = val.with_threshold_of(train)
    positions = Positions.of(train, val, config.block)
    groups = positions.subjects
    heads = train_heads(train, list(dict.fromkeys(groups.values())), config, device, on_progress)
    distances = _distances(val.grid).to(device)

    def figures() -> Iterator[tuple[dict[Subject, Tensor], Bool[Tensor, "n P"]]]:
        for _, tokens, outlier in marked_patches(val, config.block):
            found = {group: _figures(head, tokens.to(device), distances) for group, head in heads.items()}
            yield {subject: found[group] for subject, group in groups.items()}, outlier.to(device)

    sums = subject_sums(figures())
    details = {
        **positions.details,
        "epochs": {str(group): head.epochs for group, head in heads.items()},
        "constant guess": {
            str(group): _constant_guess(positions.train[group], positions.val[group], val.grid)
            for group in Group
            if positions.train[group].any() and positions.val[group].any()
        },
    }
    scores = (
        *positions.scores("position top-1", sums, 0, unit="%"),
        *positions.scores("position distance", sums, 1, unit="patches", lower_is_better=True),
    )
    return ProbeResult("position", scores, details)


def _distances(grid: tuple[int, int]) -> Float[Tensor, "P P"]:
    """Between positions, in patches."""
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in grid))
    return torch.cdist(places, places)


def _figures(head: PositionHead, tokens: Float[Tensor, "n P D"], distances: Tensor) -> Float[Tensor, "n P 2"]:
    """Whether a patch's guess is right, and how far it is from the truth."""
    guess, truth = head(tokens), torch.arange(len(distances), device=distances.device)
    return torch.stack([guess == truth, distances[guess, truth]], -1).to(precise(guess.device))


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
