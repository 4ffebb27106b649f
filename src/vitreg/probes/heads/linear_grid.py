"""Linear classifiers of several inputs and learning rates, trained side by side on the same batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.probes.heads.training import cosine, shuffled
from vitreg.probes.protocols import LinearConfig

_ROWS = 1024


class LinearGrid:
    """All heads of one kind of input are one matrix, so that each kind costs two matrix products an iteration.

    The gradient and SGD are written out: it is added to the momentum as it is made, and never there by itself.

    Every kind of input is some columns of the features, which may overlap.

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

    def batches(self) -> Iterator[Int[Tensor, " B"]]:
        """Rows of the batches that are left, from seed and iteration alone."""
        num_rows, seed = len(self._labels), self._config.seed

        def order(number: int) -> Tensor:
            return torch.randperm(num_rows, generator=torch.Generator().manual_seed((seed << 32) + number + 1))

        return shuffled(order, num_rows, self._config.head_batch_size, self._config.num_iterations, done=self.iteration)

    def step(self, rows: Int[Tensor, " B"]) -> None:
        """One iteration of SGD on the mean cross-entropy of a batch."""
        config = self._config
        rows = rows.to(self._labels.device)
        labels = self._labels[rows][:, None, None].expand(-1, len(config.learning_rates), 1)
        decay = cosine(self.iteration, config.num_iterations)
        features = self._features[rows]
        for number, columns in enumerate(self._inputs):
            weight, bias = self.tensors[f"weight.{number}"], self.tensors[f"bias.{number}"]
            weight_momentum = self.tensors[f"weight_momentum.{number}"]
            bias_momentum = self.tensors[f"bias_momentum.{number}"]
            x = features[:, columns]
            residual = self._logits(x, number).softmax(2)
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
            logits = (self._logits(x[:, columns].to(self._rates.device), number) for x in features.split(_ROWS))
            # A head that has diverged answers nothing; the largest of its logits would be the first class.
            chunks = [each.argmax(2).masked_fill(each.isnan().any(2), -1) for each in logits]
            found.append(torch.cat(chunks).T.cpu() == labels)
        return torch.cat(found)

    def _logits(self, x: Tensor, number: int) -> Float[Tensor, "B heads K"]:
        weight, bias = self.tensors[f"weight.{number}"], self.tensors[f"bias.{number}"]
        return torch.addmm(bias[:, 0], x, weight.T).unflatten(1, (-1, self._num_classes))
