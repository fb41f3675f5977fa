"""Confidence intervals of what was measured."""

from collections.abc import Sequence

import numpy as np


def bootstrap(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean, from 2000 resamples with a fixed seed.

    Args:
        values: At least one number.

    Returns:
        Lower and upper bound, between which the mean always lies. The same values give the same interval.
    """
    array = np.asarray(values, np.float64)
    picks = np.random.default_rng(0).integers(0, len(array), (2000, len(array)))
    low, high = np.percentile(array[picks].mean(axis=1), (2.5, 97.5))
    return min(float(low), float(array.mean())), max(float(high), float(array.mean()))
