"""Classification from a single token: outliers hold what is in the image, other patches what is in their place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.common.progress import OnProgress
from vitreg.probes.heads.logistic import choose_logistic
from vitreg.probes.protocols import SingleTokenConfig
from vitreg.probes.results.score import ProbeResult, Score
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.tasks.classes import Classes, check_classes, check_finite
from vitreg.probes.tasks.patch_kinds import marked_patches

_DRAWN = ("normal patch", "outlier patch")


@dataclass(frozen=True, eq=False)
class _Kind:
    """One kind of token: rows of the images that have one, and one draw or several."""

    rows: Int[Tensor, " n"]
    draws: Float[Tensor, "draws n D"]


def single_token(
    train: FeatureStore,
    val: FeatureStore,
    config: SingleTokenConfig = SingleTokenConfig(),
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> ProbeResult:
    """Logistic regression from the class token, a random normal patch, a random outlier, and each register.

    All kinds are compared on the images whose patch tokens were kept. Outliers are fitted and judged on those that
    have one; an image that has none counts for nothing there.

    Returns:
        Top-1 for every kind of token, with the standard deviation over draws of patches.

    Raises:
        ValueError: the stores are not of one model and the same classes, hold no patch tokens, or not the block.
    """
    classes = check_classes(train, val)
    fitted, judged = _kinds(train, config, 0), _kinds(val.with_threshold_of(train), config, 1)
    total, done = sum(len(kind.draws) for kind in fitted.values()), 0
    scores: list[Score] = []
    details: dict[str, Any] = {
        "block": config.block,
        "threshold": train.threshold,
        "val_threshold": val.threshold,
        **classes.details,
        "tokens": {},
    }
    for name, kind in fitted.items():
        score, details["tokens"][name] = _judge(name, kind, judged[name], classes, config, torch.device(device))
        scores.append(score)
        done += len(kind.draws)
        if on_progress is not None:
            on_progress(done, total)
    return ProbeResult("tokens", tuple(scores), details)


def _judge(
    name: str, train: _Kind, val: _Kind, classes: Classes, config: SingleTokenConfig, device: torch.device
) -> tuple[Score, dict[str, Any]]:
    """The accuracy of one kind of token."""
    details: dict[str, Any] = {"num_train": len(train.rows), "num_val": len(val.rows)}
    # Classes none of whose images has such a token cannot be told from it: their validation images count as wrong.
    present, labels = classes.train[train.rows].unique(return_inverse=True)
    missing = "all training images that have one are of one class" if len(present) < 2 else ""
    if min(len(train.rows), len(val.rows)) < config.min_images:
        missing = f"only {len(train.rows)} training and {len(val.rows)} validation images have one"
    if missing:
        return Score.none("top-1", missing, unit="%", subject=name), details
    labels, truth = labels.to(device), classes.val[val.rows]
    logistic = config.logistic
    accuracies, right = [], torch.zeros(len(val.rows), dtype=torch.float64)
    for features, queries in zip(train.draws, val.draws, strict=True):
        check_finite(features, f"the {name} in the training store")
        check_finite(queries, f"the {name} in the validation store")
        chosen = choose_logistic(features.to(device), labels, len(present), logistic)
        if not accuracies:
            details |= {
                "C": chosen.C,
                "held_back_accuracies": [[c, accuracy] for c, accuracy in chosen.accuracies.items()],
                "converged": chosen.logistic.converged,
                "num_iterations": chosen.logistic.num_iterations,
            }
            # It holds for all draws.
            logistic = dataclasses.replace(logistic, C=(chosen.C,))
        hits = present[chosen.logistic.predict(queries.to(device)).cpu()] == truth
        right += hits.double() / len(train.draws)
        accuracies.append(100 * hits.double().mean().item())
    details |= {"num_classes": len(present), "accuracies": accuracies}
    sums = np.zeros((len(classes.val), 2))
    sums[val.rows.numpy()] = np.stack([right.numpy(), np.ones(len(right))], 1)
    return Score("top-1", sums, unit="%", subject=name, draws=tuple(accuracies) if name in _DRAWN else ()), details


def _kinds(store: FeatureStore, config: SingleTokenConfig, split: int) -> dict[str, _Kind]:
    """All kinds of tokens of a store."""
    drawn = {name: ([], []) for name in _DRAWN}
    kept = []
    generator = torch.Generator().manual_seed(2 * config.seed + split)
    for rows, patches, outlier in marked_patches(store, config.block):
        kept.append(rows)
        for name, wanted in zip(_DRAWN, (~outlier, outlier), strict=True):
            has = wanted.any(1)
            drawn[name][0].append(rows[has])
            drawn[name][1].append(_draw(patches[has], wanted[has], config.draws, generator))
    rows = torch.cat(kept)
    kinds: dict[str, _Kind] = {}
    cls = store.cls(config.block)
    if cls is not None:
        kinds["class token"] = _Kind(rows, cls[rows][None])
    for name, (found, tokens) in drawn.items():
        kinds[name] = _Kind(torch.cat(found), torch.cat(tokens, 1))
    for number, register in enumerate(store.registers(config.block).unbind(1), 1):
        kinds[f"register {number}"] = _Kind(rows, register[None])
    return kinds


def _draw(
    patches: Float[Tensor, "n P D"], wanted: Bool[Tensor, "n P"], draws: int, generator: torch.Generator
) -> Float[Tensor, "draws n D"]:
    """One of the wanted patches of every image, again and again."""
    lots = torch.rand(draws, *wanted.shape, generator=generator).masked_fill(~wanted, -1)
    return patches[torch.arange(len(patches)), lots.argmax(2)]
