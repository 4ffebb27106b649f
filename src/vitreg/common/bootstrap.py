"""How sure one can be of a figure: it is computed again from resamples of the images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Shaped

RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)


def resampled_sums(
    values: Shaped[np.ndarray, "n ..."], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float64[np.ndarray, "resamples ..."]:
    """Sums over images, of as many images drawn with replacement, again and again.

    Equal seeds draw equal images, so the difference of two models' figures is their paired bootstrap.

    Args:
        values: of each image.
        resamples: how often images are drawn.
        seed: of the draws.
    """
    values = np.asarray(values, dtype=np.float64)
    num, flat = len(values), values.reshape(len(values), -1)
    rng = np.random.default_rng(seed)
    # One at a time: all the counts at once would be as large as images times resamples.
    sums = [np.bincount(rng.integers(num, size=num), minlength=num) @ flat for _ in range(resamples)]
    return np.stack(sums).reshape(resamples, *values.shape[1:])


def error_of_mean(
    draws: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 1
) -> Float64[np.ndarray, " resamples"]:
    """What the mean of a few random draws may be off by, again and again: by Student's t, for they are few.

    Added to a figure's values on resamples of the images, it widens their interval by what the draws leave open.

    Args:
        draws: a figure, drawn at least twice.
        resamples: how many errors.
        seed: of the errors.
    """
    scale = np.std(draws, ddof=1) / np.sqrt(len(draws))
    return scale * np.random.default_rng(seed).standard_t(len(draws) - 1, size=resamples)


def percentile_interval(resampled: Shaped[np.ndarray, "resamples ..."]) -> Float64[np.ndarray, "2 ..."]:
    """The 95 % percentile interval of a figure, from its values on resamples; undefined ones are left out."""
    return np.nanpercentile(resampled, _INTERVAL, axis=0)
