"""Linear classification: a grid of heads trained side by side on stored features, the best of which counts."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitreg.common.disk import replacing
from vitreg.common.progress import OnProgress
from vitreg.probes.heads.linear_grid import LinearConfig, LinearGrid
from vitreg.probes.results.score import ProbeResult, Score
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.tasks.classes import check_classes, check_finite

_FORMAT = "vitreg-linear/1"


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
    on_progress: OnProgress | None = None,
) -> ProbeResult:
    """Train all heads, and report the one that is best on the validation images, as the protocol does.

    The protocol augments images (random crops, flips) every time they are seen. Here features were computed once, of
    the images as they are for validation, so figures are a little lower than the protocol's.

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
    features, columns = _table(train, inputs)
    training = LinearGrid(features, columns, classes.train, classes.num_classes, config, device)
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
    right = training.right(_table(val, inputs)[0], classes.val)
    accuracies = 100 * right.cpu().double().mean(1)
    best = int(accuracies.argmax())
    heads = [
        {"input": str(kind), "learning_rate": rate, "top-1": accuracies[number].item()}
        for number, (kind, rate) in enumerate((kind, rate) for kind in inputs for rate in config.learning_rates)
    ]
    details = {
        "best": heads[best],
        "heads": heads,
        "num_iterations": config.num_iterations,
        "head_batch_size": config.head_batch_size,
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


def _table(store: FeatureStore, inputs: tuple[_Input, ...]) -> tuple[Float[Tensor, "N D"], list[slice]]:
    """The features of all images, each once, and which of its columns every kind of input is.

    Inputs overlap: those of a ViT-L on ImageNet are 63 GB one by one, and 26 GB in one table.
    """
    deepest, num_means = max(kind.blocks for kind in inputs), max(kind.mean_patch for kind in inputs)
    read = [partial(store.cls, block) for block in range(-deepest, 0)] + [partial(store.mean_patch, -1)] * num_means
    table: Tensor | None = None
    for number, tokens in enumerate(each() for each in read):
        assert tokens is not None
        check_finite(tokens, f"a feature in {store.path}")
        if table is None:
            table = tokens.new_empty(len(tokens), len(read), tokens.shape[1])
        table[:, number] = tokens
    assert table is not None
    width = table.shape[2]
    columns = [slice((deepest - kind.blocks) * width, (deepest + kind.mean_patch) * width) for kind in inputs]
    return table.flatten(1), columns


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

    def write(self, training: LinearGrid) -> None:
        """Replace it.

        Raises:
            ValueError: there is no room.
        """
        note = {"format": _FORMAT, **self._origin, "iteration": training.iteration}
        tensors = {name: tensor.cpu() for name, tensor in training.tensors.items()}
        with replacing(self._path) as temporary:
            temporary.write_bytes(save(tensors, {"vitreg": json.dumps(note)}))

    def read_into(self, training: LinearGrid) -> None:
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
