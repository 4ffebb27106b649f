"""Linear classifiers of where a patch is in the image, trained side by side in the same passes over a store."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from vitreg.common.progress import OnProgress
from vitreg.images import spaced_indices
from vitreg.probes.heads.training import cosine, descend, fit
from vitreg.probes.protocols import PositionConfig
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.tasks.patch_kinds import Group, marked_patches

_Patches = tuple[Float[Tensor, "T D"], Int[Tensor, " T"], Bool[Tensor, " T"]]
"""Standardized tokens, their positions, and which are outliers."""


@dataclass(frozen=True)
class PositionHead:
    """A linear classifier of patch tokens.

    Attributes:
        weight, bias: for tokens as they are in a store; the standardization of training is folded in.
        epochs: after so many its weights were the best.
        loss: cross-entropy on the held out images then.
    """

    weight: Float[Tensor, "P D"]
    bias: Float[Tensor, " P"]
    epochs: int = 0
    loss: float = math.inf

    def __call__(self, tokens: Float[Tensor, "*batch D"]) -> Int[Tensor, "*batch"]:
        """The most likely position, a number in row order of the grid."""
        return F.linear(tokens, self.weight.to(tokens.device), self.bias.to(tokens.device)).argmax(-1)


def train_heads(
    store: FeatureStore,
    groups: Sequence[Group],
    config: PositionConfig,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> dict[Group, PositionHead]:
    """One classifier for each group of patches.

    Files are read in their order and the patches of each shuffled: every image has every position, so batches are
    balanced whatever the order of images.

    Raises:
        ValueError: the store has too few images with patch tokens.
    """
    trainer = _Trainer(store, groups, config, torch.device(device))
    epochs = (trainer.batches() for _ in range(config.epochs))
    fit(epochs, trainer.step, config.epochs, ends=trainer.ends, on_progress=on_progress)
    return trainer.best


class _Trainer:
    """Heads with what they are trained on.

    Attributes:
        best: the heads where their loss on the held out images was the smallest.
    """

    def __init__(
        self, store: FeatureStore, groups: Sequence[Group], config: PositionConfig, device: torch.device
    ) -> None:
        self._store, self._config, self._device = store, config, device
        self._mean, self._std, rows = _standardization(store, config.block)
        self._held_out = rows[spaced_indices(len(rows), min(config.held_out, len(rows) // 10))]
        # Found in the first epoch.
        self._held: list[_Patches] = []
        num_positions = math.prod(store.grid)
        # Zeros, as a convex problem needs nothing random.
        self._weights = {group: self._zeros(num_positions, len(self._mean)) for group in groups}
        self._biases = {group: self._zeros(num_positions) for group in groups}
        self._optimizer = torch.optim.Adam([*self._weights.values(), *self._biases.values()], lr=config.learning_rate)
        self._seen, total = 0, config.epochs * num_positions * (len(rows) - len(self._held_out))
        self._schedule = LambdaLR(self._optimizer, lambda _: cosine(self._seen, total))
        self._order = torch.Generator().manual_seed(config.seed)
        self.best = {group: self._folded(group) for group in groups}

    def batches(self) -> Iterator[_Patches]:
        """Every patch once."""
        first = not self._held
        for rows, tokens, outlier in marked_patches(self._store, self._config.block):
            out = torch.isin(rows, self._held_out)
            if first and out.any():
                self._held.append(self._ready(tokens[out], outlier[out]))
            if not out.all():
                patches = self._ready(tokens[~out], outlier[~out])
                order = torch.randperm(len(patches[0]), generator=self._order).to(self._device)
                # As equal as they can be: a last batch of a few patches would be a step as large as any.
                for batch in order.chunk(math.ceil(len(order) / self._config.head_batch_size)):
                    x, y, outliers = (part[batch] for part in patches)
                    yield x, y, outliers

    def step(self, patches: _Patches) -> None:
        """On the sum of the heads' losses, each on its group."""
        x, y, outlier = patches
        members = {group: group.members(outlier) for group in self._weights}
        losses = [F.cross_entropy(self._logits(group, x[m]), y[m]) for group, m in members.items() if m.any()]
        self._seen += len(y)
        descend(torch.stack(losses).sum(), self._optimizer, self._schedule)

    @torch.no_grad()
    def ends(self, epoch: int) -> bool:
        """Whether no head has improved within the last epochs."""
        x, y, outlier = (torch.cat(parts) for parts in zip(*self._held, strict=True))
        self._held = [(x, y, outlier)]
        for group, best in self.best.items():
            member = group.members(outlier)
            # A group without held out patches has a loss of zero, and so ends with its latest weights.
            total = sum(
                float(F.cross_entropy(self._logits(group, x[part]), y[part], reduction="sum"))
                for part in member.nonzero().flatten().split(self._config.head_batch_size)
            )
            loss = total / max(1, int(member.sum()))
            if loss <= best.loss:
                self.best[group] = dataclasses.replace(self._folded(group), epochs=epoch, loss=loss)
        return all(epoch - best.epochs >= self._config.patience for best in self.best.values())

    def _ready(self, tokens: Tensor, outlier: Tensor) -> _Patches:
        """Flat, where training is."""
        x = (tokens - self._mean) / self._std
        y = torch.arange(tokens.shape[1]).repeat(len(tokens))
        return x.flatten(0, 1).to(self._device), y.to(self._device), outlier.flatten().to(self._device)

    def _logits(self, group: Group, x: Tensor) -> Tensor:
        return F.linear(x, self._weights[group], self._biases[group])

    def _folded(self, group: Group) -> PositionHead:
        weight = self._weights[group].detach().cpu() / self._std
        return PositionHead(weight, self._biases[group].detach().cpu() - weight @ self._mean)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self._device, requires_grad=True)


def _standardization(store: FeatureStore, block: int) -> tuple[Tensor, Tensor, Int[Tensor, " N"]]:
    """Mean and deviation of every channel, and the rows of the images that have patch tokens."""
    rows: list[Tensor] = []
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    num_tokens = 0
    for found, tokens, _ in marked_patches(store, block):
        rows.append(found)
        flat = tokens.flatten(0, 1).double()
        num_tokens += len(flat)
        sums.append(flat.sum(0))
        squares.append(flat.square().sum(0))
    if (images := sum(map(len, rows))) < 10:
        raise ValueError(f"{store.path} has patch tokens of {images} images; the position probe takes 10")
    mean = torch.stack(sums).sum(0) / num_tokens
    variance = torch.stack(squares).sum(0) / num_tokens - mean.square()
    return mean.float(), variance.clamp(min=1e-12).sqrt().float(), torch.cat(rows)
