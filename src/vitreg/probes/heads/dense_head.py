"""A linear head on patch tokens, its training, and its predictions for every pixel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import count
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler

from vitreg.common.progress import OnProgress
from vitreg.images import DenseSet, image_size, map_ahead, spaced_indices
from vitreg.probes.heads.training import descend, fit, shuffled
from vitreg.probes.protocols import DepthConfig, SegmentationConfig
from vitreg.probes.results.score import NUM_SHOWN
from vitreg.probes.store.dense_features import DenseFeatures
from vitreg.probes.store.feature_store import FeatureStore

Config = TypeVar("Config", SegmentationConfig, DepthConfig)

_BATCHES_AHEAD, _TARGETS_AHEAD = 4, 8
AT_ONCE = 2**22
"""Numbers that upsampled logits may have at a time: what stays in the cache is computed twice as fast."""

UPSAMPLING = 4
"""Heads are trained on maps of so many times the patch grid; on CamVid, 2, 4 and 8 give the same mIoU within 0.2."""

MIN_STEPS = 2000
"""Of small sets, which a head needs to converge."""


class LinearHead(nn.Module):
    """A 1 x 1 convolution on patch tokens; with batch normalization before it, DINOv2's `BNHead`."""

    def __init__(self, channels: int, outputs: int, *, batch_norm: bool, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels) if batch_norm else nn.Identity()
        self.linear = nn.Linear(channels, outputs)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Float[Tensor, "n P C"]) -> Float[Tensor, "n P K"]:
        return self.linear(self.norm(tokens.flatten(0, 1))).unflatten(0, tokens.shape[:2])


class Upsampling:
    """Bilinear, as `interpolate(align_corners=False)`, of maps whose channels are last.

    Two matrix products: they, unlike the gradient of `interpolate`, are the same every time on a GPU, too.
    """

    def __init__(self, grid: tuple[int, int], size: tuple[int, ...], device: torch.device | str) -> None:
        self._grid = grid
        self._rows, self._columns = (
            functional.interpolate(torch.eye(old)[None], new, mode="linear")[0].T.to(device)
            for old, new in zip(grid, size, strict=True)
        )

    def __call__(self, maps: Float[Tensor, "n P K"], rows: slice = slice(None)) -> Float[Tensor, "n H W K"]:
        """The larger maps, or some of their rows."""
        maps = maps.unflatten(1, self._grid)
        tall = (self._rows[rows] @ maps.flatten(2)).unflatten(2, maps.shape[2:])
        return self._columns @ tall


def training_size(store: FeatureStore | DenseFeatures) -> tuple[int, int]:
    """Height and width of the maps that a head is trained on."""
    return UPSAMPLING * store.grid[0], UPSAMPLING * store.grid[1]


