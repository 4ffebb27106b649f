"""The linear depth probe: how far away a pixel is, from its patch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from torch.nn import functional

from vitreg.common.progress import OnProgress
from vitreg.images import DepthSet, image_size, map_ahead, spaced_indices
from vitreg.probes.heads.dense_head import UPSAMPLING, HeadSchedule, LinearHead, Upsampling, num_steps, train_head
from vitreg.probes.protocols import DepthConfig
from vitreg.probes.results.score import NUM_SHOWN, ProbeResult, Score
from vitreg.probes.store.dense_features import DenseFeatures, check_stores, check_values, read_targets
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.tasks.depth_errors import depth_errors, sig_loss

EPOCHS = 25
_WARMUP, _CLIP = 1 / 3, 35.0
_MEAN_ONLY_STEPS = 100
_BASE = 0.1
_DEPTHS_AHEAD = 8
_EIGEN_SIZE, _EIGEN_CROP = (480, 640), (slice(45, 471), slice(41, 601))
_PAPER_BLOCKS = {24: (4, 11, 17, 23)}


def in_range(truth: np.ndarray, config: DepthConfig) -> Bool[np.ndarray, "*shape"]:
    """Which depths are trained on and judged; holes are not."""
    return (truth > config.min_depth) & (truth < config.max_depth)


def depth_blocks(depth: int, variant: Literal["lin.1", "lin.4"]) -> tuple[int, ...]:
    """The blocks of DINOv2's linear depth heads, from 0: the last, or four at equal distances.

    Args:
        depth: blocks of the model.
        variant: which head.

    Raises:
        ValueError: the model has fewer than four.
    """
    if variant == "lin.1":
        return (depth - 1,)
    if depth < 4:
        raise ValueError(f"the model has {depth} blocks, but lin.4 reads four; choose lin.1")
    return _PAPER_BLOCKS.get(depth, tuple(depth * quarter // 4 - 1 for quarter in range(1, 5)))


def linear_depth(
    train: FeatureStore,
    val: FeatureStore,
    targets: tuple[DepthSet, DepthSet],
    config: DepthConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> ProbeResult:
    """Train a linear head on one store and judge it on another.

    Args:
        train: features to train on, of `dense_preprocess`.
        val: features to judge by.
        targets: the sets that the two were made of.
        config: the protocol.
        device: that trains.
        on_progress: called with steps done and their total.

    Returns:
        RMSE, AbsRel and delta1: of each image, at its own resolution, then their mean, as in the evaluation code of
        BTS and AdaBins. Images with no depth in the range are left out.

    Raises:
        ValueError: stores and targets do not fit together, or depth maps cannot be used.
    """
    check_stores(train, [val], targets)
    check_values(targets[1], val)
    return fit_depth(train, targets[0], config, device=device, on_progress=on_progress).evaluate(val, targets[1])


def fit_depth(
    train: FeatureStore,
    targets: DepthSet,
    config: DepthConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> DepthEstimator:
    """The head alone, for whoever wants its predictions, too; arguments and errors as of `linear_depth`."""
    config = config or DepthConfig()
    features = DenseFeatures(train, config.blocks, with_cls=True)
    rows, columns = features.grid
    truth = read_targets(targets, features.numbers, (UPSAMPLING * rows, UPSAMPLING * columns))
    # What does not count becomes a hole.
    truth[~in_range(truth, config)] = 0
    measured = truth[truth > 0]
    if not len(measured):
        raise ValueError(
            f"{targets.source} has no depth from {config.min_depth} to {config.max_depth} m; "
            f"a step of its files is taken for {targets.scale} m: check the scale"
        )
    plan = HeadSchedule(
        num_steps(config.steps, len(features), config.head_batch_size, EPOCHS),
        config.head_batch_size, config.seed, device, _CLIP,
    )  # fmt: skip
    head = LinearHead(features.channels, config.bins, batch_norm=config.batch_norm, seed=config.seed).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=plan.steps + 1, pct_start=_WARMUP, div_factor=1000
    )

    def loss(found: Tensor, truth: Tensor, step: int) -> Tensor:
        counted = truth > 0
        return sig_loss(found[counted], truth[counted], mean_only=step < _MEAN_ONLY_STEPS)

    def meters(logits: Tensor, _: Tensor) -> Tensor:
        return expected_depth(logits, config)

    train_head(head, features, truth, meters, loss, optimizer, schedule, plan, on_progress)
    details = {"steps": plan.steps, "train_images": len(features), "blocks": list(config.blocks)}
    return DepthEstimator(head, config, float(measured.mean(dtype=np.float64)), details, device)


def expected_depth(logits: Float[Tensor, "*shape bins"], config: DepthConfig) -> Float[Tensor, "*shape"]:
    """Meters: the mean of the bins' depths, weighted with `relu(logit) + 0.1`."""
    bins = torch.linspace(config.min_depth, config.max_depth, config.bins, device=logits.device)
    # Both sums in one product, since the bins of all pixels are many times the pixels.
    sums = logits.relu() @ torch.stack([bins, torch.ones_like(bins)], 1)
    weighted, total = (sums + _BASE * torch.stack([bins.sum(), bins.new_tensor(config.bins)])).unbind(-1)
    return weighted / total


