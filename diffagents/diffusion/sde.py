"""The continuous VP-SDE as plain functions: its schedule, and DPM-Solvers of its probability-flow ODE.

The SDE is that of Song et al. 2021 (arXiv:2011.13456) with times t in (0, 1]; used by SRPO, QGPO and SfBC. chain.py
explains how it differs from the discrete chain. Notation of Lu et al. 2022 (arXiv:2206.00927): lambda_t is half the log
signal-to-noise ratio, log(alpha_t / sigma_t). The schedule is always computed in float32 or better: in half precision sigma_t
loses its digits below t = 0.01.

Shapes: B batch, A action dimension.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BETA_MIN, BETA_MAX = 0.1, 20.0
"""The noise rates at t = 0 and t = 1 (official code of SRPO, QGPO and SfBC)."""


def vp_alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """The schedule: log alpha_t = -t^2 (b1 - b0) / 4 - t b0 / 2 and sigma_t = sqrt(1 - alpha_t^2).

    Args:
        t: Times in (0, 1], of any shape.

    Returns:
        alpha_t and sigma_t, both of the shape of `t`.
    """
    log_alpha = -0.25 * (BETA_MAX - BETA_MIN) * t.square() - 0.5 * BETA_MIN * t
    return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2.0 * log_alpha))


class SolverCall(NamedTuple):
    """One call of the noise predictor, at time t, and the point that it leads to: ratio x + sum_j weights[j] eps_j.

    x is the point where the step began, eps_j the noise predicted by call j of the step. The last call of a step leads to the
    point where the next step begins.
    """

    t: float
    ratio: float
    weights: tuple[float, ...]


SolverStep = tuple[SolverCall, ...]
"""A step of order p: p calls."""


@lru_cache
def dpm_solver_steps(
    n_evals: int = 15, t_end: float = 1e-3, order: int = 2, data_prediction: bool = False
) -> tuple[SolverStep, ...]:
    """The constants of a singlestep DPM-Solver, at times uniform from 1 to `t_end`.

    The inner times of a step are points of the same grid, as in the authors' code; in their paper they are uniform in lambda.
    With few calls, sharp distributions come out too narrow, mostly because of the last step: with 15 calls, samples of a
    Gaussian of standard deviation 0.3 are 16 % narrower (21 % with data_prediction), of 0.7 within 1 % (7 %).

    Args:
        n_evals: Number of network calls.
        t_end: The last time, in (0, 1).
        order: 2 or 3, the order of all steps but the last one or two, which use up the rest of the calls ("DPM-Solver-fast":
            15 calls are orders 3 3 3 3 2 1, or seven times 2 and a 1).
        data_prediction: DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095, Algorithm 1), more stable under strong guidance;
            order 2 only.

    Returns:
        The steps, computed in double precision and cached.

    Raises:
        ValueError: For an order that is not implemented.
    """
    if order not in (2, 3) or (order, data_prediction) == (3, True):
        raise ValueError(
            f"order={order} with data_prediction={data_prediction} is not implemented; use order=2, or order=3 with "
            "data_prediction=False"
        )
    grid = [1.0 + (t_end - 1.0) * i / n_evals for i in range(n_evals + 1)]
    steps, position = [], 0
    for p in _orders(n_evals, order):
        steps.append(_step(grid[position : position + p + 1], data_prediction))
        position += p
    return tuple(steps)


def dpm_solve(eps_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: tuple[SolverStep, ...]) -> Tensor:
    """Solve the probability-flow ODE from t = 1 to the end of `steps`.

    Args:
        eps_fn: eps_fn(x_t, t) predicts the noise for x_t (B, ..., A) and t (B, 1, ..., 1), which has one dimension less.
        x: x_1, standard normal, (B, ..., A).
        steps: The result of `dpm_solver_steps`.

    Returns:
        Samples, (B, ..., A), not clipped, because the bounds are known to the caller alone.
    """
    shape = (len(x), *[1] * (x.dim() - 2))
    for step in steps:
        point, noises = x, []
        for call in step:
            noises.append(eps_fn(point, x.new_full(shape, call.t)))
            point = call.ratio * x
            for weight, eps in zip(call.weights, noises, strict=True):
                point = point.add(eps, alpha=weight)
        x = point
    return x


def _orders(n_evals: int, order: int) -> list[int]:
    """The orders of the steps; they add up to n_evals."""
    if order == 2:
        return [2] * (n_evals // 2) + [1] * (n_evals % 2)
    thirds, rest = divmod(n_evals, 3)
    return [3] * thirds + [rest] if rest else [3] * (thirds - 1) + [2, 1]


def _step(times: list[float], data_prediction: bool) -> SolverStep:
    """One step from times[0] to times[-1], with a call at each time but the last."""
    t0, *inner, t = times
    h = _log_snr(t) - _log_snr(t0)

    def euler(to: float) -> tuple[float, float]:
        """Ratio and weight of eps_0 of the first-order step from t0, Eq. (3.7)."""
        return _alpha(to) / _alpha(t0), -_sigma(to) * math.expm1(_log_snr(to) - _log_snr(t0))

    if not inner:
        ratio, weight = euler(t)
        return (SolverCall(t0, ratio, (weight,)),)
    h1 = _log_snr(inner[0]) - _log_snr(t0)
    ratio, weight = euler(inner[0])
    first = SolverCall(t0, ratio, (weight,))
    ratio, weight = euler(t)
    if len(inner) == 1:  # Algorithm 1 with r_1 = h1 / h; slope is the weight of eps_1 - eps_0
        slope = -_sigma(t) * math.expm1(h) * h / (2.0 * h1)
        if data_prediction:  # written in eps instead of the implied data, only this factor differs
            slope *= math.exp(-h1)
        return first, SolverCall(inner[0], ratio, (weight - slope, slope))
    h2 = _log_snr(inner[1]) - _log_snr(t0)  # Algorithm 2 with r_i = h_i / h
    mid_ratio, mid_weight = euler(inner[1])
    mid_slope = -(h2 / h1) * _sigma(inner[1]) * (math.expm1(h2) / h2 - 1.0)  # of eps_1 - eps_0
    slope = -(h / h2) * _sigma(t) * (math.expm1(h) / h - 1.0)  # of eps_2 - eps_0
    second = SolverCall(inner[0], mid_ratio, (mid_weight - mid_slope, mid_slope))
    return first, second, SolverCall(inner[1], ratio, (weight - slope, 0.0, slope))


# The schedule at one time in double precision, for the solver's constants.


def _log_alpha(t: float) -> float:
    return -0.25 * (BETA_MAX - BETA_MIN) * t * t - 0.5 * BETA_MIN * t


def _alpha(t: float) -> float:
    return math.exp(_log_alpha(t))


def _sigma(t: float) -> float:
    return math.sqrt(-math.expm1(2.0 * _log_alpha(t)))


def _log_snr(t: float) -> float:
    return _log_alpha(t) - math.log(_sigma(t))
