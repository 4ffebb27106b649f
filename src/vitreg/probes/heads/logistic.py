"""L2-penalised multinomial logistic regression, on one token or feature per image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from vitreg.common.devices import precise
from vitreg.common.progress import OnProgress
from vitreg.probes.protocols import LogisticConfig
from vitreg.probes.tasks.classes import check_every_class, check_finite

# Rows whose logits stay in the cache between the two matrix products.
_CHUNK = 2048

# Iterations until the coordinates are chosen again; twice as many every time, since that starts L-BFGS anew.
_FIRST_ROUND = 25


@dataclass(frozen=True, eq=False)
class Logistic:
    """A fitted classifier, and whether its gradient is within the tolerance, or as small as rounding lets it be."""

    weight: Float[Tensor, "K D"]
    bias: Float[Tensor, " K"]
    num_iterations: int
    converged: bool

    def predict(self, features: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
        """The most likely class of every row."""
        chunks = features.split(_CHUNK)
        return torch.cat([torch.addmm(self.bias, chunk, self.weight.T).argmax(1) for chunk in chunks])


@dataclass(frozen=True, eq=False)
class Chosen:
    """The best C, and the classifier that it gives.

    Attributes:
        C: with the highest accuracy on what was held back; the smallest of several.
        accuracies: on what was held back, of every C that was tried, in percent.
        logistic: fitted on all rows.
    """

    C: float
    accuracies: dict[float, float]
    logistic: Logistic


def fit_logistic(
    features: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    num_classes: int,
    *,
    C: float = 1.0,
    max_iter: int = 1000,
    tolerance: float = 1e-5,
    start: Logistic | None = None,
) -> Logistic:
    """Minimize `C * (sum of cross-entropies) + 0.5 * |weight|^2`, scikit-learn's objective; the bias is free.

    L-BFGS sees the weights in coordinates in which the mean of the Hessian's blocks, one for each class, is the
    identity. This does not change the optimum, and features of Vision Transformers are badly conditioned otherwise.

    Products are computed where the features are. A fit ends when no element of the gradient of the mean loss is larger
    than `tolerance`, as scikit-learn's `tol`; it begins at zero, or at `start`.

    Raises:
        ValueError: a class has no rows, there is one class only, or features are not finite.
    """
    return _Problem(features, labels, num_classes).fit(C, max_iter, tolerance, start)


def choose_logistic(
    features: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    num_classes: int,
    config: LogisticConfig = LogisticConfig(),
    *,
    on_progress: OnProgress | None = None,
) -> Chosen:
    """Choose C on a part of the rows, then fit on all.

    From the smallest C to the largest, each fit starts where the one before ended.

    `on_progress` is called with the number of fits done and their total.

    Raises:
        ValueError: as `fit_logistic`.
    """
    check_every_class(labels, num_classes)
    on_progress = on_progress or (lambda done, total: None)
    C, accuracies, start, total = config.C[0], {}, None, len(config.C) + 1
    if len(config.C) > 1:
        held = _held_back(labels, config.held_back, config.held_back_seed)
        problem = _Problem(features[~held], labels[~held], num_classes)
        worse = 0
        for candidate in sorted(config.C):
            start = problem.fit(candidate, config.max_iter, config.tolerance, start)
            right = start.predict(features[held]) == labels[held]
            accuracies[candidate] = 100 * right.cpu().double().mean().item()
            on_progress(len(accuracies), total)
            worse = worse + 1 if accuracies[candidate] < max(accuracies.values()) else 0
            if worse == config.patience:
                break
        C = max(accuracies, key=accuracies.__getitem__)
    logistic = _Problem(features, labels, num_classes).fit(C, config.max_iter, config.tolerance)
    on_progress(total, total)
    return Chosen(C, accuracies, logistic)


def _held_back(labels: Tensor, share: float, seed: int) -> Tensor:
    """Which rows C is chosen on: random ones, but for one of every class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    ordered, places = labels.cpu()[order], torch.arange(len(labels))
    last = torch.zeros_like(ordered.bincount()).scatter_reduce(0, ordered, places, "amax")
    candidates = order[~torch.isin(places, last)]
    if not len(candidates):
        raise ValueError("every class has one image only, so that C cannot be chosen; give one C, or more images")
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[candidates[: max(1, round(share * len(labels)))]] = True
    return held.to(labels.device)


