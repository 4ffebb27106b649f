"""How sure one can be of a figure: it is computed again from resamples of the pictures."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Shaped

RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)


def resampled_sums(
    values: Shaped[np.ndarray, "n ..."], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float64[np.ndarray, "resamples ..."]:
    """Sums over pictures, of as many pictures drawn with replacement, again and again.

    Equal seeds draw equal pictures, so the difference of two models' figures is their paired bootstrap.

    Args:
        values: of each picture.
        resamples: how often pictures are drawn.
        seed: of the draws.
    """
    values = np.asarray(values, dtype=np.float64)
    num, flat = len(values), values.reshape(len(values), -1)
    rng = np.random.default_rng(seed)
    # One at a time: all the counts at once would be as large as pictures times resamples.
    sums = [np.bincount(rng.integers(num, size=num), minlength=num) @ flat for _ in range(resamples)]
    return np.stack(sums).reshape(resamples, *values.shape[1:])


def percentile_interval(resampled: Shaped[np.ndarray, "resamples ..."]) -> Float64[np.ndarray, "2 ..."]:
    """The 95 % percentile interval of a figure, from its values on resamples; undefined ones are left out."""
    return np.nanpercentile(resampled, _INTERVAL, axis=0)
