"""Linear classifiers of where a patch is in the image, trained side by side in the same passes over a store."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.images import spaced_indices
from vitreg.probes.protocols import PositionConfig
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.tasks.patch_kinds import Group, marked_patches


@dataclass(frozen=True)
class TrainingSet:
    """What one look at the training patches finds.

    Attributes:
        positions: how many patches of each group are at every position.
        mean, std: of the tokens, channel by channel.
        held_out: rows of the images that choose when training ends.
    """

    positions: dict[Group, Int[Tensor, " P"]]
    mean: Float[Tensor, " D"]
    std: Float[Tensor, " D"]
    held_out: frozenset[int]

    @classmethod
    def of(cls, store: FeatureStore, config: PositionConfig) -> TrainingSet:
        """That of a store.

        Raises:
            ValueError: it has too few images with patch tokens.
        """
        rows: list[int] = []
        sums: list[Tensor] = []
        squares: list[Tensor] = []
        marks: list[Tensor] = []
        for found, tokens, outlier in marked_patches(store, config.block):
            rows += found.tolist()
            marks.append(outlier)
            flat = tokens.flatten(0, 1).double()
            sums.append(flat.sum(0))
            squares.append(flat.square().sum(0))
        if len(rows) < 10:
            raise ValueError(f"{store.path} has patch tokens of {len(rows)} images; the position probe takes 10")
        outlier = torch.cat(marks)
        mean = torch.stack(sums).sum(0) / outlier.numel()
        variance = torch.stack(squares).sum(0) / outlier.numel() - mean.square()
        held_out = spaced_indices(len(rows), min(config.held_out, len(rows) // 10))
        return cls(
            {group: group.members(outlier).sum(0) for group in Group},
            mean.float(),
            variance.clamp(min=1e-12).sqrt().float(),
            frozenset(rows[index] for index in held_out),
        )


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
    found: TrainingSet,
    groups: Sequence[Group],
    config: PositionConfig,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> dict[Group, PositionHead]:
    """One classifier for each group of patches.

    Files are read in their order and the patches of each shuffled: every image has every position, so batches are
    balanced whatever the order of images.

    Args:
        store: of the training images.
        found: what was found in it.
        groups: what the classifiers are trained on.
        config: how.
        device: where.
        on_epoch: called after every epoch with its number, from 1.
    """
    trainer = _Trainer(store, found, groups, config, device)
    for epoch in range(1, config.epochs + 1):
        trainer.run_epoch()
        on_epoch(epoch)
        if not trainer.has_improved(epoch):
            break
    return trainer.best


class _Trainer:
    def __init__(
        self,
        store: FeatureStore,
        found: TrainingSet,
        groups: Sequence[Group],
        config: PositionConfig,
        device: torch.device | str,
    ) -> None:
        self._store, self._found, self._config, self._device = store, found, config, torch.device(device)
        num_positions = len(found.positions[Group.ALL])
        # Zeros, as a convex problem needs nothing random.
        self._weights = {group: self._zeros(num_positions, len(found.mean)) for group in groups}
        self._biases = {group: self._zeros(num_positions) for group in groups}
        parameters = [*self._weights.values(), *self._biases.values()]
        self._optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
        self._order = torch.Generator().manual_seed(config.seed)
        per_epoch = int(found.positions[Group.ALL].sum()) - len(found.held_out) * num_positions
        self._seen, self._total = 0, config.epochs * per_epoch
        self._held: tuple[Tensor, Tensor, Tensor] | None = None
        self.best = {group: self._folded(group) for group in groups}

    def run_epoch(self) -> None:
        """Every patch once."""
        held: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows, tokens, outlier in marked_patches(self._store, self._config.block):
            out = torch.tensor([int(row) in self._found.held_out for row in rows], dtype=torch.bool)
            if self._held is None and out.any():
                held.append(self._ready(tokens[out], outlier[out]))
            if not out.all():
                self._train_on(*self._ready(tokens[~out], outlier[~out]))
        if self._held is None:
            x, y, outliers = (torch.cat(parts) for parts in zip(*held, strict=True))
            self._held = x, y, outliers

    @torch.no_grad()
    def has_improved(self, epoch: int) -> bool:
        """Whether any classifier did within the last epochs."""
        assert self._held is not None
        x, y, outlier = self._held
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
        return any(epoch - best.epochs < self._config.patience for best in self.best.values())

    def _ready(self, tokens: Tensor, outlier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Standardized tokens, their positions and marks, flat, where training is."""
        x = (tokens - self._found.mean) / self._found.std
        y = torch.arange(tokens.shape[1]).repeat(len(tokens))
        return x.flatten(0, 1).to(self._device), y.to(self._device), outlier.flatten().to(self._device)

    def _train_on(self, x: Float[Tensor, "T D"], y: Int[Tensor, " T"], outlier: Bool[Tensor, " T"]) -> None:
        order = torch.randperm(len(y), generator=self._order).to(self._device)
        # As equal as they can be: a last batch of a few patches would be a step as large as any.
        for batch in order.chunk(math.ceil(len(y) / self._config.head_batch_size)):
            losses: list[Tensor] = []
            for group in self._weights:
                member = batch[group.members(outlier[batch])]
                if len(member):
                    losses.append(F.cross_entropy(self._logits(group, x[member]), y[member]))
            rate = 0.5 * (1 + math.cos(math.pi * self._seen / self._total))
            self._optimizer.param_groups[0]["lr"] = self._config.learning_rate * rate
            self._optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            self._optimizer.step()
            self._seen += len(batch)

    def _logits(self, group: Group, x: Tensor) -> Tensor:
        return F.linear(x, self._weights[group], self._biases[group])

    def _folded(self, group: Group) -> PositionHead:
        weight = self._weights[group].detach().cpu() / self._found.std
        return PositionHead(weight, self._biases[group].detach().cpu() - weight @ self._found.mean)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self._device, requires_grad=True)
