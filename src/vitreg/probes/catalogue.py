"""The probes by name: what each is asked on, what it needs of the feature pass, and how to ask it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from vitreg.common.progress import OnProgress
from vitreg.images import DenseSet, ImageSet
from vitreg.model import VisionTransformer
from vitreg.probes.heads.dense_head import MIN_STEPS
from vitreg.probes.protocols import (
    DepthConfig,
    KNNConfig,
    LinearConfig,
    PositionConfig,
    ReconstructionConfig,
    SegmentationConfig,
    SingleTokenConfig,
    ZeroShotConfig,
)
from vitreg.probes.results.score import ProbeResult
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.store.origin import StoredData
from vitreg.probes.tasks.depth import depth_blocks, linear_depth
from vitreg.probes.tasks.knn import knn
from vitreg.probes.tasks.linear import linear, linear_blocks
from vitreg.probes.tasks.position import position
from vitreg.probes.tasks.reconstruction import reconstruction
from vitreg.probes.tasks.segmentation import linear_segmentation
from vitreg.probes.tasks.single_token import single_token
from vitreg.probes.tasks.text_encoders import load_text_encoder
from vitreg.probes.tasks.zero_shot import zero_shot

Task = Literal["classification", "segmentation", "depth"]
Blocks = Callable[[Any, int], tuple[int, ...]]


@dataclass(frozen=True)
class EvalData:
    """What probes are asked on.

    Attributes:
        task: its kind.
        train, val: the images; those of segmentation and depth have targets.
        size: height and width in pixels that models see, but for whole patches; None for that of each probe's protocol.
        class_names: words for the classes, where the set has only numbers.
    """

    task: Task
    train: ImageSet
    val: ImageSet
    size: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None

    @cached_property
    def stored(self) -> dict[str, StoredData]:
        """What features of the two parts are of."""
        return {"training": StoredData.of(self.train), "validation": StoredData.of(self.val)}

    @cached_property
    def digest(self) -> str:
        """Changes with all that answers are of: images, labels, classes and their names, targets as they are read."""
        dense = [one.targets_digest() for one in (self.train, self.val) if isinstance(one, DenseSet)]
        images = [one.digest for one in self.stored.values()]
        return f"images {images}, targets {dense}, class names {self.class_names}"


@dataclass(frozen=True)
class ProbeInput:
    """A model on a set of images, as probes see it.

    Attributes:
        vit: the model.
        source: what it was loaded from, which has the text tower of a CLIP.
        train: its features of the training images.
        vals: its features of the validation images, first in the size of `train`, then in each of `Probe.enlarged`.
        data: what the features are of.
        state: a file for what a probe keeps while it trains.
    """

    vit: VisionTransformer
    source: str
    train: FeatureStore
    vals: tuple[FeatureStore, ...]
    data: EvalData
    state: Path

    @property
    def val(self) -> FeatureStore:
        """Its features of the validation images, in the size of `train`."""
        return self.vals[0]

    @property
    def device(self) -> torch.device:
        """Where the model is, and probes are trained."""
        return next(self.vit.parameters()).device


Ask = Callable[[ProbeInput, Any, OnProgress], ProbeResult]


@dataclass(frozen=True)
class Probe:
    """A probe.

    Attributes:
        title: for tables.
        task: the kind of data it is asked on.
        config: its settings, by default the paper's protocol.
        ask: what makes it.
        blocks: whose tokens it needs, of a model of so many blocks.
        patches: whether it needs patch tokens of these blocks.
        labels: whether it needs the classes of images.
        trains: whether it needs training images.
        enlarged: by how much the validation images are enlarged besides, for predictions that are averaged over
            sizes.
        size: short side in pixels of the protocol, which a model whose own size is smaller does not see; None for each
            checkpoint's own. DINOv2 evaluates k-NN and linear classifiers at 224 pixels, whatever the size of its last
            training; 512 is that of the usual crops of ADE20k, 480 NYUv2's own.
        quick: the settings cut to so many training images.
    """

    title: str
    task: Task
    config: Any
    ask: Ask
    blocks: Blocks = lambda config, depth: (depth - 1,)
    patches: bool = False
    labels: bool = False
    trains: bool = True
    enlarged: tuple[float, ...] = ()
    size: int | None = 224
    quick: Callable[[Any, int], Any] = lambda config, num_train: config


def _of_stores(probe: Callable[..., ProbeResult]) -> Ask:
    """Of a probe that reads features alone."""
    return lambda s, config, progress: probe(s.train, s.val, config, device=s.device, on_progress=progress)


def _linear(s: ProbeInput, config: LinearConfig, on_progress: OnProgress) -> ProbeResult:
    return linear(s.train, s.val, config, device=s.device, state=s.state, on_progress=on_progress)


def _zero_shot(s: ProbeInput, config: ZeroShotConfig, on_progress: OnProgress) -> ProbeResult:
    text = load_text_encoder(s.source, device=s.device)
    return zero_shot(s.val, s.vit, text, s.data.class_names, config, on_progress=on_progress)


def _reconstruction(s: ProbeInput, config: ReconstructionConfig, on_progress: OnProgress) -> ProbeResult:
    return reconstruction(s.train, s.val, s.data.train, s.data.val, config, device=s.device, on_progress=on_progress)


def _dense(probe: Callable[..., ProbeResult], blocks: Blocks, **options: Any) -> dict[str, Any]:
    """What probes of every pixel have in common: their heads read the blocks that they need."""

    def ask(s: ProbeInput, config: Any, on_progress: OnProgress) -> ProbeResult:
        config = dataclasses.replace(config, blocks=blocks(config, s.vit.config.depth))
        vals = s.vals if len(s.vals) > 1 else s.val
        return probe(s.train, vals, (s.data.train, s.data.val), config, device=s.device, on_progress=on_progress)

    return {"ask": ask, "blocks": blocks, "patches": True, "quick": _quick_head, **options}


def _own_block(config: Any, depth: int) -> tuple[int, ...]:
    return (config.block,)


def _own_blocks(config: Any, depth: int) -> tuple[int, ...]:
    return config.blocks


def _last_four_blocks(config: Any, depth: int) -> tuple[int, ...]:
    return tuple(range(max(0, depth - 4), depth))


def _quick_head(config: SegmentationConfig | DepthConfig, num_train: int) -> SegmentationConfig | DepthConfig:
    """The protocol's epochs, but fewer steps at least."""
    steps = max(_QUICK_STEPS, config.epochs * num_train // config.head_batch_size)
    return config if steps >= (config.steps or MIN_STEPS) else dataclasses.replace(config, steps=steps)


def _quick_linear(config: LinearConfig, num_train: int) -> LinearConfig:
    """A hundred epochs."""
    iterations = max(_QUICK_STEPS, 100 * num_train // config.head_batch_size)
    return dataclasses.replace(config, epochs=1, epoch_length=min(iterations, config.num_iterations))


def _quick_tokens(config: SingleTokenConfig, num_train: int) -> SingleTokenConfig:
    """Two draws, every fifth C."""
    logistic = dataclasses.replace(config.logistic, C=config.logistic.C[::5])
    return dataclasses.replace(config, draws=min(2, config.draws), logistic=logistic)


_QUICK_STEPS = 200

QUICK = "-quick"
"""Behind the name of a probe that was asked with a protocol cut to the data."""

PROBES: dict[str, Probe] = {
    "knn": Probe("k-NN", "classification", KNNConfig(), _of_stores(knn), labels=True),
    "linear": Probe(
        "linear", "classification", LinearConfig(), _linear, lambda config, depth: linear_blocks(depth, config),
        labels=True, quick=_quick_linear,
    ),
    "zero-shot": Probe(
        "zero-shot", "classification", ZeroShotConfig(), _zero_shot, labels=True, trains=False, size=None,
        quick=lambda config, _: dataclasses.replace(config, templates="simple"),
    ),
    "tokens": Probe(
        "one token", "classification", SingleTokenConfig(), _of_stores(single_token), _own_block, patches=True,
        labels=True, quick=_quick_tokens,
    ),
    "position": Probe(
        "position", "classification", PositionConfig(), _of_stores(position), _own_block, patches=True,
        quick=lambda config, _: dataclasses.replace(config, epochs=min(5, config.epochs)),
    ),
    "reconstruction": Probe(
        "reconstruction", "classification", ReconstructionConfig(), _reconstruction, _own_block, patches=True
    ),
    "segmentation": Probe(
        "segmentation", "segmentation", SegmentationConfig(),
        **_dense(linear_segmentation, _own_blocks, size=512),
    ),
    "segmentation-ms": Probe(
        "segmentation, +ms", "segmentation", SegmentationConfig(),
        **_dense(linear_segmentation, _last_four_blocks, size=512, enlarged=(1.32, 1.73)),
    ),
    "depth": Probe("depth, lin.1", "depth", DepthConfig(), **_dense(linear_depth, _own_blocks, size=480)),
    "depth-lin4": Probe(
        "depth, lin.4", "depth", DepthConfig(),
        **_dense(linear_depth, lambda _, depth: depth_blocks(depth, "lin.4"), size=480),
    ),
}  # fmt: skip
"""By the names that `vitreg evaluate` takes, in the order of a table's columns."""

TITLES = {name: probe.title for name, probe in PROBES.items()} | {"discovery": "object discovery"}
"""For tables, object discovery included, which has a protocol of its own."""
