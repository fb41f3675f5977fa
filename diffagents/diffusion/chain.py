"""The discrete diffusion chain as plain functions: its constants, and its samplers DDPM and DDIM.

The chain is that of Ho et al. 2020 (arXiv:2006.11239) with the VP rates of Xiao et al. 2022, with steps i = 0..T-1; used by
Diffusion-QL, DiffCPS, IDQL, BDPO and diffusion BC. Step i here is n = i + 1 in BDPO's papers and code.

The chain and the VP-SDE of sde.py perturb an action alike, a_t = alpha_t a + sigma_t eps with alpha_t^2 + sigma_t^2 = 1, and
in both a noise predictor eps(a_t, s, t) gives the score grad log mu_t(a_t | s) = -eps / sigma_t. Yet they are two families,
not two resolutions of one: rates and origins of time differ, so a network of one does not fit the other.

Shapes: A action dimension, T steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Chain(NamedTuple):
    """The constants of a discrete VP chain, each (T,) float32; entry i belongs to the step between x_i+1 and x_i."""

    alpha: Tensor  # 1 - beta
    beta: Tensor
    alpha_bar: Tensor  # product of alpha up to and including i
    signal: Tensor  # sqrt(alpha_bar): share of the action in x
    noise: Tensor  # sqrt(1 - alpha_bar): share of the noise in x
    from_x0: Tensor  # the posterior's mean is from_x0 * x0 + from_x * x
    from_x: Tensor
    posterior_std: Tensor  # standard deviation of the true posterior; 0 at the last step, i = 0
    beta_std: Tensor  # sqrt(beta): the standard deviation in IDQL and BDPO

    @property
    def n_steps(self) -> int:
        """T, the number of steps."""
        return len(self.beta)

    def to(self, device: torch.device | str) -> "Chain":
        """A copy on `device`."""
        return Chain(*(tensor.to(device) for tensor in self))


def vp_chain(n_steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> Chain:
    """The chain with VP rates: alpha_i = exp(-b_min / T - (b_max - b_min) (2 n - 1) / (2 T^2)), n = i + 1.

    alpha_bar ends at exp(-b_min - (b_max - b_min) / 2) = 0.00641 for every T, so that five steps are enough to reach noise.
    Source: `vp_beta_schedule` in the official code of Diffusion-QL.

    Args:
        n_steps: T, at least 1.
        beta_min: b_min, positive.
        beta_max: b_max, above `beta_min`.

    Returns:
        The constants on the CPU, computed in double precision and stored as float32.
    """
    n = torch.arange(1, n_steps + 1, dtype=torch.float64)
    alpha = torch.exp(-beta_min / n_steps - 0.5 * (beta_max - beta_min) * (2 * n - 1) / n_steps**2)
    beta, alpha_bar = 1.0 - alpha, alpha.cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    entries = (
        alpha,
        beta,
        alpha_bar,
        alpha_bar.sqrt(),
        (1.0 - alpha_bar).sqrt(),
        beta * before.sqrt() / (1.0 - alpha_bar),
        (1.0 - before) * alpha.sqrt() / (1.0 - alpha_bar),
        (beta * (1.0 - before) / (1.0 - alpha_bar)).sqrt(),
        beta.sqrt(),
    )
    return Chain(*(entry.float() for entry in entries))


def reverse_mean(chain: Chain, i: int | Tensor, x: Tensor, eps: Tensor, clip_x0: bool) -> Tensor:
    """Mean of p(x_i | x_i+1 = x), given the predicted noise.

    Args:
        chain: Constants on the device of `x`.
        i: The step, an int or (..., 1) int64.
        x: x_i+1, (..., A).
        eps: Noise predicted for `x`, (..., A).
        clip_x0: Clamp the action that the noise implies to [-1, 1] first; a clamped one passes no gradient.

    Returns:
        The mean, (..., A).
    """
    x0 = (x - chain.noise[i] * eps) / chain.signal[i]
    if clip_x0:
        x0 = x0.clamp(-1.0, 1.0)
    return chain.from_x0[i] * x0 + chain.from_x[i] * x


def reverse_var(chain: Chain, var: Tensor) -> Tensor:
    """Variances of p(x_i | x_i+1) if the actions have the variance `var`: the true posterior's plus that of x0 given x_i+1.

    They lie between the two fixed choices of Ho et al. 2020: `posterior_std`, exact for a single action, and `beta_std`, exact
    for actions of unit variance. Source: Bao et al. 2022 (arXiv:2201.06503), Theorem 1, for a Gaussian.

    Args:
        chain: Constants on the device of `var`.
        var: (A,).

    Returns:
        (T, A).
    """
    of_x0 = var * (1.0 - chain.alpha_bar)[:, None] / (chain.alpha_bar[:, None] * var + (1.0 - chain.alpha_bar)[:, None])
    return chain.posterior_std[:, None].square() + chain.from_x0[:, None].square() * of_x0


def sample_chain(
    eps_fn: Callable[[Tensor, int], Tensor],
    chain: Chain,
    noises: Tensor,
    std: Tensor,
    *,
    clip_x0: bool = True,
    clip_x: bool = False,
) -> Tensor:
    """Ancestral sampling (DDPM): x_T = noises[0], then x_i = mean + std_i z, without noise at the last step.

    Gradients flow through all steps.

    Args:
        eps_fn: eps_fn(x, i) predicts the noise in x (..., A) at step i.
        chain: Constants on the device of `noises`.
        noises: Standard normal, (T + 1, ..., A). The last is unused; the official code draws it too.
        std: Standard deviations, (T,): `chain.posterior_std` (Diffusion-QL, DiffCPS) or `chain.beta_std` (IDQL, BDPO).
        clip_x0: As in `reverse_mean`.
        clip_x: Clamp every x to [-1, 1] (IDQL).

    Returns:
        Samples, (..., A).
    """
    x = noises[0]
    for i, z in zip(reversed(range(chain.n_steps)), noises[1:], strict=True):
        x = reverse_mean(chain, i, x, eps_fn(x, i), clip_x0)
        if i > 0:
            x = x + std[i] * z
        if clip_x:
            x = x.clamp(-1.0, 1.0)
    return x


def sample_ddim(
    eps_fn: Callable[[Tensor, int], Tensor],
    chain: Chain,
    x: Tensor,
    n_steps: int,
    *,
    clip_x0: bool = True,
    clip_x: bool = False,
) -> Tensor:
    """Deterministic sampling (DDIM): x_j = signal_j x0 + noise_j eps, with the x0 that eps implies.

    It visits `n_steps` of the chain's own steps, evenly spread, so that the network is evaluated only where it was trained.
    Source: Song et al. 2021 (arXiv:2010.02502), Eq. (12) with sigma = 0.

    Args:
        eps_fn: eps_fn(x, i) predicts the noise in x (..., A) at step i.
        chain: Constants on the device of `x`.
        x: x_T, standard normal, (..., A).
        n_steps: Number of steps to visit, from 1 to T.
        clip_x0: Clamp the implied action to [-1, 1], and recompute eps from it.
        clip_x: Clamp every x to [-1, 1] (IDQL).

    Returns:
        Samples, (..., A).
    """
    last = chain.n_steps - 1
    steps = [round(last * (1.0 - k / max(n_steps - 1, 1))) for k in range(n_steps)]
    for i, j in zip(steps, [*steps[1:], None], strict=True):
        eps = eps_fn(x, i)
        x0 = (x - chain.noise[i] * eps) / chain.signal[i]
        if clip_x0:
            x0 = x0.clamp(-1.0, 1.0)
            eps = (x - chain.signal[i] * x0) / chain.noise[i]
        x = x0 if j is None else chain.signal[j] * x0 + chain.noise[j] * eps
        if clip_x:
            x = x.clamp(-1.0, 1.0)
    return x


SOLVERS = ("ddpm", "ddim")
"""Solvers of the chain when a policy acts, called by `networks.diffusion_policy.ChainPolicy.sample`: "ddpm" (`sample_chain`)
takes every step, "ddim" (`sample_ddim`) is deterministic given its noise and may skip steps. Targets of Q use "ddpm"."""


def check_solver(solver: str, solver_steps: int | None, n_diffusion_steps: int) -> None:
    """Check that a solver suits the chain.

    Args:
        solver: One of SOLVERS.
        solver_steps: Steps that the solver takes, None for all of the chain's.
        n_diffusion_steps: The number T of steps of the chain.

    Raises:
        ValueError: If there are more solver steps than steps in the chain, or "ddpm" would have to skip some.
    """
    if solver_steps is None:
        return
    if solver_steps > n_diffusion_steps:
        raise ValueError(f"solver_steps={solver_steps} is more than the chain's n_diffusion_steps={n_diffusion_steps}")
    if solver == "ddpm" and solver_steps < n_diffusion_steps:
        raise ValueError(
            f'solver_steps={solver_steps} skips some of the chain\'s {n_diffusion_steps} steps, which solver="ddpm" cannot: '
            'use solver="ddim"'
        )
