"""SRPO against closed forms, and the reuse of its stages."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_agents import assert_all_differ, offline_knobs
from torch import Tensor, nn
from toy import line_data

from diffagents import SRPO
from diffagents.diffusion.sde import vp_alpha_sigma
from diffagents.functional import spread_gradient
from diffagents.types import Batch, Spec

MEAN, VAR, BEST = 0.3, 0.04, -0.5  # data N(MEAN, VAR I); Q(s, a) = -|a - BEST|^2
N = 200_000


class Point(nn.Module):
    """A policy that gives one action everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((1, 2), value))

    def forward(self, obs: Tensor) -> Tensor:
        return self.value.expand(len(obs), 2)


class GaussianScore(nn.Module):
    """The exact noise predictor of N(MEAN, VAR I)."""

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor, masks: Any = None) -> Tensor:
        alpha, sigma = vp_alpha_sigma(t)
        return sigma[:, None] * (a_t - alpha[:, None] * MEAN) / (alpha.square() * VAR + sigma.square())[:, None]


class NoPull(nn.Module):
    """A score that is zero everywhere."""

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor, masks: Any = None) -> Tensor:
        return torch.zeros_like(a_t)


def analytic_agent(**knobs: Any) -> SRPO:
    agent = SRPO(seed=0, verbose=0, device="cpu", preset=None, **knobs)
    agent.set_up(Spec(spaces.Box(-np.inf, np.inf, (1,)), spaces.Box(-1, 1, (2,))))
    agent.behavior.net = GaussianScore()  # type: ignore[assignment]
    agent.critic.target_mean = lambda obs, act: -(act - BEST).square().sum(-1)  # type: ignore[method-assign]
    return agent


def gradient(agent: SRPO, value: float, n: int = N) -> Tensor:
    """d loss / d action at a policy that always says `value`; times are stratified and noises come in pairs of signs."""
    agent.policy = Point(value)
    generator = torch.Generator().manual_seed(1)
    u = (torch.arange(n) + 0.5) / n
    eps = torch.randn(n // 2, 2, generator=generator)
    noise = {"u": u.view(2, -1).T.reshape(-1), "eps": torch.stack([eps, -eps], 1).view(-1, 2)}
    obs = torch.zeros(n, 1)
    loss, _ = agent.policy_loss(Batch(obs, obs, obs[:, 0], obs, obs[:, 0]), noise)
    loss.backward()
    return agent.policy.value.grad[0].clone()  # type: ignore[no-any-return]


@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize("weight", ["sigma2", "constant", "alpha_over_sigma"])
def test_fixed_point(weight: str, beta: float) -> None:
    """With exact scores of N(m, v I): (2 beta q + c m) / (2 beta + c); c = E_t[w alpha sigma / (alpha^2 v + sigma^2)]."""
    t = 0.02 + 0.96 * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    alpha, sigma = vp_alpha_sigma(t)
    w = {"sigma2": sigma.square(), "constant": torch.ones_like(t), "alpha_over_sigma": alpha / sigma}[weight]
    c = (w * alpha * sigma / (alpha.square() * VAR + sigma.square())).mean().item()
    expected = (2 * beta * BEST + c * MEAN) / (2 * beta + c)

    agent = analytic_agent(beta=beta, weight=weight)
    low, high = gradient(agent, -0.9), gradient(agent, 0.9)  # the loss gradient is linear in the action
    root = -0.9 - low * 1.8 / (high - low)
    torch.testing.assert_close(root, torch.full((2,), expected), rtol=0, atol=5e-3)
    assert (high > low).all()  # a minimum


def test_noise_baseline_keeps_the_mean_and_cuts_the_variance() -> None:
    """subtract_noise: same expected gradient, much less spread between single samples."""
    means, spreads = [], []
    for subtract in (True, False):
        agent = analytic_agent(beta=0.1, subtract_noise=subtract)
        means.append(gradient(agent, 0.1))
        generator = torch.Generator().manual_seed(2)
        singles = []
        for _ in range(300):
            agent.policy = Point(0.1)
            obs = torch.zeros(1, 1)
            loss, _ = agent.policy_loss(Batch(obs, obs, obs[:, 0], obs, obs[:, 0]), agent.draw_policy(1, generator))
            loss.backward()
            singles.append(agent.policy.value.grad[0].clone())
        spreads.append(torch.stack(singles).var(0).mean().item())
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=5e-3)
    assert spreads[0] < 0.5 * spreads[1], spreads


@pytest.mark.parametrize(("norm", "length"), [("l2", 1.0), ("rms", 2**0.5)])
def test_q_grad_norm(norm: str, length: float) -> None:
    """ "l2" gives dQ/da unit length; "rms" sqrt(A), as the official code."""
    agent = analytic_agent(beta=1.0, q_grad_norm=norm, subtract_noise=False)
    agent.behavior.net = NoPull()  # type: ignore[assignment]
    assert gradient(agent, 0.4, 100).norm().item() == pytest.approx(length, rel=1e-5)