def train_head(
    features: DenseFeatures,
    targets: Shaped[np.ndarray, "N H W"],
    num_outputs: int,
    per_pixel: Callable[[Tensor, Tensor], Tensor],
    loss: Callable[[Tensor, Tensor, int], Tensor],
    schedule: Callable[[torch.optim.Optimizer, int], LRScheduler],
    config: SegmentationConfig | DepthConfig,
    device: torch.device | str,
    *,
    batch_norm: bool,
    betas: tuple[float, float] = (0.9, 0.999),
    clip: float | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[LinearHead, dict[str, Any]]:
    """Train a head with AdamW on features that are as they are: computed once, so images are not augmented.

    Args:
        features: of all images.
        targets: of the same.
        num_outputs: of the head, a pixel.
        per_pixel: what is made of upsampled logits `[n, H, W, K]` and targets `[n, H, W]`: one number a pixel.
        loss: of these numbers, targets, and the step, from 0.
        schedule: of the learning rate of an optimizer, in so many steps.
        config: has the learning rate, the images of a step, the number of steps and the seed.
        device: that trains.
        batch_norm: of the head.
        betas: of AdamW.
        clip: largest norm of the gradient; None for any.
        on_progress: called with steps done and their total.

    Returns:
        The head, in evaluation mode, and what it was trained on, in JSON types.

    Raises:
        ValueError: it has diverged: the largest of logits that are no numbers would be some class all the same.
    """
    if config.steps is not None and config.steps < 1:
        raise ValueError(f"steps is {config.steps}; it must be at least 1, or None for {config.epochs} epochs")
    num_images = len(features)
    # By default the paper's epochs, but on small sets no fewer steps than a head needs to converge.
    steps = config.steps or max(MIN_STEPS, config.epochs * num_images // config.head_batch_size)
    head = LinearHead(features.channels, num_outputs, batch_norm=batch_norm, seed=config.seed).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    rates, numbers = schedule(optimizer, steps), count()
    upsampling = Upsampling(features.grid, targets.shape[1:], device)

    def load(rows: Tensor) -> tuple[Tensor, Tensor]:
        return features.read(rows.tolist()), torch.from_numpy(targets[rows])

    def step(batch: tuple[Tensor, Tensor]) -> None:
        tokens, truth = (part.to(device) for part in batch)
        logits = head(tokens)
        at_once = max(1, AT_ONCE // (truth[0].numel() * logits.shape[-1]))
        parts = zip(logits.split(at_once), truth.split(at_once), strict=True)
        found = torch.cat([per_pixel(upsampling(part), of_part) for part, of_part in parts])
        descend(loss(found, truth, next(numbers)), optimizer, rates, clip)

    rng = np.random.default_rng(config.seed)
    order = shuffled(lambda _: torch.from_numpy(rng.permutation(num_images)), num_images, config.head_batch_size, steps)
    with closing(map_ahead(load, order, ahead=_BATCHES_AHEAD, num_threads=1)) as batches:
        fit(zip(batches), step, steps, on_progress=on_progress)
    if not all(parameter.isfinite().all() for parameter in head.parameters()):
        raise ValueError(f"the head is not finite after {steps} steps; train it with a lower lr")
    return head.eval(), {"steps": steps, "train_images": num_images, "blocks": list(config.blocks)}


class DensePredictor(ABC, Generic[Config]):
    """A trained head, with what it makes of the images of a store.

    Attributes:
        head: takes patch tokens, gives logits.
        config: how it was trained.
        details: what it was trained on, in JSON types.
    """

    head: LinearHead
    config: Config
    details: dict[str, Any]
    with_cls: ClassVar[bool] = False
    """Whether the class token is behind every patch token."""

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.head.linear.weight.device

    def predict(
        self, stores: FeatureStore | Sequence[FeatureStore], targets: DenseSet, rows: Iterable[int]
    ) -> Iterator[tuple[int, Shaped[np.ndarray, "H W"]]]:
        """Positions of images in the set that the stores are of, and the value of every pixel, class or meters.

        Values are at the image's own resolution. For segmentation, stores may be several, of the same images in several
        sizes, whose probabilities are averaged. Rows are among the images that have patch tokens.
        """
        features = self._features(stores)
        for row in rows:
            number = features[0].numbers[row]
            yield number, self._map(features, row, image_size(targets.name(number)))

    def _judge(
        self,
        stores: FeatureStore | Sequence[FeatureStore],
        targets: DenseSet,
        sums: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    ) -> tuple[Float64[np.ndarray, "N ..."], dict[int, np.ndarray]]:
        """What `sums` makes of prediction, truth and number of every image, and the predictions that reports show."""
        features = self._features(stores)
        to_show = set(spaced_indices(len(features[0]), NUM_SHOWN).tolist())
        found: list[np.ndarray] = []
        shown: dict[int, np.ndarray] = {}
        with closing(map_ahead(targets.target, features[0].numbers, ahead=_TARGETS_AHEAD)) as truths:
            for row, (number, truth) in enumerate(zip(features[0].numbers, truths, strict=True)):
                predicted = self._map(features, row, truth.shape)
                found.append(sums(predicted, truth, number))
                if row in to_show and found[-1].any():
                    shown[number] = predicted
        return np.stack(found), shown

    def _features(self, stores: FeatureStore | Sequence[FeatureStore]) -> list[DenseFeatures]:
        several = [stores] if isinstance(stores, FeatureStore) else stores
        return [DenseFeatures(store, self.config.blocks, with_cls=self.with_cls) for store in several]

    @abstractmethod
    def _map(self, features: Sequence[DenseFeatures], row: int, size: tuple[int, ...]) -> Shaped[np.ndarray, "H W"]:
        """The prediction for one image."""
