"""How often the intervals of `diffagents.evaluation.statistics` cover the truth, by simulation.

    python zoo/benchmarks/coverage.py [--draws 2000]

Each figure is the share of draws, in percent, whose 95 % interval contains the true value. For comparison, the percentile
bootstrap of the mean, which the library does not use.
"""

import argparse
from collections.abc import Callable

import numpy as np

from diffagents.evaluation.statistics import interquartile_mean, iqm_interval, mean_interval, success_interval

RNG = np.random.default_rng(0)


def falls(rate: float) -> Callable[[int], np.ndarray]:
    """Returns near 100 of a policy that falls in this share of its episodes, near 40 then."""
    return lambda n: np.where(RNG.random(n) < rate, RNG.normal(40, 10, n), RNG.normal(100, 1, n))


MEANS: dict[str, tuple[Callable[[int], np.ndarray], float]] = {
    "normal": (lambda n: RNG.normal(size=n), 0.0),
    "heavy-tailed (t, 3 degrees)": (lambda n: RNG.standard_t(3, size=n), 0.0),
    "lognormal": (lambda n: RNG.lognormal(size=n), float(np.exp(0.5))),
    "falls in a tenth": (falls(0.1), 94.0),
    "falls in three tenths": (falls(0.3), 82.0),
}


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    picks = RNG.integers(0, len(values), (1000, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def mean_coverage(
    draw: Callable[[int], np.ndarray], truth: float, n: int, draws: int, interval: Callable[..., object]
) -> float:
    """The share of draws of n values whose interval contains the true mean."""
    hits = 0
    for _ in range(draws):
        low, high = interval(draw(n))  # type: ignore[misc]
        hits += low <= truth <= high
    return hits / draws


def success_coverage(n: int, draws: int) -> float:
    """The share for Wilson's interval of n episodes, for rates drawn uniformly."""
    hits = 0
    for rate in RNG.random(draws):
        low, high = success_interval(RNG.random(n) < rate)
        hits += low <= rate <= high
    return hits / draws


def iqm_coverage(seeds: int, draws: int) -> float:
    """The share for the interquartile mean over 4 tasks, whose scores are normal with standard deviation 5."""
    means = np.array([[60.0], [70.0], [90.0], [100.0]])
    truth = float(interquartile_mean((means + RNG.normal(0, 5, (4, 200_000))).reshape(-1)))
    hits = 0
    for _ in range(draws):
        _, low, high = iqm_interval((means + RNG.normal(0, 5, (4, seeds))).tolist())
        hits += low <= truth <= high
    return hits / draws


def main() -> None:
    """Print a line for each kind of values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    draws = parser.parse_args().draws
    print(f"{draws} draws each; % of 95 % intervals that contain the truth")
    for name, (draw, truth) in MEANS.items():
        for n in (3, 10, 20):
            ours, theirs = (100 * mean_coverage(draw, truth, n, draws, kind) for kind in (mean_interval, bootstrap))
            print(f"mean, {name}, {n} values: {ours:.1f} (percentile bootstrap {theirs:.1f})", flush=True)
    for n in (3, 10, 20):
        print(f"success rate, all rates alike, {n} episodes: {100 * success_coverage(n, draws):.1f}", flush=True)
    for seeds in (3, 5, 10):
        print(f"interquartile mean, 4 tasks, {seeds} seeds: {100 * iqm_coverage(seeds, draws // 2):.1f}", flush=True)


if __name__ == "__main__":
    main()
