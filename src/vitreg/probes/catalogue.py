"""The probes by name: what each is asked on, what it needs of the feature pass, and how to ask it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from vitreg.common.progress import OnProgress
from vitreg.images import DepthSet, ImageSet, SegmentationSet
from vitreg.model import VisionTransformer
from vitreg.probes.heads.dense_head import MIN_STEPS
from vitreg.probes.protocols import PositionConfig
from vitreg.probes.results.score import ProbeResult
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.tasks.depth import EPOCHS as DEPTH_EPOCHS
from vitreg.probes.tasks.depth import DepthConfig, depth_blocks, linear_depth
from vitreg.probes.tasks.knn import KNNConfig, knn
from vitreg.probes.tasks.linear import LinearConfig, linear, linear_blocks
from vitreg.probes.tasks.position import position
from vitreg.probes.tasks.reconstruction import ReconstructionConfig, reconstruction
from vitreg.probes.tasks.segmentation import EPOCHS as SEGMENTATION_EPOCHS
from vitreg.probes.tasks.segmentation import SegmentationConfig, linear_segmentation
from vitreg.probes.tasks.single_token import SingleTokenConfig, single_token
from vitreg.probes.tasks.text_encoders import load_text_encoder
from vitreg.probes.tasks.zero_shot import ZeroShotConfig, zero_shot

Task = Literal["classification", "segmentation", "depth"]


@dataclass(frozen=True)
class ProbeInput:
    """A model on a set of images, as probes see it.

    Attributes:
        vit: the model.
        source: what it was loaded from, which has the text tower of a CLIP.
        train: its features of the training images.
        vals: its features of the validation images, first in the size of `train`, then in each of `Probe.enlarged`.
        train_images, val_images: the images that they are of.
        class_names: words for the classes, where the set has only numbers.
        state: a file for what a probe keeps while it trains.
    """

    vit: VisionTransformer
    source: str
    train: FeatureStore
    vals: tuple[FeatureStore, ...]
    train_images: ImageSet
    val_images: ImageSet
    class_names: tuple[str, ...] | None
    state: Path

    @property
    def val(self) -> FeatureStore:
        """Its features of the validation images, in the size of `train`."""
        return self.vals[0]

    @property
    def device(self) -> torch.device:
        """Where the model is, and probes are trained."""
        return next(self.vit.parameters()).device


@dataclass(frozen=True)
class Probe:
    """A probe.

    Attributes:
        title: for tables.
        task: the kind of data it is asked on.
        config: its settings, by default the paper's protocol.
        blocks: whose tokens it needs, of a model of so many blocks.
        patches: whether it needs patch tokens of these blocks.
        ask: what makes it.
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
    blocks: Callable[[Any, int], tuple[int, ...]]
    patches: bool
    ask: Callable[[ProbeInput, Any, OnProgress], ProbeResult]
    labels: bool = False
    trains: bool = True
    enlarged: tuple[float, ...] = ()
    size: int | None = 224
    quick: Callable[[Any, int], Any] = lambda config, num_train: config


def _own_block(config: Any, depth: int) -> tuple[int, ...]:
    return (config.block,)


def _blocks(config: Any, depth: int) -> tuple[int, ...]:
    return config.blocks


def _last_block(config: Any, depth: int) -> tuple[int, ...]:
    return (depth - 1,)


def _last_four_blocks(config: Any, depth: int) -> tuple[int, ...]:
    return tuple(range(max(0, depth - 4), depth))


def _zero_shot(case: ProbeInput, config: ZeroShotConfig, on_progress: OnProgress) -> ProbeResult:
    text = load_text_encoder(case.source, device=case.device)
    return zero_shot(case.val, case.vit, text, case.class_names, config, on_progress=on_progress)


def _segmentation(s: ProbeInput, config: SegmentationConfig, on_progress: OnProgress) -> ProbeResult:
    train, val = s.train_images, s.val_images
    assert isinstance(train, SegmentationSet)
    assert isinstance(val, SegmentationSet)
    return linear_segmentation(s.train, s.vals, (train, val), config, device=s.device, on_progress=on_progress)


def _segmentation_ms(s: ProbeInput, config: SegmentationConfig, on_progress: OnProgress) -> ProbeResult:
    return _segmentation(
        s, dataclasses.replace(config, blocks=_last_four_blocks(config, s.vit.config.depth)), on_progress
    )


def _depth_lin4(s: ProbeInput, config: DepthConfig, on_progress: OnProgress) -> ProbeResult:
    blocks = depth_blocks(s.vit.config.depth, "lin.4")
    return _depth(s, dataclasses.replace(config, blocks=blocks), on_progress)


