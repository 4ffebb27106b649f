"""Normal patches and outliers: what probes of local information are trained on, and what they are tested on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.probes.results.score import Score
from vitreg.probes.store.feature_store import FeatureStore

MIN_OUTLIERS = 10
"""With fewer of them, in training or validation images, a figure of outliers would say nothing."""


class Group(StrEnum):
    """Some patches."""

    ALL = "all"
    NORMAL = "normal"
    OUTLIER = "outlier"

    def members(self, outlier: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Which patches it has, by which are outliers."""
        if self is Group.ALL:
            return torch.ones_like(outlier)
        return outlier if self is Group.OUTLIER else ~outlier


@dataclass(frozen=True)
class Subject:
    """A row of the table: patches on which the linear map is fitted, and those on which it is tested."""

    name: str
    trained_on: Group
    tested_on: Group


SUBJECTS = (
    Subject("all", Group.ALL, Group.ALL),
    Subject("all but outliers", Group.NORMAL, Group.NORMAL),
    Subject("normal", Group.ALL, Group.NORMAL),
    Subject("outlier", Group.ALL, Group.OUTLIER),
    Subject("outlier, own probe", Group.OUTLIER, Group.OUTLIER),
)
"""Figure 5b of "Vision Transformers Need Registers" compares `normal` with `outlier`. It does not say what its linear
model is trained on; here it is one, on all patches as they come, so that the two rows differ in nothing but the patch.
Outliers are few, so it hardly adapts to them: `outlier, own probe` is trained on outliers alone and finds what they
hold in a code of their own. `all but outliers` is Table 5.

Two models are best compared by `all`, whose patches are the same. Without the outliers of the one, and with those
patches of the other, which has none, `all but outliers` compares different patches: where they are easy, as corners
are to locate, the other model gains by that alone."""


def marked_patches(
    store: FeatureStore, block: int
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n P D"], Bool[Tensor, "n P"]]]:
    """Rows, patch tokens and which of them are outliers, file by file.

    Raises:
        ValueError: the store has no patch tokens of the block, or they are not finite.
    """
    outliers, first = store.outliers().flatten(1), 0
    for rows, tokens in store.patches(block):
        if not tokens.isfinite().all():
            raise ValueError(f"{store.path} holds patch tokens of block {block} that are not finite; extract it again")
        yield rows, tokens, outliers[first : first + len(rows)]
        first += len(rows)


@dataclass(frozen=True)
class Positions:
    """How many patches of each group are at every position, in the images whose tokens were kept."""

    train: dict[Group, Int[Tensor, " P"]]
    val: dict[Group, Int[Tensor, " P"]]

    @classmethod
    def of(cls, train: FeatureStore, val: FeatureStore, block: int) -> Positions:
        """Those of two stores of one model.

        Raises:
            ValueError: one of them has no patch tokens of the block.
        """
        for store in (train, val):
            store.patches(block)
        marks = (store.outliers().flatten(1) for store in (train, val))
        return cls(*({group: group.members(outlier).sum(0) for group in Group} for outlier in marks))

    @property
    def details(self) -> dict[str, dict[str, int]]:
        """How many there are, in JSON types."""
        return {
            name: {str(group): int(number.sum()) for group, number in positions.items()}
            for name, positions in (("train", self.train), ("val", self.val))
        }

    def why_missing(self, subject: Subject) -> str:
        """Why there is no figure; empty where there is one."""
        if Group.OUTLIER not in (subject.trained_on, subject.tested_on):
            return ""
        for name, positions in (("training", self.train), ("validation", self.val)):
            if (found := int(positions[Group.OUTLIER].sum())) < MIN_OUTLIERS:
                return f"the {name} images have {found} outliers; it takes {MIN_OUTLIERS}"
        return ""

    @property
    def subjects(self) -> dict[Subject, Group]:
        """Those with figures, and what they are trained on; without outliers, all patches are the normal ones."""
        own = bool(self.train[Group.OUTLIER].any())
        return {s: s.trained_on if own else Group.ALL for s in SUBJECTS if not self.why_missing(s)}

    def scores(self, name: str, sums: Mapping[Subject, np.ndarray], column: int, **options: Any) -> list[Score]:
        """A figure of every subject, from a column of `subject_sums`, or why there is none."""
        return [
            Score.mean(name, sums[subject][:, column], sums[subject][:, -1], subject=subject.name, **options)
            if subject in sums
            else Score.none(name, self.why_missing(subject), subject=subject.name, **options)
            for subject in SUBJECTS
        ]


def subject_sums(
    batches: Iterable[tuple[Mapping[Subject, Float[Tensor, "n P F"]], Bool[Tensor, "n P"]]],
) -> dict[Subject, np.ndarray]:
    """By subject, sums of figures over the patches of every image, and last the number of these patches."""
    found: dict[Subject, list[Tensor]] = defaultdict(list)
    for figures, outlier in batches:
        for subject, of_each in figures.items():
            member = subject.tested_on.members(outlier).unsqueeze(-1)
            found[subject].append(torch.cat([(of_each * member).sum(1), member.sum(1).to(of_each)], 1).cpu())
    return {subject: torch.cat(parts).numpy() for subject, parts in found.items()}
