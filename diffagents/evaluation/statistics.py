"""How sure a figure is.

    mean over episodes                      `mean_interval`: Student's t
    share of successes                      `success_interval`: Wilson
    over training seeds                     `over_seeds`: below five the values' range, called so; from five on Student's t
    two policies on the same resets         `paired_difference`
    algorithms over several tasks           `interquartile_mean`, `iqm_interval` (Agarwal et al. 2021)
    the best of several policies            `expected_choice`: what choosing by few episodes is worth

What an interval of 95 % covers, by simulation (`python zoo/benchmarks/coverage.py`, 3, 10 and 20 values): Student's t 95 % of
normal and 96 % of heavy-tailed means (those of a t distribution with 3 degrees of freedom), but less where values are skewed:
of policies that fall in a tenth of their episodes 87 % at 20 episodes and 66 % at 10, as such a sample often has no fall. The
percentile bootstrap of the mean covers less in nearly all of these cases (74 % of normal means at 3 values, 93 % at 20) and is
not used. Wilson's interval covers 95 to 97 % on average over all rates.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

_REPEATS = 2000
FEW_SEEDS = 5
"""From this number of training seeds on an interval is given instead of the range."""


class Spread(NamedTuple):
    """A mean over training seeds, and how far the seeds are from each other.

    Attributes:
        mean: The mean.
        low: The lower end.
        high: The upper end.
        kind: "value": of one seed, and both ends are it; "range": the smallest and the largest value; "interval": the mean lies
            between the ends with 95 %.
    """

    mean: float
    low: float
    high: float
    kind: Literal["value", "range", "interval"]


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t: mean -+ t(0.975, n - 1) s / sqrt(n).

    Args:
        values: At least one number.

    Returns:
        Lower and upper bound; None for a single number, which says nothing about its mean.
    """
    from scipy import special  # not stats, whose import takes most of a second: every printed evaluation comes here

    array = np.asarray(values, np.float64)
    n = len(array)
    if n < 2:
        return None
    half = float(special.stdtrit(n - 1, 0.975) * array.std(ddof=1) / np.sqrt(n))
    return float(array.mean()) - half, float(array.mean()) + half


def success_interval(successes: Sequence[bool] | np.ndarray) -> tuple[float, float]:
    """95 % interval of a success rate by Wilson's score: of 20 successes in 20 episodes 0.84 to 1.

    Args:
        successes: At least one.

    Returns:
        Lower and upper bound, in [0, 1].
    """
    from scipy import stats

    found = stats.binomtest(int(np.sum(successes)), len(successes)).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def over_seeds(values: Sequence[float]) -> Spread:
    """The mean over training seeds with its range, or from FEW_SEEDS on with its interval.

    Args:
        values: One number for each seed, at least one.
    """
    mean, interval = float(np.mean(values)), mean_interval(values)
    if interval is None:
        return Spread(mean, mean, mean, "value")
    if len(values) < FEW_SEEDS:
        return Spread(mean, float(np.min(values)), float(np.max(values)), "range")
    return Spread(mean, *interval, "interval")


def paired_difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """The mean of `values` minus `others`, and its 95 % interval: Student's t on the differences of pairs.

    Args:
        values: One number for each pair, e.g. the return from each reset.
        others: The other number of each pair, in the same order.

    Returns:
        The difference; its interval, None for one pair.

    Raises:
        ValueError: The numbers of values differ.
    """
    if len(values) != len(others):
        raise ValueError(
            f"{len(values)} values cannot be paired with {len(others)}: evaluate both with the same number of episodes"
        )
    differences = np.asarray(values, np.float64) - np.asarray(others, np.float64)
    return float(differences.mean()), mean_interval(differences)


def interquartile_mean(values: Any) -> np.ndarray:
    """Mean of the middle half along the last axis: a quarter, rounded down, is dropped at each end.

    Source: Agarwal et al. 2021 (arXiv:2108.13264), Section 4.3; `scipy.stats.trim_mean(values, 0.25)`, as in rliable.
    """
    from scipy import stats

    return np.asarray(stats.trim_mean(np.asarray(values, np.float64), 0.25, axis=-1))


def iqm_interval(by_task: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Interquartile mean over all runs of all tasks, with its stratified bootstrap interval over seeds.

    Source: Agarwal et al. 2021, Section 4.1 and 4.3: in every one of 2000 repeats each task draws its seeds anew, with
    replacement; the interval is that of the percentiles 2.5 and 97.5. With few seeds it is too narrow: on 4 tasks it covers
    about 81 % with 3 seeds, 89 % with 5 and 94 % with 10 (`python zoo/benchmarks/coverage.py`).

    Args:
        by_task: One sequence of scores for each task, all with the same number of seeds so that tasks have equal weight.

    Returns:
        (interquartile mean, low, high).

    Raises:
        ValueError: The numbers of seeds differ.
    """
    rng = np.random.default_rng(0)
    scores = np.asarray([list(task) for task in by_task], np.float64)  # (tasks, seeds)
    tasks, seeds = scores.shape
    picks = rng.integers(0, seeds, (_REPEATS, tasks, seeds))
    drawn = np.take_along_axis(scores[None], picks, axis=2).reshape(_REPEATS, -1)
    low, high = np.percentile(interquartile_mean(drawn), (2.5, 97.5))
    return float(interquartile_mean(scores.reshape(-1))), float(low), float(high)


def expected_choice(episodes: Sequence[Sequence[float]], n: int) -> float:
    """The value to be expected of the policy that has the highest mean over n episodes of each.

    Whoever trains k policies (seeds, settings) and takes the best has played k n episodes, and gets less than the best mean
    that was seen. The idea of a curve over the number of episodes is that of Jackson et al. 2025 (arXiv:2504.11453).

    Args:
        episodes: The returns of each policy, at least one policy. They stand for all that the policy could get: the n episodes
            are drawn from them with replacement, and the chosen policy counts with their mean. So for large n the result tends
            to the highest mean, which is too high by the luck that is in it.
        n: Episodes of each policy by which it is chosen; 0 chooses at random.

    Returns:
        The mean over 2000 choices, with a fixed seed.
    """
    rng = np.random.default_rng(0)
    pools = [np.asarray(returns, np.float64) for returns in episodes]
    seen = np.stack([pool[rng.integers(0, len(pool), (_REPEATS, n))].mean(1) if n else np.zeros(_REPEATS) for pool in pools])
    best = np.where(seen == seen.max(0), rng.random(seen.shape), -1.0).argmax(0)  # of equal ones any
    return float(np.array([pool.mean() for pool in pools])[best].mean())