class _Problem:
    """Rows and labels, with what all fits on them share."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        check_every_class(labels, num_classes)
        check_finite(features, "the table of features")
        # The bias takes up what is subtracted; without it, large means would cost float32 its digits.
        self._mean = features.mean(0)
        self._features, self._labels, self._num_classes = features - self._mean, labels, num_classes

    def fit(self, C: float, max_iter: int, tolerance: float, start: Logistic | None = None) -> Logistic:
        """L-BFGS from scipy, in preconditioned variables, which are chosen anew from time to time."""
        penalty = 1 / (C * len(self._features))
        weights = torch.zeros(self._num_classes, self._features.shape[1] + 1, dtype=torch.float64)
        if start is not None:
            weights[:, :-1], weights[:, -1] = start.weight, start.bias + start.weight @ self._mean
        done, rounds, converged = 0, _FIRST_ROUND, False
        while not converged and done < max_iter:
            weights, iterations, converged = self._minimize(weights, penalty, min(rounds, max_iter - done), tolerance)
            done, rounds = done + iterations, 2 * rounds
        weights = weights.to(self._features)
        weight = weights[:, :-1].contiguous()
        return Logistic(weight, weights[:, -1] - weight @ self._mean, done, converged)

    def _minimize(self, weights: Tensor, penalty: float, max_iter: int, tolerance: float) -> tuple[Tensor, int, bool]:
        """From given weights, in the coordinates that suit them: new weights, iterations, and whether these are it."""
        inverse, mean = self._inverse_root(weights, penalty), self._mean.cpu().double()
        # Smaller changes of the loss are of rounding: it is a mean over many rows.
        rounding = torch.finfo(self._features.dtype).eps / 64
        worst, losses = np.inf, []

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal worst
            step = torch.from_numpy(flat).view(weights.shape) @ inverse
            moved = weights + step
            loss, gradient = self._loss(moved)
            loss += 0.5 * penalty * moved[:, :-1].square().sum().item()
            gradient[:, :-1] += penalty * moved[:, :-1]
            # Of the features as they are given, so that the tolerance is that of scikit-learn.
            given = gradient[:, :-1] + gradient[:, -1:] * mean
            worst = max(given.abs().max().item(), gradient[:, -1].abs().max().item())
            losses.append(loss)
            return loss, (gradient @ inverse.T).numpy().ravel()

        def stop(intermediate_result: OptimizeResult) -> None:
            if worst <= tolerance:
                raise StopIteration

        result = minimize(
            objective,
            np.zeros(weights.numel()),
            jac=True,
            method="L-BFGS-B",
            callback=stop,
            options={"maxiter": max_iter, "gtol": 0, "ftol": rounding},
        )
        weights = weights + torch.from_numpy(result.x).view(weights.shape) @ inverse
        # A line search that fails starts anew, in other coordinates, but not for ever.
        gained = losses[0] - result.fun > 64 * rounding * max(1.0, losses[0])
        return weights, int(result.nit), worst <= tolerance or result.status == 0 or not gained

    def _chunks(self, weights: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features, labels and log-probabilities of some rows."""
        weights = weights.to(self._features)
        transposed, bias = weights[:, :-1].T, weights[:, -1]
        for first in range(0, len(self._features), _CHUNK):
            x, y = self._features[first : first + _CHUNK], self._labels[first : first + _CHUNK, None]
            yield x, y, torch.log_softmax(torch.addmm(bias, x, transposed), 1)

    def _loss(self, weights: Tensor) -> tuple[float, Tensor]:
        """Mean cross-entropy, and its gradient."""
        gradient = torch.zeros_like(weights, dtype=self._features.dtype, device=self._features.device)
        loss = torch.zeros((), dtype=precise(self._features.device), device=self._features.device)
        for x, y, log_probability in self._chunks(weights):
            loss -= log_probability.gather(1, y).sum(dtype=loss.dtype)
            residual = log_probability.exp_()
            residual.scatter_add_(1, y, residual.new_full(y.shape, -1))
            gradient[:, :-1].addmm_(residual.T, x)
            gradient[:, -1] += residual.sum(0)
        rows = len(self._features)
        return loss.item() / rows, gradient.cpu().double() / rows

    def _inverse_root(self, weights: Tensor, penalty: float) -> Float64[Tensor, "W W"]:
        """Of the mean over classes of the Hessian's blocks."""
        width = weights.shape[1]
        hessian = torch.zeros(width, width, dtype=torch.float64)
        for x, _, log_probability in self._chunks(weights):
            spread = (1 - (2 * log_probability).exp_().sum(1, keepdim=True)).clamp_(min=0)
            extended = torch.cat([x, x.new_ones(len(x), 1)], 1)
            hessian += ((extended * spread).T @ extended).cpu().double()
        hessian /= self._num_classes * len(self._features)
        diagonal = hessian.diagonal()
        # Features may be linearly dependent, but for rounding.
        diagonal += torch.finfo(self._features.dtype).eps * diagonal.sum()
        diagonal[:-1] += penalty
        root = torch.linalg.cholesky(hessian)
        return torch.linalg.solve_triangular(root, torch.eye(width, dtype=torch.float64), upper=False)
