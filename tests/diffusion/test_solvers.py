"""The DPM-Solvers and what they sample from, against closed forms: every order, noise and data prediction."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffagents.diffusion.sde import dpm_solve, dpm_solver_steps, vp_alpha_sigma
from diffagents.networks.score_model import ConditionedBlock, UNetDenoiser, VPBehavior

SOLVERS = {"DPM-Solver-2": (2, False), "DPM-Solver-3": (3, False), "DPM-Solver++ 2": (2, True)}
every = pytest.mark.parametrize(("order", "data_prediction"), SOLVERS.values(), ids=SOLVERS)


def gaussian_eps(mean: float, var: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact noise predictor of N(mean, var I)."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = vp_alpha_sigma(t[..., None])
        return sigma * (x - alpha * mean) / (alpha.square() * var + sigma.square())

    return eps


def alpha_sigma(t: float) -> tuple[float, float]:
    alpha, sigma = vp_alpha_sigma(torch.tensor(t, dtype=torch.float64))
    return alpha.item(), sigma.item()


def log_snr(t: float) -> float:
    alpha, sigma = alpha_sigma(t)
    return math.log(alpha / sigma)


@every
@pytest.mark.parametrize("n_evals", [1, 2, 3, 4, 5, 14, 15, 16])
def test_the_budget_is_spent_at_uniform_times(order: int, data_prediction: bool, n_evals: int) -> None:
    calls: list[float] = []

    def eps(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t.item())
        return torch.zeros_like(x)

    steps = dpm_solver_steps(n_evals, order=order, data_prediction=data_prediction)
    dpm_solve(eps, torch.zeros(1, 1), steps)
    torch.testing.assert_close(torch.tensor(calls), torch.linspace(1.0, 1e-3, n_evals + 1)[:-1])


def test_the_orders_are_those_of_the_authors_code() -> None:
    orders = {n: [len(step) for step in dpm_solver_steps(n, order=3)] for n in (14, 15, 16)}
    assert orders == {14: [3, 3, 3, 3, 2], 15: [3, 3, 3, 3, 2, 1], 16: [3, 3, 3, 3, 3, 1]}
    assert [len(step) for step in dpm_solver_steps(15)] == [2] * 7 + [1]
    with pytest.raises(ValueError, match="order=4"):
        dpm_solver_steps(15, order=4)
    with pytest.raises(ValueError, match="data_prediction=True"):
        dpm_solver_steps(15, order=3, data_prediction=True)


@every
def test_one_point_data_gives_the_point(order: int, data_prediction: bool) -> None:
    """The noise stays what it was at t = 1, so every solver is exact: alpha a* + sigma eps at the end, t = 0.001."""
    x = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sample = dpm_solve(gaussian_eps(0.7, 0.0), x, dpm_solver_steps(15, order=order, data_prediction=data_prediction))
    (alpha_1, sigma_1), (alpha, sigma) = alpha_sigma(1.0), alpha_sigma(1e-3)
    torch.testing.assert_close(sample, alpha * 0.7 + sigma * (x - alpha_1 * 0.7) / sigma_1, rtol=0, atol=1e-9)
    assert (sample - 0.7).abs().max() < 5e-2 and (sample - 0.7).abs().mean() < 1e-2  # sigma is 0.0105 there


@every
@pytest.mark.parametrize(("n_evals", "var", "narrower"), [(15, 0.5, 0.08), (15, 0.09, 0.22), (150, 0.09, 0.03)])
def test_gaussian_data(order: int, data_prediction: bool, n_evals: int, var: float, narrower: float) -> None:
    """The mean within its Monte-Carlo error; the spread too, but for what few calls take from a sharp one (sde.py)."""
    n, mean = 20_000, 0.4
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    steps = dpm_solver_steps(n_evals, order=order, data_prediction=data_prediction)
    sample = dpm_solve(gaussian_eps(mean, var), x, steps)
    std, noise = math.sqrt(var), 4.0 / math.sqrt(2 * n)  # four standard errors of the mean, in units of the spread
    assert abs(sample.mean().item() - mean) < std * noise + 1e-3
    assert 1.0 - narrower - noise < sample.std().item() / std < 1.01 + noise


def test_how_much_15_calls_narrow() -> None:
    """The numbers in the docstring of dpm_solver_steps: shares of a standard deviation of 0.3 and of 0.7."""
    x = torch.ones(1, 1, dtype=torch.float64)
    for (order, data_prediction), found in zip(SOLVERS.values(), ((0.84, 1.01), (0.84, 0.99), (0.79, 0.93)), strict=True):
        for var, share in zip((0.09, 0.5), found, strict=True):
            steps = dpm_solver_steps(15, order=order, data_prediction=data_prediction)
            (alpha_1, sigma_1), (alpha, sigma) = alpha_sigma(1.0), alpha_sigma(1e-3)
            exact = math.sqrt((alpha**2 * var + sigma**2) / (alpha_1**2 * var + sigma_1**2))
            assert dpm_solve(gaussian_eps(0.0, var), x, steps).item() / exact == pytest.approx(share, abs=0.006)


@every
def test_order_of_convergence(order: int, data_prediction: bool) -> None:
    """Halving the steps divides the error by 2^order. The exact flow keeps (x_t - alpha_t m) / std_t constant."""
    x, mean, var, t_end = torch.tensor([[1.3]], dtype=torch.float64), 0.4, 0.5, 0.2

    def std(t: float) -> float:
        alpha, sigma = alpha_sigma(t)
        return math.sqrt(alpha**2 * var + sigma**2)

    exact = alpha_sigma(t_end)[0] * mean + (x.item() - alpha_sigma(1.0)[0] * mean) * std(t_end) / std(1.0)
    counts = (62, 122, 242) if order == 3 else (64, 128, 256)  # no step of order 1 at the end
    errors = []
    for n in counts:
        steps = dpm_solver_steps(n, t_end, order, data_prediction)
        errors.append(abs(dpm_solve(gaussian_eps(mean, var), x, steps).item() - exact))
    slopes = [
        math.log(a / b) / math.log(m / n)
        for (a, b), (n, m) in zip(itertools.pairwise(errors), itertools.pairwise(counts), strict=True)
    ]
    assert all(order - 0.35 < slope < order + 0.6 for slope in slopes), (errors, slopes)


def test_order_3_is_exact_where_the_noise_is_linear_in_lambda() -> None:
    """x / alpha falls by the integral of exp(-lambda) eps(lambda): a closed form for eps = 2 + 0.3 lambda."""
    steps = dpm_solver_steps(16, order=3)[:-1]  # the last is of order 1

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 2.0 + 0.3 * log_snr(t.item()))

    x, end = torch.tensor([[0.8]], dtype=torch.float64), 1.0 - 0.999 * 15 / 16

    def antiderivative(t: float) -> float:  # of exp(-l) (2 + 0.3 l)
        return -math.exp(-log_snr(t)) * (2.3 + 0.3 * log_snr(t))

    exact = alpha_sigma(end)[0] * (0.8 / alpha_sigma(1.0)[0] - (antiderivative(end) - antiderivative(1.0)))
    assert dpm_solve(eps, x, steps).item() == pytest.approx(exact, rel=1e-9)


def test_data_prediction_is_the_papers_algorithm() -> None:
    """A step as DPM-Solver++ writes it, in terms of the predicted data x0 = (x - sigma eps) / alpha."""
    eps_fn = gaussian_eps(0.3, 0.2)
    x = torch.randn(5, 2, dtype=torch.float64)

    def data(point: Tensor, t: float) -> Tensor:
        alpha, sigma = alpha_sigma(t)
        return (point - sigma * eps_fn(point, torch.tensor([t], dtype=torch.float64))) / alpha

    t0, t1, t2 = (1.0 - 0.999 * i / 15 for i in range(3))
    h, h1 = log_snr(t2) - log_snr(t0), log_snr(t1) - log_snr(t0)
    (_, s0), (a1, s1), (a2, s2) = (alpha_sigma(t) for t in (t0, t1, t2))
    d0 = data(x, t0)
    u = s1 / s0 * x - a1 * math.expm1(-h1) * d0
    d = d0 + (data(u, t1) - d0) * h / (2 * h1)
    expected = s2 / s0 * x - a2 * math.expm1(-h) * d
    found = dpm_solve(eps_fn, x, dpm_solver_steps(15, data_prediction=True)[:1])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# ---- the behaviour model and its network ------------------------------------------------------------------------------
def test_unet_has_the_size_of_the_papers() -> None:
    """1,621,440 + 32 S + 2049 A weights; the 16 frequencies are fixed."""
    for obs_dim, act_dim in ((11, 3), (17, 6), (29, 8)):
        net = UNetDenoiser(obs_dim, act_dim)
        assert sum(p.numel() for p in net.parameters()) == 1_621_440 + 32 * obs_dim + 2049 * act_dim
        assert net.time.frequencies.shape == (16,) and 15 < net.time.frequencies.std() < 50
    with pytest.raises(ValueError, match="behavior_width=3"):
        UNetDenoiser(3, 2, 3)


def test_unet_is_the_papers_function() -> None:
    """Written out once more, layer by layer, for a small width."""
    net, a, s, t = UNetDenoiser(3, 2, 16), torch.randn(5, 2), torch.randn(5, 3), torch.rand(5)
    phase = 2 * math.pi * t[:, None] * net.time.frequencies
    time = net.time.project(torch.cat([phase.sin(), phase.cos()], 1))
    hidden = net.embed[0](torch.cat([F.silu(net.state(s)), time], 1))
    e = net.embed[2](F.silu(hidden))

    def block(b: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(b, ConditionedBlock)
        h1 = F.silu(x @ b.inner.weight.T + b.inner.bias) + b.condition(F.silu(e))
        return F.silu(h1 @ b.outer.weight.T + b.outer.bias) + b.skip(x)

    d1 = block(net.down[0], a)
    d2 = block(net.down[1], d1)
    d3 = block(net.down[2], d2)
    assert (d1.shape[1], d2.shape[1], d3.shape[1]) == (16, 8, 4)
    u2 = block(net.up[0], torch.cat([d3, block(net.middle, d3)], 1))
    u1 = block(net.up[1], torch.cat([d2, u2], 1))
    expected = net.output(torch.cat([d1, u1], 1))
    torch.testing.assert_close(net(a, s, t), expected, rtol=1e-4, atol=1e-5)
    together = net(a.expand(4, 5, 2), s, t)  # state and time are embedded once for all four
    torch.testing.assert_close(together, expected.expand(4, 5, 2), rtol=1e-4, atol=1e-5)


def test_samples_of_a_state_are_the_ones_it_has_alone() -> None:
    """Candidates share the state's embedding and nothing else."""
    behavior = VPBehavior(UNetDenoiser(3, 2, 16), 2)
    obs, noise, steps = torch.randn(4, 3), torch.randn(4, 5, 2), dpm_solver_steps(6, order=3)
    together = behavior.sample(obs, noise, steps)
    assert together.shape == (4, 5, 2)
    alone = behavior.sample(obs.repeat_interleave(5, 0), noise.view(20, 1, 2), steps)
    torch.testing.assert_close(together.view(20, 2), alone[:, 0], rtol=1e-4, atol=1e-4)


