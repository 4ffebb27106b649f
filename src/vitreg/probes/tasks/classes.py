"""What probes of classification ask of two stores first: the same classes, and finite features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.images import ImageSet
from vitreg.images.labels import check_same_classes, some_names
from vitreg.probes.store.feature_store import FeatureStore


@dataclass(frozen=True, eq=False)
class Classes:
    """The labels of two stores.

    Attributes:
        train, val: class of every image, counted without those classes that have no training images.
        names: of the classes that have.
    """

    train: Int[Tensor, " N"]
    val: Int[Tensor, " M"]
    names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Those with training images."""
        return len(self.names)

    @property
    def details(self) -> dict[str, Any]:
        """In JSON types: how many there are, and whose accuracy is not known for want of validation images."""
        seen = set(self.val.tolist())
        without_val = [name for label, name in enumerate(self.names) if label not in seen]
        return {"num_classes": self.num_classes, "classes_without_val": without_val}


def check_classes(train: FeatureStore, val: FeatureStore) -> Classes:
    """The labels of two stores, which are of one model, or it is a `ValueError`, and mean the same."""
    train.check_same_model(val)
    return classes_of(train, val)


def classes_of(train: FeatureStore | ImageSet, val: FeatureStore | ImageSet) -> Classes:
    """The labels of two stores, or of two sets before a model sees their images.

    Raises:
        ValueError: one has no labels, their classes differ, there is one class only, or there are validation images
            of a class without training images; the message has the classes.
    """
    source, val_source = (of.source if isinstance(of, ImageSet) else str(of.path) for of in (train, val))
    for of, where in ((train, source), (val, val_source)):
        if of.labels is None:
            raise ValueError(f"{where} has no labels; give images in folders of their classes, two at least")
    ours, theirs = (torch.as_tensor(np.asarray(of.labels)) for of in (train, val))
    check_same_classes(train.classes, val.classes, source, val_source)
    present, number = ours.unique(return_inverse=True)
    found = tuple(train.classes[label] for label in present.tolist())
    if len(found) == 1:
        raise ValueError(f"{source} holds images of {found[0]} only; a classifier needs two classes at least")
    if lacking := sorted(set(theirs.tolist()) - set(present.tolist())):
        missing = some_names([train.classes[label] for label in lacking])
        raise ValueError(
            f"{source} holds no image of {missing}, of which {val_source} does; add some, or leave them out"
        )
    return Classes(number, torch.searchsorted(present, theirs), found)


def check_every_class(labels: Int[Tensor, " N"], num_classes: int) -> None:
    """Refuse rows that a classifier cannot be fitted on: a class has none, or there is one class only."""
    if num_classes < 2:
        raise ValueError(f"there is {num_classes} class; a classifier needs two at least")
    lacking = (labels.bincount(minlength=num_classes) == 0).nonzero()[:, 0].tolist()
    if lacking:
        raise ValueError(f"there are no rows of class {some_names([*map(str, lacking)])}; leave such classes out")


def check_finite(features: Float[Tensor, "N D"], of: str) -> None:
    """Refuse features that are not finite; the message says what they are, and the first row."""
    finite = features.abs().amax(1).isfinite()
    if not finite.all():
        raise ValueError(f"{of} is not finite in row {int(finite.int().argmin())}; run the feature pass again")
