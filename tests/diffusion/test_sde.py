"""The VP-SDE and its sampler against closed forms."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from diffagents.diffusion.sde import dpm_solve, dpm_solver_steps, vp_alpha_sigma
from diffagents.functional import eps_loss, perturb

# t, alpha_t, sigma_t (algorithm specification of the SRPO and QGPO code, six digits)
SCHEDULE = [
    (0.001, 0.999945, 0.010485),
    (0.02, 0.997014, 0.077215),
    (0.1, 0.946722, 0.322053),
    (0.25, 0.723657, 0.690160),
    (0.5, 0.281183, 0.959654),
    (0.98, 0.008011, 0.999968),
    (1.0, 0.006572, 0.999978),
]


@pytest.mark.parametrize(("t", "alpha", "sigma"), SCHEDULE)
def test_schedule(t: float, alpha: float, sigma: float) -> None:
    a, s = vp_alpha_sigma(torch.tensor([t]))
    assert a.item() == pytest.approx(alpha, abs=2e-6)
    assert s.item() == pytest.approx(sigma, abs=2e-6)
    assert (a.square() + s.square()).item() == pytest.approx(1.0, abs=1e-6)


def test_perturb_and_loss() -> None:
    x, eps = torch.ones(2, 3), torch.full((2, 3), 2.0)
    alpha, sigma = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.25])
    assert perturb(x, eps, alpha, sigma).tolist() == [[1.0] * 3, [1.0] * 3]
    assert eps_loss(eps, x).item() == 3.0  # summed over the three dimensions, averaged over the batch


def gaussian_eps(mean: float, var: float):  # type: ignore[no-untyped-def]
    """The exact noise predictor of N(mean, var I)."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = vp_alpha_sigma(t)
        return sigma[:, None] * (x - alpha[:, None] * mean) / (alpha.square() * var + sigma.square())[:, None]

    return eps


def test_solver_reproduces_a_gaussian() -> None:
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    sample = dpm_solve(gaussian_eps(0.4, 0.09), x, dpm_solver_steps(101))  # at 15 the last step shrinks the spread by 14 %
    assert sample.mean().item() == pytest.approx(0.4, abs=0.02)
    assert sample.std().item() == pytest.approx(0.3, abs=0.02)


def test_solver_returns_the_point_of_one_point_data() -> None:
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    sample = dpm_solve(gaussian_eps(0.7, 0.0), x, dpm_solver_steps(15))
    alpha, sigma = vp_alpha_sigma(torch.tensor([1e-3]))
    assert (sample - 0.7 * alpha).abs().max().item() <= 4.5 * sigma.item()  # it stops at t = 0.001


def test_solver_is_of_second_order() -> None:
    """Halving the step divides the error by about four. The exact flow keeps (x_t - alpha_t m) / std_t constant."""
    x, mean, var, t_end = torch.tensor([[1.3]]).double(), 0.4, 0.5, 0.2

    def std(t: float) -> float:
        alpha, _ = vp_alpha_sigma(torch.tensor([t]).double())
        return math.sqrt(alpha.item() ** 2 * var + 1 - alpha.item() ** 2)

    alpha_1, _ = vp_alpha_sigma(torch.tensor([1.0]).double())
    alpha_end, _ = vp_alpha_sigma(torch.tensor([t_end]).double())
    exact = alpha_end.item() * mean + (x.item() - alpha_1.item() * mean) * std(t_end) / std(1.0)
    errors = [abs(dpm_solve(gaussian_eps(mean, var), x, dpm_solver_steps(n, t_end)).item() - exact) for n in (32, 64, 128)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(1.7 < slope < 2.4 for slope in slopes), (errors, slopes)


@pytest.mark.parametrize("n_evals", [1, 2, 14, 15])
def test_solver_spends_its_budget(n_evals: int) -> None:
    calls: list[float] = []

    def eps(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t[0].item())
        return torch.zeros_like(x)

    dpm_solve(eps, torch.zeros(1, 1), dpm_solver_steps(n_evals))
    assert len(calls) == n_evals
    assert calls == sorted(calls, reverse=True) and calls[0] == 1.0
