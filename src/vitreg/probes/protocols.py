"""The protocols: how each probe is asked. One frozen config a probe, with the papers' settings as defaults.

The command line is built from them, so nothing here imports PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar


def _positive(config: Any, *names: str, must_be: str = "above 0") -> None:
    """Refuse settings, or values of them, that are not."""
    for name in names:
        value = getattr(config, name)
        several = value if isinstance(value, tuple) else (value,)
        if not several:
            raise ValueError(f"{name} is empty; give at least one")
        if min(several) <= 0:
            raise ValueError(f"{name} is {value}; {'all' if several is value else 'it'} must be {must_be}")


@dataclass(frozen=True)
class KNNConfig:
    """DINOv2's `eval/knn.py`.

    Attributes:
        k: numbers of neighbors; the first is the one for a table of all probes. DINOv2 reports all of them.
        temperature: a neighbor's vote weighs `exp(cosine similarity / temperature)`.
    """

    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k is {self.k}; give at least one number of neighbors, all above 0")
        _positive(self, "temperature")


@dataclass(frozen=True)
class LinearConfig:
    """DINOv2's `eval/linear.py`: one head for each combination of the first three.

    Attributes:
        blocks: the class tokens of so many last blocks are a head's input.
        mean_patch: whether the mean patch token of the last block is added to it.
        learning_rates: for 256 images a batch, and scaled to `head_batch_size`.
        head_batch_size: images an iteration of the heads' training.
        epochs: in the protocol's sense, a number of iterations.
        epoch_length: iterations an epoch.
        momentum: of SGD, which has no weight decay here.
        seed: of the weights and of the order of images.
    """

    blocks: tuple[int, ...] = (1, 4)
    mean_patch: tuple[bool, ...] = (False, True)
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    head_batch_size: int = 128
    epochs: int = 10
    epoch_length: int = 1250
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "blocks", "learning_rates")
        if not self.mean_patch:
            raise ValueError("mean_patch is empty; give at least one")
        _positive(self, "head_batch_size", "epochs", "epoch_length", must_be="at least 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be from 0 to below 1")

    @property
    def num_iterations(self) -> int:
        """Of all epochs."""
        return self.epochs * self.epoch_length


@dataclass(frozen=True)
class ZeroShotConfig:
    """How classes are put into words.

    Attributes:
        templates: `"openai"` (80 sentences a class), `"simple"` (7), or one's own, with `{}` for the class.
    """

    templates: str | tuple[str, ...] = "openai"


@dataclass(frozen=True)
class LogisticConfig:
    """How a logistic regression is fitted; by default as DINOv2's `eval/log_regression.py`, but for `tolerance`.

    Attributes:
        C: inverse strengths of the penalty, the best of which is taken.
        max_iter: of L-BFGS, for each fit.
        tolerance: a fit ends when no element of the gradient of the mean loss is larger, as scikit-learn's `tol`.
            (DINOv2 asks for 1e-12 in float64, which float32 cannot reach.)
        held_back: random share of the training set on which C is chosen; one image of every class is always fitted.
        patience: larger C are not tried after so many in a row that did worse than the best.
        held_back_seed: of the choice of what is held back.
    """

    C: tuple[float, ...] = tuple(10.0 ** (exponent / 4) for exponent in range(-24, 21))
    max_iter: int = 1000
    tolerance: float = 1e-5
    held_back: float = 0.1
    patience: int = 8
    held_back_seed: int = 0

    def __post_init__(self) -> None:
        if not self.C or min(self.C) <= 0:
            raise ValueError(f"C is {self.C}; give at least one number, all above 0")
        if not 0 < self.held_back < 1:
            raise ValueError(f"held_back is {self.held_back}; it must be a share between 0 and 1")
        _positive(self, "max_iter", "patience", must_be="at least 1")
        _positive(self, "tolerance")


@dataclass(frozen=True)
class SingleTokenConfig:
    """Tables 1 and 6 of "Vision Transformers Need Registers".

    Attributes:
        block: whose tokens are classified, counted from 0, negative from the end.
        draws: how often a patch of every image is drawn, for the deviation. The paper does not say how often; five
            tell a deviation of a tenth of a point from one of a point, which is what its table is read for.
        min_images: a kind of token that fewer images of the training or the validation set have has no figure.
        logistic: how classifiers are fitted. C is chosen with the first draw, and holds for all.
        seed: of the draws.
    """

    block: int = -1
    draws: int = 5
    min_images: int = 50
    logistic: LogisticConfig = field(default_factory=LogisticConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "draws", "min_images", must_be="at least 1")


@dataclass(frozen=True)
class PositionConfig:
    """How the position probe is trained. The paper publishes none of it.

    Adam, a cosine schedule, at most 30 epochs and a patience of 3 are of a later paper's probe (Baxevanakis et al.,
    from a summary of it), without its squared error beside the cross-entropy; the other numbers are ours.

    Attributes:
        block: whose patch tokens, counted from 0, negative from the end.
        learning_rate: at the start; it falls to zero along a cosine.
        epochs: at most.
        patience: training ends after so many epochs in which the loss on held out images did not fall, and the best
            weights are kept.
        held_out: so many training images at most, and at most a tenth of them, are held out for that.
        head_batch_size: patches a step of the head's training.
        seed: of the order of patches.
    """

    block: int = -1
    learning_rate: float = 3e-3
    epochs: int = 30
    patience: int = 3
    held_out: int = 200
    head_batch_size: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "epochs", "patience", "held_out", "head_batch_size")


@dataclass(frozen=True)
class ReconstructionConfig:
    """What the reconstruction probe reads.

    Attributes:
        block: whose patch tokens, counted from 0, negative from the end.
    """

    block: int = -1


@dataclass(frozen=True)
class SegmentationConfig:
    """DINOv2's linear protocol (Oquab et al. 2023).

    Its `BNHead` and the published config of DVT (Yang et al. 2024): batch normalization and a 1 x 1 convolution, logits
    upsampled bilinearly, cross-entropy, AdamW, linear warm-up and linear decay to 0. There: 40000 steps of 16
    images of ADE20k, which are 32 epochs, with random scales, crops, flips and colors. Here images are whole and
    not augmented, because their features are computed once, and the loss is taken at 4 x 4 points a patch.

    Attributes:
        blocks: whose patch tokens are concatenated: the last; the last four are DINOv2's +ms, which also averages over
            several sizes of the test images.
        lr, weight_decay, betas: of AdamW.
        warmup: part of the steps in which the learning rate rises.
        head_batch_size: images a step of the head's training.
        steps: of training; by default 32 epochs, at least 2000 steps.
        seed: of the initial weights and the images' order.
    """

    epochs: ClassVar[int] = 32
    blocks: tuple[int, ...] = (-1,)
    lr: float = 1e-3
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 1500 / 40000
    head_batch_size: int = 16
    steps: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class DepthConfig:
    """DINOv2's linear protocol (Oquab et al. 2023).

    Optimized as in DVT's published config (Yang et al. 2024). The class token is put behind every patch token, a 1 x 1
    convolution gives bins, upsampled 4 times, and a pixel's depth is the mean of the bins' depths. SigLoss, of its
    mean term alone for the first 100 steps; AdamW, one cycle of learning rate and momentum that rises for a third
    of the steps, gradients clipped at 35. There: 38400 steps of 16 images of NYUv2, which are 25 epochs, with
    random crops, rotations, flips and colors, and predictions averaged with those of the mirrored image. Here
    images are whole, not augmented and not mirrored, because their features are computed once, and the loss is
    taken at 4 x 4 points a patch.

    Attributes:
        blocks: whose tokens are concatenated: the last; DINOv2's lin.4 takes four.
        batch_norm: normalize channels before the convolution, as DINOv3 does.
        bins: number of depths.
        min_depth, max_depth: meters, of the first and last bin; what is beyond is neither trained on nor judged.
        eigen_crop: judge by the middle of 480 x 640 images only (Eigen et al. 2014); by default those of NYUv2, for
            which it is the custom.
        lr, weight_decay: of AdamW.
        head_batch_size: images a step of the head's training.
        steps: of training; by default 25 epochs, at least 2000 steps.
        seed: of the initial weights and the images' order.
    """

    epochs: ClassVar[int] = 25
    blocks: tuple[int, ...] = (-1,)
    batch_norm: bool = False
    bins: int = 256
    min_depth: float = 0.001
    max_depth: float = 10.0
    eigen_crop: bool | None = None
    lr: float = 5e-3
    weight_decay: float = 0.01
    head_batch_size: int = 16
    steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.min_depth < self.max_depth:
            raise ValueError(f"min_depth {self.min_depth} and max_depth {self.max_depth} must be above 0 and rise")
