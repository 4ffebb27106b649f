"""The linear depth probe: how far away a pixel is, from its patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from vitreg.common.progress import OnProgress
from vitreg.images import DepthSet
from vitreg.probes.heads.dense_head import DensePredictor, LinearHead, Upsampling, train_head, training_size
from vitreg.probes.protocols import DepthConfig
from vitreg.probes.results.score import ProbeResult, Score
from vitreg.probes.store.dense_features import DenseFeatures, check_stores, read_targets
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.tasks.depth_errors import depth_errors, sig_loss

_WARMUP, _CLIP = 1 / 3, 35.0
_MEAN_ONLY_STEPS = 100
_BASE = 0.1
_EIGEN_SIZE, _EIGEN_CROP = (480, 640), (slice(45, 471), slice(41, 601))
_PAPER_BLOCKS = {24: (4, 11, 17, 23)}
_FIGURES: dict[str, dict[str, Any]] = {
    "RMSE": {"unit": "m", "lower_is_better": True},
    "AbsRel": {"lower_is_better": True},
    "delta1": {"unit": "%"},
}


def depth_blocks(depth: int, variant: Literal["lin.1", "lin.4"]) -> tuple[int, ...]:
    """The blocks of DINOv2's linear depth heads, of a model of `depth`, from 0: the last, or four at equal distances.

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
    config: DepthConfig = DepthConfig(),
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> ProbeResult:
    """Train a linear head on one store and judge it on another, both of `dense_preprocess` and the sets of `targets`.

    Returns:
        RMSE, AbsRel and delta1: of each image, at its own resolution, then their mean, as in the evaluation code of
        BTS and AdaBins. Images with no depth in the range are left out.

    Raises:
        ValueError: stores and targets do not fit together, or depth maps cannot be used.
    """
    check_stores(train, [val], targets)
    return fit_depth(train, targets[0], config, device=device, on_progress=on_progress).evaluate(val, targets[1])


def fit_depth(
    train: FeatureStore,
    targets: DepthSet,
    config: DepthConfig = DepthConfig(),
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> DepthEstimator:
    """The head alone, for whoever wants its predictions, too; arguments and errors as of `linear_depth`."""
    features = DenseFeatures(train, config.blocks, with_cls=True)
    truth = read_targets(targets, features.numbers, training_size(train))
    # What does not count becomes a hole.
    truth[~_in_range(truth, config)] = 0
    measured = truth[truth > 0]
    if not len(measured):
        raise _no_depth(targets, config)

    def loss(found: Tensor, truth: Tensor, step: int) -> Tensor:
        counted = truth > 0
        return sig_loss(found[counted], truth[counted], mean_only=step < _MEAN_ONLY_STEPS)

    head, details = train_head(
        features,
        truth,
        config.bins,
        lambda logits, _: expected_depth(logits, config),
        loss,
        lambda optimizer, steps: OneCycleLR(optimizer, config.lr, steps + 1, pct_start=_WARMUP, div_factor=1000),
        config,
        device,
        batch_norm=config.batch_norm,
        clip=_CLIP,
        on_progress=on_progress,
    )
    return DepthEstimator(head, config, float(measured.mean(dtype=np.float64)), details)


def expected_depth(logits: Float[Tensor, "*shape bins"], config: DepthConfig) -> Float[Tensor, "*shape"]:
    """Meters: the mean of the bins' depths, weighted with `relu(logit) + 0.1`."""
    bins = torch.linspace(config.min_depth, config.max_depth, config.bins, device=logits.device)
    # Both sums in one product, since the bins of all pixels are many times the pixels.
    sums = logits.relu() @ torch.stack([bins, torch.ones_like(bins)], 1)
    weighted, total = (sums + _BASE * torch.stack([bins.sum(), bins.new_tensor(config.bins)])).unbind(-1)
    return weighted / total


@dataclass(frozen=True, eq=False)
class DepthEstimator(DensePredictor[DepthConfig]):
    """A trained head, and the mean depth in meters of the pixels it was trained on."""

    head: LinearHead
    config: DepthConfig
    train_mean: float
    details: dict[str, Any]
    with_cls = True

    def evaluate(self, store: FeatureStore, targets: DepthSet) -> ProbeResult:
        """Its figures, arguments as of `predict`."""
        cropped = targets.eigen_crop if self.config.eigen_crop is None else self.config.eigen_crop

        def errors(meters: np.ndarray, truth: np.ndarray, number: int) -> np.ndarray:
            """Of the prediction, of the training mean, and one for the image."""
            counted = _in_range(truth, self.config)
            if cropped:
                counted = _eigen_cropped(counted, targets.target_name(number))
            if not counted.any():
                return np.zeros(7)
            found, truth = meters[counted], truth[counted]
            mean = np.full_like(found, self.train_mean)
            return np.array([*depth_errors(found, truth), *depth_errors(mean, truth), 1])

        found, shown = self._judge(store, targets, errors)
        judged = found[:, 6]
        if not judged.any():
            raise _no_depth(targets, self.config)
        scores = tuple(
            Score.mean(name, found[:, i], judged, **options) for i, (name, options) in enumerate(_FIGURES.items())
        )
        mean = found[:, 3:6].sum(0) / judged.sum()
        details = self.details | {
            "val_images": int(judged.sum()),
            "val_images_without_depth": int((judged == 0).sum()),
            "size": list(store.preprocess.size),
            "eigen_crop": cropped,
            "training_mean": self.train_mean,
            "of_training_mean": dict(zip(_FIGURES, mean.tolist(), strict=True)),
        }
        return ProbeResult("depth", scores, details, shown)

    @torch.inference_mode()
    def _map(self, features: Sequence[DenseFeatures], row: int, size: tuple[int, ...]) -> Float32[np.ndarray, "H W"]:
        (of_one_size,) = features
        upsampling = Upsampling(of_one_size.grid, training_size(of_one_size), self.device)
        meters = expected_depth(upsampling(self.head(of_one_size.read([row]).to(self.device))), self.config)
        return functional.interpolate(meters[None], size, mode="bilinear")[0, 0].cpu().numpy()


def _in_range(truth: np.ndarray, config: DepthConfig) -> Bool[np.ndarray, "*shape"]:
    """Which depths are trained on and judged; holes are not."""
    return (truth > config.min_depth) & (truth < config.max_depth)


def _eigen_cropped(counted: Bool[np.ndarray, "H W"], name: str) -> Bool[np.ndarray, "H W"]:
    """Those in the middle."""
    if counted.shape != _EIGEN_SIZE:
        (height, width), (rows, columns) = counted.shape, _EIGEN_SIZE
        raise ValueError(
            f"{name} is {height} x {width}, but the Eigen crop is one of {rows} x {columns}; leave out eigen_crop"
        )
    middle = np.zeros_like(counted)
    middle[_EIGEN_CROP] = counted[_EIGEN_CROP]
    return middle


def _no_depth(targets: DepthSet, config: DepthConfig) -> ValueError:
    return ValueError(
        f"{targets.source} has no depth from {config.min_depth} to {config.max_depth} m; "
        f"a step of its files is taken for {targets.scale} m: check the scale"
    )
