"""The preconditioned noise predictor: at first exact for a Gaussian, and a clone inside it with gradients of its own."""

import pytest
import torch
from torch import Tensor

from diffagents.agents.srpo import Behavior, ResidualScoreNet
from diffagents.diffusion.chain import vp_chain
from diffagents.diffusion.sde import vp_alpha_sigma
from diffagents.networks.diffusion_policy import ChainPolicy, MLPDenoiser
from diffagents.networks.preconditioned import PreconditionedDenoiser
from diffagents.networks.score_model import VPBehavior

S, A, T = 3, 2, 5


def made(discrete: bool) -> PreconditionedDenoiser:
    torch.manual_seed(0)
    net = MLPDenoiser(S, A, (16, 16)) if discrete else ResidualScoreNet(S, A, 16, 1)
    return PreconditionedDenoiser(net, S, A, T if discrete else None, clone_hidden=(8,))


def signal_and_noise(discrete: bool, t: Tensor) -> tuple[Tensor, Tensor]:
    return (vp_chain(T).signal[t], vp_chain(T).noise[t]) if discrete else vp_alpha_sigma(t)


@pytest.mark.parametrize("discrete", [True, False])
def test_starts_as_the_exact_noise_of_a_gaussian_around_the_clone(discrete: bool) -> None:
    """E[eps | a_t] for a ~ N(m, v): the posterior mean of a is m + v alpha (a_t - alpha m) / (alpha^2 v + sigma^2)."""
    net = made(discrete)
    with torch.no_grad():
        net.log_var.copy_(torch.tensor([-1.0, -3.0]))
    obs, a_t = torch.randn(7, S), torch.randn(7, A)
    t = torch.arange(7) % T if discrete else torch.linspace(0.01, 1.0, 7)
    alpha, sigma = (x[:, None] for x in signal_and_noise(discrete, t))
    m, v = net.clone(obs), net.log_var.exp()
    x0 = m + v * alpha * (a_t - alpha * m) / (alpha**2 * v + sigma**2)
    torch.testing.assert_close(net(a_t, obs, t), (a_t - alpha * x0) / sigma, atol=1e-5, rtol=1e-5)


def test_the_correction_moves_the_action_by_the_standard_deviation_of_the_posterior() -> None:
    net = made(True)
    last = net.net.trunk[-1]  # type: ignore[index, union-attr]
    obs, a_t, t = torch.randn(4, S), torch.randn(4, A), torch.arange(4)
    before = net(a_t, obs, t)
    with torch.no_grad():
        last.bias.fill_(1.0)  # F = 1 everywhere
    alpha, sigma = (x[:, None] for x in signal_and_noise(True, t))
    v = net.log_var.exp()
    posterior_std = (v * sigma**2 / (alpha**2 * v + sigma**2)).sqrt()
    moved = -(net(a_t, obs, t) - before) * sigma / alpha  # of x0 = (a_t - sigma eps) / alpha
    torch.testing.assert_close(moved, -posterior_std.expand_as(moved), atol=1e-6, rtol=1e-5)


def test_bound_to_states_it_is_the_same_network() -> None:
    net = made(True)
    torch.nn.init.normal_(net.net.trunk[-1].weight)  # type: ignore[index, union-attr, arg-type]
    obs, a = torch.randn(6, S), torch.randn(6, A)
    bound = net.on_states(obs, T)
    for i in range(T):
        torch.testing.assert_close(bound(a, i), net(a, obs, torch.full((6,), i)), atol=1e-6, rtol=1e-5)


def test_the_clone_learns_from_its_own_loss_alone() -> None:
    net, obs, act = made(True), torch.randn(9, S), torch.rand(9, A)
    torch.nn.init.normal_(net.net.trunk[-1].weight)  # type: ignore[index, union-attr, arg-type]
    own = [*net.clone.parameters(), net.log_var]
    denoising = net(act, obs, torch.zeros(9, dtype=torch.int64)).square().sum()
    assert all(g is None for g in torch.autograd.grad(denoising, own, retain_graph=True, allow_unused=True))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(net.clone_loss(obs, act), own))


def test_clone_loss_is_least_where_v_is_the_variance_of_the_error() -> None:
    net, obs, act = made(True), torch.randn(50, S), torch.rand(50, A)
    best = (net.clone(obs) - act).square().mean(0).log().detach()
    with torch.no_grad():
        net.log_var.copy_(best)
    (gradient,) = torch.autograd.grad(net.clone_loss(obs, act), [net.log_var])
    torch.testing.assert_close(gradient, torch.zeros(A), atol=1e-6, rtol=0)


def test_the_first_candidate_has_no_noise_and_the_others_have() -> None:
    policy, behavior = ChainPolicy(made(True), A, T), Behavior(made(False), A)
    for noise in (policy.fixed_noise, VPBehavior(made(False), A).fixed_noise):
        assert not noise[0].any() and noise[1:].flatten(1).any(1).all()
    assert not behavior.noise.any()


def test_the_noiseless_path_starts_at_the_clone() -> None:
    """Without corrections and with a small v, the first candidate of deterministic samples is the clone's action."""
    net = made(True)
    with torch.no_grad():
        net.log_var.fill_(-12.0)
    policy = ChainPolicy(net, A, T)
    obs = torch.randn(5, S)
    action = policy.sample(obs, policy.fixed_noise[0][:, None].expand(-1, 5, -1))
    torch.testing.assert_close(action, net.clone(obs), atol=1e-3, rtol=0)
