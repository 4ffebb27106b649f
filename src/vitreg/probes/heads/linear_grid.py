"""Linear classifiers of several inputs and learning rates, trained side by side on the same batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.probes.protocols import LinearConfig

_ROWS = 1024


class LinearGrid:
    """All heads of one kind of input are one matrix, so that each kind costs two matrix products an iteration.

    Args:
        features: a row for each image.
        inputs: columns of the features, for every kind of input; they may overlap.
        labels: class of every image.
        num_classes: of the images.
        config: how they are trained.
        device: on which.

    Attributes:
        iteration: the next one.
        tensors: weights and momentum, which with `iteration` are the whole state.
    """

    def __init__(
        self,
        features: Float[Tensor, "N D"],
        inputs: Sequence[slice],
        labels: Int[Tensor, " N"],
        num_classes: int,
        config: LinearConfig,
        device: torch.device | str,
    ) -> None:
        self._features, self._inputs = features.to(device), inputs
        self._labels, self._num_classes, self._config = labels.to(device), num_classes, config
        self.iteration = 0
        scaled = torch.tensor(config.learning_rates) * config.head_batch_size / 256
        self._rates = scaled.repeat_interleave(num_classes)[:, None].to(device)
        rows = len(config.learning_rates) * num_classes
        generator = torch.Generator().manual_seed(config.seed)
        self.tensors: dict[str, Tensor] = {}
        for number, columns in enumerate(inputs):
            weight = 0.01 * torch.randn(rows, features[:1, columns].shape[1], generator=generator)
            self.tensors |= {
                f"weight.{number}": weight.to(device),
                f"weight_momentum.{number}": torch.zeros_like(weight, device=device),
                f"bias.{number}": torch.zeros(rows, 1, device=device),
                f"bias_momentum.{number}": torch.zeros(rows, 1, device=device),
            }
        self._order: tuple[int, Tensor] | None = None

    def step(self) -> None:
        """One iteration of SGD on the mean cross-entropy of a batch."""
        config = self._config
        rows = self.batch()
        labels = self._labels[rows][:, None, None].expand(-1, len(config.learning_rates), 1)
        decay = 0.5 * (1 + math.cos(math.pi * self.iteration / config.num_iterations))
        features = self._features[rows]
        for number, columns in enumerate(self._inputs):
            weight, bias, weight_momentum, bias_momentum = self._of(number)
            x = features[:, columns]
            residual = self._logits(x, weight, bias).softmax(2)
            residual.scatter_add_(2, labels, residual.new_full(labels.shape, -1))
            gradient = residual.flatten(1).div_(len(rows))
            weight_momentum.addmm_(gradient.T, x, beta=config.momentum)
            bias_momentum.mul_(config.momentum).add_(gradient.sum(0)[:, None])
            weight.addcmul_(weight_momentum, self._rates, value=-decay)
            bias.addcmul_(bias_momentum, self._rates, value=-decay)
        self.iteration += 1

    def right(self, features: Float[Tensor, "N D"], labels: Int[Tensor, " N"]) -> Bool[Tensor, "heads N"]:
        """Which images every head classifies correctly; learning rates run fastest."""
        found: list[Tensor] = []
        for number, columns in enumerate(self._inputs):
            weight, bias, _, _ = self._of(number)
            logits = (self._logits(x[:, columns].to(weight.device), weight, bias) for x in features.split(_ROWS))
            # A head that has diverged answers nothing; the largest of its logits would be the first class.
            chunks = [each.argmax(2).masked_fill(each.isnan().any(2), -1) for each in logits]
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

    def batch(self) -> Int[Tensor, " B"]:
        """Rows of the next batch, from seed and iteration alone: one shuffled pass over all after another."""
        size, total = self._config.head_batch_size, len(self._labels)
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