def _depth(s: ProbeInput, config: DepthConfig, on_progress: OnProgress) -> ProbeResult:
    train, val = s.train_images, s.val_images
    assert isinstance(train, DepthSet)
    assert isinstance(val, DepthSet)
    return linear_depth(s.train, s.val, (train, val), config, device=s.device, on_progress=on_progress)


def _quick_linear(config: LinearConfig, num_train: int) -> LinearConfig:
    """A hundred epochs."""
    iterations = max(_QUICK_STEPS, 100 * num_train // config.head_batch_size)
    return dataclasses.replace(config, epochs=1, epoch_length=min(iterations, config.num_iterations))


def _quick_tokens(config: SingleTokenConfig, num_train: int) -> SingleTokenConfig:
    """Two draws, every fifth C."""
    logistic = dataclasses.replace(config.logistic, C=config.logistic.C[::5])
    return dataclasses.replace(config, draws=min(2, config.draws), logistic=logistic)


def _quick_position(config: PositionConfig, num_train: int) -> PositionConfig:
    return dataclasses.replace(config, epochs=min(5, config.epochs))


def _quick_head(epochs: int, config: Any, num_train: int) -> Any:
    """The protocol's epochs, but fewer steps at least."""
    steps = max(_QUICK_STEPS, epochs * num_train // config.head_batch_size)
    return config if steps >= (config.steps or MIN_STEPS) else dataclasses.replace(config, steps=steps)


_QUICK_STEPS = 200

QUICK = "-quick"
"""Behind the name of a probe that was asked with a protocol cut to the data."""

_DENSE: dict[str, dict[str, Any]] = {
    "segmentation": {"size": 512, "quick": partial(_quick_head, SEGMENTATION_EPOCHS)},
    "depth": {"size": 480, "quick": partial(_quick_head, DEPTH_EPOCHS)},
}

PROBES: dict[str, Probe] = {
    "knn": Probe(
        "k-NN", "classification", KNNConfig(), _last_block, False,
        lambda s, config, progress: knn(s.train, s.val, config, device=s.device, on_progress=progress),
        labels=True,
    ),
    "linear": Probe(
        "linear", "classification", LinearConfig(), lambda config, depth: linear_blocks(depth, config), False,
        lambda s, config, progress: linear(
            s.train, s.val, config, device=s.device, state=s.state, on_progress=progress
        ),
        labels=True, quick=_quick_linear,
    ),
    "zero-shot": Probe(
        "zero-shot", "classification", ZeroShotConfig(), _last_block, False, _zero_shot, labels=True, trains=False,
        size=None, quick=lambda config, _: dataclasses.replace(config, templates="simple"),
    ),
    "tokens": Probe(
        "one token", "classification", SingleTokenConfig(), _own_block, True,
        lambda s, config, progress: single_token(s.train, s.val, config, device=s.device, on_progress=progress),
        labels=True, quick=_quick_tokens,
    ),
    "position": Probe(
        "position", "classification", PositionConfig(), _own_block, True,
        lambda s, config, progress: position(s.train, s.val, config, device=s.device, on_progress=progress),
        quick=_quick_position,
    ),
    "reconstruction": Probe(
        "reconstruction", "classification", ReconstructionConfig(), _own_block, True,
        lambda s, config, progress: reconstruction(
            s.train, s.val, s.train_images, s.val_images, config, device=s.device, on_progress=progress
        ),
    ),
    "segmentation": Probe(
        "segmentation", "segmentation", SegmentationConfig(), _blocks, True, _segmentation, **_DENSE["segmentation"]
    ),
    "segmentation-ms": Probe(
        "segmentation, +ms", "segmentation", SegmentationConfig(), _last_four_blocks, True, _segmentation_ms,
        enlarged=(1.32, 1.73), **_DENSE["segmentation"],
    ),
    "depth": Probe("depth, lin.1", "depth", DepthConfig(), _blocks, True, _depth, **_DENSE["depth"]),
    "depth-lin4": Probe(
        "depth, lin.4", "depth", DepthConfig(), lambda _, depth: depth_blocks(depth, "lin.4"), True, _depth_lin4,
        **_DENSE["depth"],
    ),
}  # fmt: skip
"""By the names that `vitreg evaluate` takes, in the order of a table's columns."""

TITLES = {name: probe.title for name, probe in PROBES.items()} | {"discovery": "object discovery"}
"""For tables, object discovery included, which has a protocol of its own."""
