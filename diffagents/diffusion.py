"""Diffusion maths as plain functions: the continuous VP-SDE, its noise-prediction loss and its ODE sampler.

Notation of Song et al. 2021 (arXiv:2011.13456) and Lu et al. 2022 (arXiv:2206.00927):
    a_t = alpha_t a + sigma_t eps,   alpha_t^2 + sigma_t^2 = 1,   lambda_t = log(alpha_t / sigma_t)
A noise predictor eps_psi(a_t, s, t) gives the score  grad log mu_t(a_t | s) = -eps_psi / sigma_t.
Shapes: B batch, A action dimension; t is (B,) in (0, 1]. The schedule is always computed in float32 or better: sigma_t
loses its digits in half precision below t = 0.01.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BETA_MIN, BETA_MAX = 0.1, 20.0
"""The VP-SDE's noise rates at t = 0 and t = 1 (SRPO, QGPO and SfBC official code)."""


def vp_alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t of the VP-SDE, both of the shape of t. log alpha_t = -t^2 (b1 - b0) / 4 - t b0 / 2."""
    log_alpha = -0.25 * (BETA_MAX - BETA_MIN) * t.square() - 0.5 * BETA_MIN * t
    return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2.0 * log_alpha))


def perturb(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha_t x + sigma_t eps; x and eps (B, A), alpha and sigma (B,)."""
    return alpha[:, None] * x + sigma[:, None] * eps


def eps_loss(predicted: Tensor, eps: Tensor) -> Tensor:
    """Batch mean of the squared error SUMMED over the A dimensions, (B, A) both (SRPO official `loss_fn`)."""
    return (predicted - eps).square().sum(-1).mean()


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