def test_noise_is_the_callers_or_fixed() -> None:
    behavior, generator = VPBehavior(UNetDenoiser(3, 2, 16), 2), torch.Generator().manual_seed(0)
    one, two = behavior.noise(3, 4, False, generator), behavior.noise(3, 4, False, generator)
    assert one.shape == (3, 4, 2) and not torch.equal(one, two)
    assert torch.equal(one, behavior.noise(3, 4, False, torch.Generator().manual_seed(0)))
    fixed = behavior.noise(3, 4, True, generator)
    assert fixed.shape == (1, 4, 2) and torch.equal(fixed, behavior.noise(3, 4, True, generator))
    assert "fixed_noise" in behavior.state_dict()


class PointAtState(nn.Module):
    """The exact noise predictor of a behaviour that always does a = s."""

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = vp_alpha_sigma(t[..., None])
        return (a_t - alpha * obs) / sigma


def test_support_reaches_every_state_and_tells_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    behavior, obs, generator = VPBehavior(PointAtState(), 2), torch.randn(700, 2), torch.Generator().manual_seed(0)
    actions = torch.full((700, 3, 2), torch.nan)
    for rows, some in behavior.support(obs, 3, dpm_solver_steps(4), generator, "critic"):
        actions[rows] = some
    assert (actions - obs[:, None]).abs().max() < 0.06
    assert capsys.readouterr().out == ""  # it took no time
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr("diffagents.networks.score_model.time.perf_counter", lambda: next(clock))
    for name in (None, "critic"):
        for _ in behavior.support(obs, 3, dpm_solver_steps(4), generator, name):
            pass
        said = capsys.readouterr().out
        assert said == (
            "" if name is None else "critic: 3 actions of the behaviour model for each of 700 states; about 1.4 minutes\n"
        )
    assert len(list(behavior.support(obs[:0], 3, dpm_solver_steps(4), generator, None))) == 0


def test_the_loss_is_least_for_the_exact_noise() -> None:
    behavior, obs, eps = VPBehavior(PointAtState(), 2), torch.randn(50, 2), torch.randn(50, 2)
    t = torch.linspace(0.1, 1.0, 50)
    assert behavior.loss(obs, obs, t, eps).item() == pytest.approx(0.0, abs=1e-6)
    assert behavior.loss(obs + 0.1, obs, t, eps).item() > 1e-3