def test_q_grad_norm_in_the_spread_of_the_data() -> None:
    """The step of `spread_gradient` with v around the clone [F5]; the rest of the gradient does not depend on beta."""
    var, gradients = torch.tensor([0.01, 0.25]), []
    for beta in (1.0, 2.0):
        agent = SRPO(seed=0, verbose=0, device="cpu", q_grad_norm="spread", precondition=True, beta=beta, preset=None)
        agent.set_up(Spec(spaces.Box(-np.inf, np.inf, (1,)), spaces.Box(-1, 1, (2,))))
        agent.critic.target_mean = lambda obs, act: -70.0 * (act - BEST).square().sum(-1)  # type: ignore[method-assign]
        agent.behavior.net.log_var.data = var.log()  # type: ignore[union-attr]
        gradients.append(gradient(agent, 0.4, 1000))
    g = torch.full((2,), -140.0 * (0.4 - BEST))
    expected = spread_gradient(g.expand(2, 2), var)[0]  # the same in every row
    torch.testing.assert_close(gradients[0] - gradients[1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="q_grad_norm='spread' needs precondition=True"):
        SRPO(q_grad_norm="spread", preset=None)


def test_policy_update_leaves_critic_and_behavior_alone() -> None:
    agent = SRPO(seed=0, verbose=0, critic_steps=2, behavior_steps=2, policy_steps=2, behavior_batch_size=8, preset=None).learn(
        line_data()
    )
    before = {name: {k: v.clone() for k, v in state.items()} for name, state in agent.get_parameters().items()}
    agent.learn(line_data(), stages=("policy",))
    for name, state in agent.get_parameters().items():
        same = all(torch.equal(before[name][key], value) for key, value in state.items())
        assert same is (name != "policy"), name


def test_stages_are_reused_for_another_beta() -> None:
    """clone(beta=..., fresh=("policy",)) equals training that beta from the start on the same critic and behaviour."""
    knobs = {
        "critic_steps": 5,
        "behavior_steps": 5,
        "policy_steps": 5,
        "behavior_batch_size": 8,
        "verbose": 0,
        "seed": 3,
        "policy_kwargs": {"net_arch": [16, 16], "behavior_width": 16, "behavior_blocks": 1},
    }
    data, obs = line_data(), np.zeros((4, 3), np.float32)
    base = SRPO(beta=0.05, **knobs).learn(data, stages=("critic", "behavior"))
    first = base.clone(beta=0.5, fresh=("policy",)).learn(data, stages=("policy",))
    second = base.clone(beta=5.0, fresh=("policy",)).learn(data, stages=("policy",))
    whole = SRPO(beta=0.5, **knobs).learn(data)
    assert np.array_equal(first.predict(obs)[0], whole.predict(obs)[0])
    assert not np.array_equal(first.predict(obs)[0], second.predict(obs)[0])


def test_behavior_samples() -> None:
    """deterministic=True depends on the observation only; otherwise samples differ and stay in the action space."""
    agent = SRPO(seed=0, verbose=0, critic_steps=1, behavior_steps=2, policy_steps=1, behavior_batch_size=8).learn(line_data())
    bc, obs = agent.behavior_policy(), np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    one, _ = bc.predict(obs, deterministic=True)
    two, _ = bc.predict(obs[::-1].copy(), deterministic=True)
    np.testing.assert_allclose(one, two[::-1], atol=1e-6)
    a, b = bc.predict(obs)[0], bc.predict(obs)[0]
    assert not np.array_equal(a, b)
    assert all(agent.action_space.contains(x) for x in a)


def test_learns_the_best_action_of_the_data() -> None:
    """One-step choices, reward -|a - 0.5|^2 under uniform data: a larger beta lands nearer to 0.5."""
    data = line_data(2000, horizon=1)
    data["terminations"][:], data["truncations"][:] = True, False
    base = SRPO(
        seed=0,
        verbose=0,
        critic_steps=600,
        behavior_steps=150,
        policy_steps=300,
        batch_size=128,
        behavior_batch_size=128,
        learning_rate=3e-3,
        tau=0.05,
        reward_transform="none",
        policy_kwargs={"net_arch": [64, 64], "behavior_width": 32, "behavior_blocks": 1},
        preset=None,
    ).learn(data, stages=("critic", "behavior"))
    obs = np.random.default_rng(1).normal(size=(100, 3)).astype(np.float32)
    errors = []
    for beta in (0.01, 10.0):
        agent = base.clone(beta=beta, fresh=("policy",)).learn(data, stages=("policy",))
        errors.append(np.abs(agent.predict(obs)[0] - 0.5).mean())
    assert errors[1] < 0.1 < errors[0], errors


def test_every_option_changes_the_result() -> None:
    """No knob is decoration: each alternative value gives another policy."""
    base: dict[str, Any] = {
        "preset": None,
        "critic_steps": 20,
        "behavior_steps": 3,
        "policy_steps": 3,
        "batch_size": 16,
        "behavior_batch_size": 8,
        "tau": 0.1,
        "verbose": 0,
        "seed": 0,
        "policy_kwargs": {"net_arch": [64, 64], "behavior_width": 64},
    }
    other: dict[str, Any] = {
        "precondition": True,
        "return_temperature": 0.1,
        "returns_share": 0.5,
        "q_layer_norm": True,
        "cosine": True,
        "beta": 0.5,
        "expectile": 0.9,
        "gamma": 0.5,
        "tau": 0.5,
        "learning_rate": 1e-3,
        "batch_size": 17,
        "behavior_batch_size": 9,
        "dropout": 0.5,
        "weight": "constant",
        "subtract_noise": False,
        "q_grad_norm": "l2",
        "reward_transform": "normalize",
        "normalize_obs": True,
        "critic_steps": 21,
        "behavior_steps": 4,
        "policy_steps": 4,
    }
    obs = np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32)
    results = {name: SRPO(**{**base, name: value}).learn(line_data()).predict(obs)[0] for name, value in other.items()}
    results["default"] = SRPO(**base).learn(line_data()).predict(obs)[0]
    results["bootstrap"] = SRPO(**base, precondition=True, bootstrap="policy").learn(line_data()).predict(obs)[0]
    assert_all_differ(results)
    assert {*other, "bootstrap"} == offline_knobs("SRPO")
