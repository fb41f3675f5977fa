"""ODE solvers of the continuous VP-SDE (diffusion.py): DPM-Solver of order 2.

Notation of Lu et al. 2022 (arXiv:2206.00927): lambda_t = log(alpha_t / sigma_t), half the log signal-to-noise ratio.
Shapes: B batch, A action dimension; t is (B,) in (0, 1].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from diffagents.diffusion import BETA_MAX, BETA_MIN


class SolverStep(NamedTuple):
    """Constants of one DPM-Solver step from t to the next time: x <- ratio x - noise eps(t) - slope (eps(mid) - eps(t))."""

    t: float
    ratio: float
    noise: float
    mid: "tuple[float, float, float] | None"  # (t_mid, ratio, noise) of the inner half step; None in a first-order step
    slope: float


def dpm_solver_steps(n_evals: int = 15, t_end: float = 1e-3) -> list[SolverStep]:
    """The constants of a singlestep DPM-Solver of order 2 with `n_evals` network calls, times uniform from 1 to `t_end`.

    Lu et al. 2022: a second-order step is Algorithm 1 with r_1 = 1/2 (two calls), a first-order step is Eq. (3.7) (one
    call); an odd budget ends with one first-order step. Computed once, in double precision.
    """
    orders = [2] * (n_evals // 2) + [1] * (n_evals % 2)
    grid = [1.0 + (t_end - 1.0) * i / n_evals for i in range(n_evals + 1)]
    steps, position = [], 0
    for order in orders:
        t, t_next = grid[position], grid[position + order]
        position += order
        h = _log_snr(t_next) - _log_snr(t)
        alpha, _ = _alpha_sigma(t)
        alpha_next, sigma_next = _alpha_sigma(t_next)
        noise, mid, slope = sigma_next * math.expm1(h), None, 0.0
        if order == 2:
            t_mid = _time_of_log_snr(_log_snr(t) + 0.5 * h)
            alpha_mid, sigma_mid = _alpha_sigma(t_mid)
            mid = (t_mid, alpha_mid / alpha, sigma_mid * math.expm1(0.5 * h))
            slope = noise  # 1 / (2 r_1) = 1
        steps.append(SolverStep(t, alpha_next / alpha, noise, mid, slope))
    return steps


def dpm_solve(eps_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: list[SolverStep]) -> Tensor:
    """Follow the probability-flow ODE from x ~ N(0, I) at t = 1, (B, A), to the end of `steps`.

    `eps_fn(x_t, t)` predicts the noise for x_t (B, A) and t (B,). Nothing is clipped: the caller knows the bounds.
    """
    for step in steps:
        eps = eps_fn(x, x.new_full((len(x),), step.t))
        x_next = step.ratio * x - step.noise * eps
        if step.mid is not None:
            t_mid, ratio, noise = step.mid
            eps_mid = eps_fn(ratio * x - noise * eps, x.new_full((len(x),), t_mid))
            x_next = x_next - step.slope * (eps_mid - eps)
        x = x_next
    return x


def _alpha_sigma(t: float) -> tuple[float, float]:
    log_alpha = -0.25 * (BETA_MAX - BETA_MIN) * t * t - 0.5 * BETA_MIN * t
    return math.exp(log_alpha), math.sqrt(-math.expm1(2.0 * log_alpha))


def _log_snr(t: float) -> float:
    alpha, sigma = _alpha_sigma(t)
    return math.log(alpha / sigma)


def _time_of_log_snr(log_snr: float) -> float:
    minus_log_alpha = 0.5 * math.log1p(math.exp(-2.0 * log_snr))
    slope = BETA_MAX - BETA_MIN
    return (-BETA_MIN + math.sqrt(BETA_MIN**2 + 4.0 * slope * minus_log_alpha)) / slope
