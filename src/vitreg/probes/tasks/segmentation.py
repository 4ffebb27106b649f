"""The linear segmentation probe: what class a pixel is of, from its patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from vitreg.common.progress import OnProgress
from vitreg.images import IGNORED, SegmentationSet
from vitreg.probes.heads.dense_head import (
    AT_ONCE,
    DensePredictor,
    LinearHead,
    Upsampling,
    train_head,
    training_size,
)
from vitreg.probes.protocols import SegmentationConfig
from vitreg.probes.results.score import ProbeResult, Score
from vitreg.probes.store.dense_features import DenseFeatures, check_stores, read_targets
from vitreg.probes.store.feature_store import FeatureStore


def linear_segmentation(
    train: FeatureStore,
    val: FeatureStore | Sequence[FeatureStore],
    targets: tuple[SegmentationSet, SegmentationSet],
    config: SegmentationConfig = SegmentationConfig(),
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> ProbeResult:
    """Train a linear head on one store and judge it on another, both of `dense_preprocess` and the sets of `targets`.

    Where the second are several, of the same images in several sizes, the first in that of `train`, their predictions
    are averaged.

    Returns:
        mIoU over all pixels of all images, each at its own resolution, and pixel accuracy.

    Raises:
        ValueError: stores and targets do not fit together, or masks cannot be used.
    """
    stores = [val] if isinstance(val, FeatureStore) else list(val)
    check_stores(train, stores, targets)
    return fit_segmentation(train, targets[0], config, device=device, on_progress=on_progress).evaluate(
        stores, targets[1]
    )


def fit_segmentation(
    train: FeatureStore,
    targets: SegmentationSet,
    config: SegmentationConfig = SegmentationConfig(),
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> Segmenter:
    """The head alone, for whoever wants its predictions, too; arguments and errors as of `linear_segmentation`."""
    features = DenseFeatures(train, config.blocks)
    masks = read_targets(targets, features.numbers, training_size(train))
    names = targets.class_names
    seen = np.bincount(masks.ravel(), minlength=256)[: len(names)]
    if (seen > 0).sum() < 2:
        raise ValueError(
            f"{targets.source} has pixels of {(seen > 0).sum()} class; a head needs at least 2 to train on"
        )

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        """Linear warm-up times linear decay, as mmsegmentation's poly schedule of power 1."""
        rise = max(1, round(config.warmup * steps))
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rise) * (1 - step / steps))

    head, details = train_head(
        features, masks, len(names), _per_pixel, _mean, schedule, config, device,
        batch_norm=True, betas=config.betas, on_progress=on_progress,
    )  # fmt: skip
    details["classes_not_in_training"] = [name for name, count in zip(names, seen, strict=True) if not count]
    return Segmenter(head, names, config, details)


@dataclass(frozen=True, eq=False)
class Segmenter(DensePredictor[SegmentationConfig]):
    """A trained head, with the names of its classes."""

    head: LinearHead
    class_names: tuple[str, ...]
    config: SegmentationConfig
    details: dict[str, Any]

    def evaluate(self, stores: FeatureStore | Sequence[FeatureStore], targets: SegmentationSet) -> ProbeResult:
        """Its figures, arguments as of `predict`."""
        counts, shown = self._judge(
            stores, targets, lambda predicted, truth, _: _counts(predicted, truth, len(self.class_names))
        )
        if not counts.any():
            raise ValueError(f"{targets.source} has no pixel that counts; every mask is of numbers that are left out")
        right, truth, predicted = counts.sum(0)
        with np.errstate(invalid="ignore"):
            ious = right / (truth + predicted - right)
        several = [stores] if isinstance(stores, FeatureStore) else stores
        details = self.details | {
            "val_images": len(counts),
            "sizes": [list(store.preprocess.size) for store in several],
            "IoU": [
                {"class": name, "IoU": None if np.isnan(iou) else float(iou)}
                for name, iou in zip(self.class_names, ious, strict=True)
            ],
        }
        scores = (
            Score("mIoU", counts, kind="mIoU", unit="%"),
            Score.mean("pixel accuracy", counts[:, 0].sum(1), counts[:, 1].sum(1), unit="%"),
        )
        return ProbeResult("segmentation", scores, details, {n: each.astype(np.uint8) for n, each in shown.items()})

    @torch.inference_mode()
    def _map(self, features: Sequence[DenseFeatures], row: int, size: tuple[int, ...]) -> Int64[np.ndarray, "H W"]:
        """Some rows of pixels at a time: the logits of a whole image in several sizes would be gigabytes."""
        sizes = [
            (self.head(one.read([row]).to(self.device)), Upsampling(one.grid, size, self.device)) for one in features
        ]
        found: list[Tensor] = []
        height, width = size
        at_once = max(1, AT_ONCE // (width * len(self.class_names)))
        for rows in (slice(first, first + at_once) for first in range(0, height, at_once)):
            logits, *others = (upsampling(logits, rows) for logits, upsampling in sizes)
            # The largest of the logits is the largest of the probabilities, whose mean counts as in mmsegmentation.
            scores = sum((other.softmax(-1) for other in others), logits.softmax(-1)) if others else logits
            found.append(scores.argmax(-1)[0])
        return torch.cat(found).cpu().numpy()


def _per_pixel(logits: Float[Tensor, "n H W K"], masks: UInt8[Tensor, "n H W"]) -> Float[Tensor, "n H W"]:
    """Cross-entropy; 0 where pixels do not count."""
    flat = functional.cross_entropy(
        logits.flatten(0, 2), masks.flatten().long(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(masks.shape)


def _mean(entropies: Float[Tensor, "n H W"], masks: UInt8[Tensor, "n H W"], step: int) -> Float[Tensor, ""]:
    # The mean of no pixel at all would be NaN.
    return entropies.sum() / (masks != IGNORED).sum().clamp(min=1)


def _counts(
    predicted: Int64[np.ndarray, "H W"], truth: UInt8[np.ndarray, "H W"], num_classes: int
) -> Float64[np.ndarray, "3 K"]:
    """Pixels of each class that are right, in the truth, and predicted, among those that count."""
    counted = truth != IGNORED
    truth_, predicted_ = truth[counted].astype(np.int64), predicted[counted]
    right = truth_[truth_ == predicted_]
    return np.stack([np.bincount(x, minlength=num_classes) for x in (right, truth_, predicted_)]).astype(np.float64)
