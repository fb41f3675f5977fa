"""Intervals: closed forms, and by simulation that they cover what they say."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from diffagents.evaluation.evaluate import Evaluation
from diffagents.evaluation.statistics import (
    expected_choice,
    interquartile_mean,
    iqm_interval,
    mean_interval,
    over_seeds,
    paired_difference,
    success_interval,
)

DRAWS = 2500
KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy-tailed": lambda rng, n: rng.standard_t(3, size=n),
}


@pytest.mark.parametrize("n", [3, 10, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_the_interval_of_a_mean_covers_95_percent(kind: str, n: int) -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(DRAWS):
        interval = mean_interval(KINDS[kind](rng, n))
        assert interval is not None
        hits += interval[0] <= 0 <= interval[1]
    assert 0.93 < hits / DRAWS < 0.975


@pytest.mark.parametrize("n", [3, 10, 20])
def test_the_interval_of_a_rate_covers_95_percent_on_average(n: int) -> None:
    """Over all rates alike: for a single rate no interval of counts can."""
    rng, hits = np.random.default_rng(0), 0
    for rate in rng.random(DRAWS):
        low, high = success_interval(rng.random(n) < rate)
        hits += low <= rate <= high
    assert 0.93 < hits / DRAWS < 0.975


def test_five_seeds_have_an_interval_that_covers_95_percent_and_fewer_have_a_range() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(DRAWS):
        mean, low, high, kind = over_seeds(rng.normal(size=5).tolist())
        assert kind == "interval" and low < mean < high
        hits += low <= 0 <= high
    assert 0.93 < hits / DRAWS < 0.97
    assert over_seeds([4.0]) == (4.0, 4.0, 4.0, "value")
    assert over_seeds([0.0, 3.0, 9.0]) == (4.0, 0.0, 9.0, "range")


def test_the_interquartile_mean_over_tasks_covers_what_it_says() -> None:
    """As its docstring says, about 81 % with 3 seeds and 94 % with 10."""
    rng = np.random.default_rng(0)
    means = np.array([[60.0], [70.0], [90.0], [100.0]])
    truth = float(interquartile_mean((means + rng.normal(0, 5, (4, 100_000))).reshape(-1)))
    for seeds, low, high in ((3, 0.76, 0.87), (10, 0.9, 0.97)):
        hits = 0
        for _ in range(400):
            _, left, right = iqm_interval((means + rng.normal(0, 5, (4, seeds))).tolist())
            hits += left <= truth <= right
        assert low < hits / 400 < high


def test_closed_forms() -> None:
    interval = mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2) s / sqrt(n) with s = 1
    assert interval == pytest.approx((2 - half, 2 + half))
    assert mean_interval([7.0]) is None and mean_interval([7.0, 7.0]) == (7.0, 7.0)
    z = stats.norm.ppf(0.975)
    assert success_interval([True] * 20) == pytest.approx((20 / (20 + z * z), 1.0))  # (p + z2/2n -+ ...) / (1 + z2/n) at p = 1
    assert success_interval([False] * 20) == pytest.approx((0.0, z * z / (20 + z * z)))
    middle, spread = 0.5, z * math.sqrt(0.25 / 10 + z * z / 400) / (1 + z * z / 10)
    assert success_interval([True, False] * 5) == pytest.approx((middle - spread, middle + spread))


def test_the_interquartile_mean_is_that_of_rliable() -> None:
    """A quarter of all runs of all tasks, rounded down, is dropped at each end: by hand."""
    assert interquartile_mean([100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -50.0]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert interquartile_mean([1.0, 2.0, 6.0]) == pytest.approx(3.0)
    assert interquartile_mean([[0.0, 1.0, 2.0, 9.0], [4.0, 4.0, 4.0, 4.0]]).tolist() == [1.5, 4.0]
    middle, low, high = iqm_interval([[10.0, 10.0, 10.0], [90.0, 90.0, 90.0]])
    assert (middle, low, high) == (50.0, 50.0, 50.0)  # redrawn over all six, tasks would change their weight
    middle, low, high = iqm_interval([[0.0, 10.0, 20.0], [80.0, 90.0, 100.0]])
    assert low < middle < high
    with pytest.raises(ValueError, match="shape"):
        iqm_interval([[90.0, 90.0, 90.0], [10.0]])  # one task would weigh three times the other


def test_pairs_tell_two_policies_apart_that_their_means_do_not() -> None:
    rng = np.random.default_rng(0)
    resets = rng.normal(100, 30, 20)
    better, worse = resets + 5 + rng.normal(0, 1, 20), resets
    mean, interval = paired_difference(better.tolist(), worse.tolist())
    assert interval is not None and 3 < interval[0] < mean < interval[1] < 7
    apart, other = mean_interval(better), mean_interval(worse)
    assert apart is not None and other is not None and apart[0] < other[1]
    with pytest.raises(ValueError, match="same number of episodes"):
        paired_difference([1.0], [1.0, 2.0])


def test_evaluations_are_paired_only_from_the_same_resets() -> None:
    one = Evaluation((5.0, 9.0, 4.0), (1, 1, 1), env_id="Hopper-v5", seed=3)
    assert one.difference(Evaluation((4.0, 7.0, 1.0), (1, 1, 1), env_id="Hopper-v5", seed=3))[0] == 2.0
    for other in (
        Evaluation((4.0, 7.0, 1.0), (1, 1, 1), env_id="Hopper-v5", seed=4),
        Evaluation((4.0, 7.0), (1, 1), env_id="Hopper-v5", seed=3),
        Evaluation((4.0, 7.0, 1.0), (1, 1, 1), env_id="Walker2d-v5", seed=3),
    ):
        with pytest.raises(ValueError, match="do not begin in the same states"):
            one.difference(other)
    unseeded = Evaluation((4.0, 7.0, 1.0), (1, 1, 1), env_id="Hopper-v5", seed=None)
    with pytest.raises(ValueError, match="do not begin in the same states"):
        unseeded.difference(unseeded)


def test_what_choosing_by_few_episodes_is_worth() -> None:
    assert expected_choice([[0.0] * 9, [1.0] * 9], 0) == pytest.approx(0.5, abs=0.05)
    assert expected_choice([[0.0] * 9, [1.0] * 9], 1) == 1.0
    assert expected_choice([[2.0, 4.0]], 1) == 3.0
    assert expected_choice([[2.0, 2.0], [2.0, 2.0, 2.0]], 3) == 2.0
    rng = np.random.default_rng(0)
    pool = [rng.normal(mean, 1, 4000) for mean in (0.0, 1.0)]
    pool = [(values - values.mean() + mean).tolist() for mean, values in zip((0.0, 1.0), pool, strict=True)]
    for n in (1, 4):  # the better one wins with probability Phi(sqrt(n / 2))
        assert expected_choice(pool, n) == pytest.approx(stats.norm.cdf(math.sqrt(n / 2)), abs=0.03)
