"""Linear classification: a grid of heads trained side by side on stored features, the best of which counts."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitreg.disk import replacing, writing
from vitreg.probes.classes import check_classes, check_finite
from vitreg.probes.score import ProbeResult, Score
from vitreg.probes.store import FeatureStore

_FORMAT = "vitreg-linear/1"
_ROWS = 1024


@dataclass(frozen=True)
class LinearConfig:
    """DINOv2's `eval/linear.py`: one head for each combination of the first three.

    Attributes:
        blocks: the class tokens of so many last blocks are a head's input.
        mean_patch: whether the mean patch token of the last block is added to it.
        learning_rates: for 256 pictures a batch, and scaled to `batch_size`.
        batch_size: pictures an iteration.
        epochs: in the protocol's sense, a number of iterations.
        epoch_length: iterations an epoch.
        momentum: of SGD, which has no weight decay here.
        seed: of the weights and of the order of pictures.
    """

    blocks: tuple[int, ...] = (1, 4)
    mean_patch: tuple[bool, ...] = (False, True)
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    batch_size: int = 128
    epochs: int = 10
    epoch_length: int = 1250
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("blocks", "mean_patch", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one")
        for name in ("blocks", "learning_rates"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; all must be above 0")
        for name in ("batch_size", "epochs", "epoch_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be from 0 to below 1")

    @property
    def num_iterations(self) -> int:
        """Of all epochs."""
        return self.epochs * self.epoch_length


def linear_blocks(depth: int, config: LinearConfig | None = None) -> tuple[int, ...]:
    """The blocks that a store must have, counted from the end; all of them where the model has fewer.

    Args:
        depth: blocks of the model.
        config: by default a `LinearConfig()`.
    """
    return tuple(range(-min(max((config or LinearConfig()).blocks), depth), 0))


def linear(
    train: FeatureStore,
    val: FeatureStore,
    config: LinearConfig | None = None,
    *,
    state: Path | None = None,
    save_seconds: float = 10.0,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> ProbeResult:
    """Train all heads, and report the one that is best on the validation pictures, as the protocol does.

    The protocol augments pictures (random crops, flips) every time they are seen. Here features were computed once, of
    the pictures as they are for validation, so figures are a little lower than the protocol's.

    Inputs without class token are the mean patch token only. Where a model has fewer blocks than a head asks for, the
    head reads all there are, and heads that would be the same are trained once.

    Args:
        train: what heads are trained on.
        val: what accuracies are of.
        config: by default a `LinearConfig()`.
        state: a file that the training goes on from, made where there is none. After a kill at any moment, the result
            on the same machine is bit for bit that of a training that was not killed.
        save_seconds: how often it is written.
        device: on which heads are trained.
        on_progress: called with the number of iterations done and their total.

    Returns:
        Top-1 of the best head; `details["heads"]` has all.

    Raises:
        ValueError: the stores are not of one model and the same classes, lack a block, or `state` is of something else.
    """
    config = config or LinearConfig()
    classes = check_classes(train, val)
    inputs = _inputs(train, config)
    training = _Training(_features(train, inputs), classes.train, classes.num_classes, inputs, config, device)
    saved = None if state is None else _State(state, train, config)
    if saved is not None:
        saved.read_into(training)
    last = time.monotonic()
    pause = save_seconds
    while training.iteration < config.num_iterations:
        training.step()
        finished = training.iteration == config.num_iterations
        now = time.monotonic()
        if saved is not None and (finished or now - last >= pause):
            saved.write(training)
            last = time.monotonic()
            # A large state on a slow disk must not be most of the work.
            pause = max(save_seconds, 20 * (last - now))
        if on_progress is not None:
            on_progress(training.iteration, config.num_iterations)
    right = training.right(_features(val, inputs), classes.val)
    accuracies = 100 * right.double().mean(1)
    best = int(accuracies.argmax())
    heads = [
        {"input": str(kind), "learning_rate": rate, "top-1": accuracies[number].item()}
        for number, (kind, rate) in enumerate((kind, rate) for kind in inputs for rate in config.learning_rates)
    ]
    details = {
        "best": heads[best],
        "heads": heads,
        "num_iterations": config.num_iterations,
        "batch_size": config.batch_size,
        "num_train": train.num_images,
        "num_val": val.num_images,
        "num_classes": classes.num_classes,
        "classes_without_val": classes.without_val,
    }
    return ProbeResult("linear", (Score.mean("top-1", right[best].numpy(), unit="%"),), details)


@dataclass(frozen=True)
class _Input:
    """What a head reads: the class tokens of the last blocks, the mean patch token of the last block."""

    blocks: int
    mean_patch: bool

    def __str__(self) -> str:
        parts = [f"class token of the last {'block' if self.blocks == 1 else f'{self.blocks} blocks'}"] * bool(
            self.blocks
        )
        return " and ".join(parts + ["mean patch"] * self.mean_patch)


def _inputs(store: FeatureStore, config: LinearConfig) -> tuple[_Input, ...]:
    """The kinds of input of a model, each once."""
    if store.cls(-1) is None:
        return (_Input(0, True),)
    blocks = [min(number, store.depth) for number in config.blocks]
    return tuple(dict.fromkeys(_Input(number, mean) for number in blocks for mean in config.mean_patch))


def _features(store: FeatureStore, inputs: tuple[_Input, ...]) -> list[Float[Tensor, "N _"]]:
    """Every kind of input of all pictures."""
    deepest = max(kind.blocks for kind in inputs)
    tokens = [token for block in range(-deepest, 0) if (token := store.cls(block)) is not None]
    mean = store.mean_patch(-1)
    found = [torch.cat([*tokens[deepest - kind.blocks :], *[mean] * kind.mean_patch], 1) for kind in inputs]
    for features in found:
        check_finite(features, f"a feature in {store.path}")
    return found


class _Training:
    """All heads of one kind of input are one matrix, so that each kind costs two matrix products an iteration.

    Attributes:
        iteration: the next one.
        tensors: weights and momentum, which with `iteration` are the whole state.
    """

    def __init__(
        self,
        features: list[Tensor],
        labels: Tensor,
        num_classes: int,
        inputs: tuple[_Input, ...],
        config: LinearConfig,
        device: torch.device | str,
    ) -> None:
        self._features = [each.to(device) for each in features]
        self._labels, self._num_classes, self._config = labels.to(device), num_classes, config
        self.iteration = 0
        scaled = torch.tensor(config.learning_rates) * config.batch_size / 256
        self._rates = scaled.repeat_interleave(num_classes)[:, None].to(device)
        rows = len(config.learning_rates) * num_classes
        generator = torch.Generator().manual_seed(config.seed)
        self.tensors: dict[str, Tensor] = {}
        for number, each in enumerate(features):
            weight = 0.01 * torch.randn(rows, each.shape[1], generator=generator)
            self.tensors |= {
                f"weight.{number}": weight.to(device),
                f"weight_momentum.{number}": torch.zeros_like(weight, device=device),
                f"bias.{number}": torch.zeros(rows, 1, device=device),
                f"bias_momentum.{number}": torch.zeros(rows, 1, device=device),
            }
        self._order: tuple[int, Tensor] | None = None

    def step(self) -> None:
        """One iteration of SGD, with the mean of the cross-entropy over the batch."""
        config = self._config
        rows = self._batch()
        labels = self._labels[rows][:, None, None].expand(-1, len(config.learning_rates), 1)
        decay = 0.5 * (1 + math.cos(math.pi * self.iteration / config.num_iterations))
        for number, features in enumerate(self._features):
            weight, bias, weight_momentum, bias_momentum = self._of(number)
            x = features[rows]
            residual = self._logits(x, weight, bias).softmax(2)
            residual.scatter_add_(2, labels, residual.new_full(labels.shape, -1))
            gradient = residual.flatten(1).div_(len(rows))
            weight_momentum.addmm_(gradient.T, x, beta=config.momentum)
            bias_momentum.mul_(config.momentum).add_(gradient.sum(0)[:, None])
            weight.addcmul_(weight_momentum, self._rates, value=-decay)
            bias.addcmul_(bias_momentum, self._rates, value=-decay)
        self.iteration += 1

    def right(self, features: list[Tensor], labels: Int[Tensor, " N"]) -> Tensor:
        """Which pictures every head classifies correctly: [heads, N]."""
        found: list[Tensor] = []
        for number, each in enumerate(features):
            weight, bias, _, _ = self._of(number)
            chunks = [self._logits(x.to(weight.device), weight, bias).argmax(2) for x in each.split(_ROWS)]
            found.append(torch.cat(chunks).T.cpu() == labels)
        return torch.cat(found)

    def _of(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            self.tensors[f"weight.{number}"],
            self.tensors[f"bias.{number}"],
            self.tensors[f"weight_momentum.{number}"],
            self.tensors[f"bias_momentum.{number}"],
        )

    def _logits(self, x: Tensor, weight: Tensor, bias: Tensor) -> Float[Tensor, "B heads K"]:
        return torch.addmm(bias[:, 0], x, weight.T).unflatten(1, (-1, self._num_classes))

    def _batch(self) -> Tensor:
        """Rows of the batch, from the seed and the iteration alone: one shuffled pass over the pictures after another."""
        size, total = self._config.batch_size, len(self._labels)
        first = self.iteration * size
        parts: list[Tensor] = []
        while size:
            number, position = divmod(first, total)
            part = self._shuffled(number)[position : position + size]
            parts.append(part)
            first, size = first + len(part), size - len(part)
        return torch.cat(parts).to(self._labels.device)

    def _shuffled(self, number: int) -> Tensor:
        if self._order is None or self._order[0] != number:
            generator = torch.Generator().manual_seed((self._config.seed << 32) + number + 1)
            self._order = number, torch.randperm(len(self._labels), generator=generator)
        return self._order[1]


class _State:
    """The file that a training goes on from.

    Args:
        path: of the file.
        train: what the training is on.
        config: of the training.
    """

    def __init__(self, path: Path, train: FeatureStore, config: LinearConfig) -> None:
        self._path = path.expanduser()
        origin = train.origin
        self._origin = {
            "features": f"{origin.model}, {origin.data}, store {origin.digest()[:8]}",
            "config": json.dumps(dataclasses.asdict(config)),
        }

    def write(self, training: _Training) -> None:
        """Replace it.

        Raises:
            ValueError: there is no room.
        """
        note = {"format": _FORMAT, **self._origin, "iteration": training.iteration}
        tensors = {name: tensor.cpu() for name, tensor in training.tensors.items()}
        with writing(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as temporary:
                temporary.write_bytes(save(tensors, {"vitreg": json.dumps(note)}))

    def read_into(self, training: _Training) -> None:
        """Go on where it is, if there is one.

        Raises:
            ValueError: it is damaged, or of another training.
        """
        if not self._path.exists():
            return
        try:
            with safe_open(self._path, framework="pt") as file:
                note: dict[str, Any] = json.loads((file.metadata() or {})["vitreg"])
                if note["format"] != _FORMAT:
                    raise KeyError(_FORMAT)
                for name, ours in self._origin.items():
                    if note[name] != ours:
                        raise ValueError(
                            f"{self._path} is of other {name}: {note[name]}, not {ours}; choose another file"
                        )
                for name, tensor in training.tensors.items():
                    tensor.copy_(file.get_tensor(name))
            training.iteration = int(note["iteration"])
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self._path} is damaged or no state of a linear probe ({error}); delete it") from error