@dataclass(frozen=True, eq=False)
class DepthEstimator:
    """A trained head.

    Attributes:
        head: takes patch tokens with class tokens, gives logits of the bins.
        config: how it was trained.
        train_mean: mean depth of the pixels it was trained on, in meters.
        details: what it was trained on, in JSON types.
        device: where the head is.
    """

    head: LinearHead
    config: DepthConfig
    train_mean: float
    details: dict[str, Any]
    device: torch.device | str

    def predict(
        self, store: FeatureStore, targets: DepthSet, rows: Iterable[int]
    ) -> Iterator[tuple[int, Float32[np.ndarray, "H W"]]]:
        """The depth of every pixel in meters, at the image's own resolution.

        Args:
            store: of the images.
            targets: the set it was made of.
            rows: among the images that have patch tokens.

        Returns:
            The image's position in the set, and its depth.
        """
        features = DenseFeatures(store, self.config.blocks, with_cls=True)
        for row in rows:
            number = features.numbers[row]
            yield number, self._meters(features, row, image_size(targets.name(number)))

    def evaluate(self, store: FeatureStore, targets: DepthSet) -> ProbeResult:
        """Its figures, arguments as of `predict`."""
        features = DenseFeatures(store, self.config.blocks, with_cls=True)
        errors, baseline = np.zeros((len(features), 3)), np.zeros((len(features), 3))
        judged = np.zeros(len(features))
        cropped = targets.eigen_crop if self.config.eigen_crop is None else self.config.eigen_crop
        shown: dict[int, np.ndarray] = {}
        to_show = set(spaced_indices(len(features), NUM_SHOWN).tolist())
        with closing(map_ahead(targets.target, features.numbers, ahead=_DEPTHS_AHEAD)) as truths:
            for row, truth in enumerate(truths):
                counted = self._counted(truth, cropped, targets.target_name(features.numbers[row]))
                if counted.any():
                    meters = self._meters(features, row, truth.shape)
                    if row in to_show:
                        shown[features.numbers[row]] = meters
                    found = meters[counted]
                    errors[row] = depth_errors(found, truth[counted])
                    baseline[row] = depth_errors(np.full_like(found, self.train_mean), truth[counted])
                    judged[row] = 1
        if not judged.any():
            raise ValueError(
                f"{targets.source} has no depth from {self.config.min_depth} to {self.config.max_depth} m; "
                f"a step of its files is taken for {targets.scale} m: check the scale"
            )
        scores = (
            Score.mean("RMSE", errors[:, 0], judged, unit="m", lower_is_better=True),
            Score.mean("AbsRel", errors[:, 1], judged, lower_is_better=True),
            Score.mean("delta1", errors[:, 2], judged, unit="%"),
        )
        mean = dict(zip(("RMSE", "AbsRel", "delta1"), (baseline.sum(0) / judged.sum()).tolist(), strict=True))
        details = self.details | {
            "val_images": int(judged.sum()),
            "val_images_without_depth": int((judged == 0).sum()),
            "size": list(store.preprocess.size),
            "eigen_crop": cropped,
            "training_mean": self.train_mean,
            "of_training_mean": mean,
        }
        return ProbeResult("depth", scores, details, shown)

    def _counted(self, truth: Float32[np.ndarray, "H W"], cropped: bool, name: str) -> Bool[np.ndarray, "H W"]:
        counted = in_range(truth, self.config)
        if not cropped:
            return counted
        if truth.shape != _EIGEN_SIZE:
            height, width = _EIGEN_SIZE
            raise ValueError(
                f"{name} is {truth.shape[0]} x {truth.shape[1]}, but the Eigen crop is one of {height} x {width}; "
                "leave out eigen_crop"
            )
        middle = np.zeros_like(counted)
        middle[_EIGEN_CROP] = counted[_EIGEN_CROP]
        return middle

    @torch.inference_mode()
    def _meters(self, features: DenseFeatures, row: int, size: tuple[int, ...]) -> Float32[np.ndarray, "H W"]:
        rows, columns = features.grid
        upsampling = Upsampling(features.grid, (UPSAMPLING * rows, UPSAMPLING * columns), self.device)
        meters = expected_depth(upsampling(self.head(features.read([row]).to(self.device))), self.config)
        return functional.interpolate(meters[None], size, mode="bilinear")[0, 0].cpu().numpy()
