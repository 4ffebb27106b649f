"""Linear classification: a grid of heads trained side by side on stored features, the best of which counts."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.common.progress import OnProgress
from vitreg.probes.heads.linear_grid import LinearGrid
from vitreg.probes.heads.training import fit
from vitreg.probes.protocols import LinearConfig
from vitreg.probes.results.score import ProbeResult, Score
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.store.tensor_file import UNREADABLE, open_tensors, write_tensors
from vitreg.probes.tasks.classes import check_classes, check_finite

_FORMAT = "vitreg-linear/1"


def linear_blocks(depth: int, config: LinearConfig = LinearConfig()) -> tuple[int, ...]:
    """The blocks that a store must have, counted from the end; all of them where the model has fewer."""
    return tuple(range(-min(max(config.blocks), depth), 0))


def linear(
    train: FeatureStore,
    val: FeatureStore,
    config: LinearConfig = LinearConfig(),
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

    `state` is a file that the training goes on from, made where there is none, and written every `save_seconds`. After
    a kill at any moment, the result on the same machine is bit for bit that of a training that was not killed.

    Returns:
        Top-1 of the best head; `details["heads"]` has all.

    Raises:
        ValueError: the stores are not of one model and the same classes, lack a block, or `state` is of something else.
    """
    classes = check_classes(train, val)
    inputs = _inputs(train, config)
    grid = LinearGrid(*_table(train, inputs), classes.train, classes.num_classes, config, device)
    saved = None if state is None else _State(state, grid, train, config, save_seconds)
    fit(
        zip(grid.batches()),
        grid.step,
        config.num_iterations,
        done=grid.iteration,
        ends=lambda _: saved is not None and saved.write_in_time(),
        on_progress=on_progress,
    )
    right = grid.right(_table(val, inputs)[0], classes.val)
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
        **classes.details,
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
    """The file that a training goes on from, if there is one, and that is written every so many seconds.

    Raises:
        ValueError: it is damaged, or of another training.
    """

    def __init__(
        self, path: Path, grid: LinearGrid, train: FeatureStore, config: LinearConfig, save_seconds: float
    ) -> None:
        self._path, self._grid, self._config = path.expanduser(), grid, config
        self._seconds, self._next = save_seconds, time.monotonic() + save_seconds
        origin = train.origin
        self._origin = {
            "features": f"{origin.model}, {origin.data}, store {origin.digest()[:8]}",
            "config": json.dumps(dataclasses.asdict(config)),
        }
        if self._path.exists():
            self._read()

    def write_in_time(self) -> bool:
        """Replace it, where it is time or training is done; `False`, because training goes on.

        Raises:
            ValueError: there is no room.
        """
        start, iteration = time.monotonic(), self._grid.iteration
        if iteration == self._config.num_iterations or start >= self._next:
            note = {"format": _FORMAT, **self._origin, "iteration": iteration}
            write_tensors(self._path, {name: tensor.cpu() for name, tensor in self._grid.tensors.items()}, note)
            # A large state on a slow disk must not be most of the work.
            self._next = (now := time.monotonic()) + max(self._seconds, 20 * (now - start))
        return False

    def _read(self) -> None:
        try:
            with open_tensors(self._path) as (file, note):
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            theirs = {name: note[name] for name in ("format", *self._origin, "iteration")}
            if theirs["format"] != _FORMAT:
                raise ValueError(f"it is not of format {_FORMAT}")
        except UNREADABLE as error:
            raise ValueError(f"{self._path} is damaged or no state of a linear probe ({error}); delete it") from error
        for name, ours in self._origin.items():
            if theirs[name] != ours:
                raise ValueError(f"{self._path} is of other {name}: {theirs[name]}, not {ours}; choose another file")
        for name, tensor in self._grid.tensors.items():
            tensor.copy_(tensors[name])
        self._grid.iteration = theirs["iteration"]
