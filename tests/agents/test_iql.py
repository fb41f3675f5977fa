"""IQL against closed forms, and what it learns from one-step choices."""

from typing import Any

import numpy as np
import pytest
import torch
from small_agents import BRIEF, assert_all_differ, offline_knobs, update
from torch.distributions import Normal
from toy import line_data

from diffagents import IQL
from diffagents.networks.mlp import GaussianPolicy
from diffagents.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore:action bounds")


def a_batch(n: int = 32) -> Batch:
    g = torch.Generator().manual_seed(5)
    act = 2.0 * torch.rand(n, 2, generator=g) - 1.0
    obs, next_obs = torch.randn(n, 3, generator=g), torch.randn(n, 3, generator=g)
    return Batch(obs, act, torch.randn(n, generator=g), next_obs, (torch.rand(n, generator=g) < 0.3).float())


def an_agent(**knobs: Any) -> IQL:
    settings: dict[str, Any] = {"preset": None, "train_steps": 5, "batch_size": 16, "policy_kwargs": {"net_arch": [16, 16]}}
    return IQL(seed=0, verbose=0, device="cpu", **{**settings, **knobs}).learn(line_data())


def advantages(agent: IQL, batch: Batch) -> torch.Tensor:
    q = agent.critic.q_target(torch.cat([batch.act, batch.obs], -1))
    return torch.minimum(q[0], q[1]) - agent.critic.v(batch.obs)[:, 0]


def test_half_expectile_is_half_the_mse() -> None:
    agent, batch = an_agent(), a_batch()
    _, metrics = agent.critic.loss(batch, 0.5, 0.99)
    torch.testing.assert_close(metrics["v_loss"], 0.5 * advantages(agent, batch).square().mean())


@pytest.mark.parametrize("beta", [2.0, 50.0])
def test_policy_loss_is_weighted_log_likelihood(beta: float) -> None:
    """- E[ min(exp(beta A), 100) log N(a; tanh(net(s)), sigma) ]; at beta 50 the cap of 100 counts."""
    agent, batch = an_agent(beta=beta), a_batch()
    assert isinstance(agent.policy, GaussianPolicy)
    with torch.no_grad():
        agent.critic.v.get_parameter("4.bias").fill_(-0.2)
        weight = (beta * advantages(agent, batch)).exp()
        assert bool((weight > 100).any()) is (beta == 50.0) and bool((weight < 100).any())
        agent.policy.log_std.copy_(torch.tensor([-0.5, 0.3]))
        density = Normal(torch.tanh(agent.policy.net(batch.obs)), torch.tensor([-0.5, 0.3]).exp())
        expected = -(weight.clamp(max=100.0) * density.log_prob(batch.act).sum(-1)).mean()
    loss, _ = agent.policy_loss(batch, {})
    torch.testing.assert_close(loss.detach(), expected)


def test_deterministic_policy_minimises_the_weighted_squared_error() -> None:
    agent, batch = an_agent(deterministic_policy=True), a_batch()
    with torch.no_grad():
        weight = (agent.config.beta * advantages(agent, batch)).exp()
        expected = (weight * (torch.tanh(agent.policy.net(batch.obs)) - batch.act).square().sum(-1)).mean()
    torch.testing.assert_close(agent.policy_loss(batch, {})[0].detach(), expected)
    obs = batch.obs.numpy()
    assert np.array_equal(agent.predict(obs, deterministic=False)[0], agent.predict(obs, deterministic=True)[0])


def test_sigma_counts_within_its_bounds() -> None:
    policy, zero = GaussianPolicy(3, 2, (8,)), torch.zeros(1, 3)
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor([-9.0, 3.0]))
        act = policy(zero) + torch.tensor([[0.01, 5.0]])
        expected = Normal(policy(zero), torch.tensor([-5.0, 2.0]).exp()).log_prob(act).sum(-1)
        torch.testing.assert_close(policy.log_prob(zero, act), expected)
        moved = policy.sample(zero, torch.tensor([[1.0, 0.01]])) - policy(zero)
    torch.testing.assert_close(moved, torch.tensor([[np.exp(-5.0), 0.01 * np.exp(2.0)]], dtype=torch.float32))


def test_policy_weighs_with_the_new_critic() -> None:
    """[D1] The policy's step follows the critic's on the same batch: V, and the lagged twins, are those after it."""
    agent, batch = an_agent(tau=0.5), a_batch()
    critic, policy = agent.stages()[0].updates
    old = advantages(agent, batch).mean()
    critic.step(batch, {})
    new = advantages(agent, batch).mean()
    assert not torch.equal(old, new)
    assert torch.equal(policy.step(batch, {})["advantage"], new)


def test_q_goal_has_the_value_from_before_the_step() -> None:
    """[D1] One call steps V and Q together: Q's gradient is that of the old V(s')."""
    agent, batch = an_agent(), a_batch()
    with torch.no_grad():
        goal = batch.rew + 0.99 * (1.0 - batch.done) * agent.critic.v(batch.next_obs)[:, 0]
        expected = (agent.critic.q(torch.cat([batch.act, batch.obs], -1)) - goal).square().mean()
    torch.testing.assert_close(update(agent.critic_loss, batch, {})["q_loss"], expected)


def test_dropout_is_in_every_hidden_layer_and_only_in_training() -> None:
    agent = an_agent(dropout=0.5, policy_kwargs={"net_arch": {"pi": [16, 8], "qf": [16]}})
    batch, policy = a_batch(), agent.policy
    masks = agent.draw_policy(32, torch.Generator().manual_seed(0))["masks"]
    assert masks.shape == (32, 24) and set(masks.unique().tolist()) == {0.0, 2.0}
    plain, dropped = agent.policy_loss(batch, {})[0], agent.policy_loss(batch, {"masks": masks})[0]
    assert not torch.equal(plain, dropped)
    torch.testing.assert_close(policy(batch.obs, torch.ones(32, 24)), policy(batch.obs))
    for layer in (slice(0, 16), slice(16, 24)):  # nothing passes a layer whose units are all dropped
        blocked = torch.ones(32, 24)
        blocked[:, layer] = 0.0
        assert len(policy(batch.obs, blocked).unique(dim=0)) == 1
    assert an_agent().draw_policy(32, torch.Generator()) == {}


def test_the_policy_step_leaves_the_critic_alone() -> None:
    agent, batch = an_agent(), a_batch()
    before = {key: value.clone() for key, value in agent.critic.state_dict().items()}
    update(agent.policy_loss, batch, {})
    assert all(torch.equal(value, before[key]) for key, value in agent.critic.state_dict().items())


def test_learning_rate_of_the_policy_falls_to_zero() -> None:
    agent = an_agent(train_steps=20)
    assert agent.optimizers["policy"].lr.item() < 0.01 * 3e-4
    assert agent.optimizers["critic"].lr.item() == pytest.approx(3e-4)


@pytest.mark.parametrize(("expectile", "value"), [(0.5, 0.5), (0.99, 0.995 / 1.01)])
def test_value_of_a_bandit(expectile: float, value: float) -> None:
    """Three actions with rewards 0, 0.5, 1: V is their mean at tau = 0.5, and goes to the best of them as tau goes to 1."""
    n = 300
    reward = np.tile(np.array([0.0, 0.5, 1.0], np.float32), n // 3)
    data = {
        "observations": np.zeros((n, 1), np.float32),
        "actions": (reward[:, None] - 0.5).astype(np.float32),
        "rewards": reward,
        "next_observations": np.zeros((n, 1), np.float32),
        "terminations": np.ones(n, bool),
        "truncations": np.zeros(n, bool),
    }
    agent = IQL(
        seed=0,
        verbose=0,
        device="cpu",
        expectile=expectile,
        tau=0.05,
        learning_rate=3e-3,
        reward_transform="none",
        train_steps=500,
        batch_size=64,
        policy_kwargs={"net_arch": [32, 32]},
        preset=None,
    ).learn(data)
    assert agent.critic.v(torch.zeros(1, 1)).item() == pytest.approx(value, abs=0.03)


def one_step_data() -> dict[str, Any]:
    data = line_data(2000, horizon=1)
    data["terminations"][:], data["truncations"][:] = True, False
    return data


@pytest.mark.parametrize("deterministic_policy", [False, True])
def test_learns_the_best_action_of_the_data(deterministic_policy: bool) -> None:
    """One-step choices, reward -|a - 0.5|^2 under uniform data: beta = 0 clones to the middle, beta = 10 goes to 0.5."""
    data, obs, errors = one_step_data(), np.random.default_rng(1).normal(size=(100, 3)).astype(np.float32), []
    for beta in (0.0, 10.0):
        agent = IQL(
            seed=0,
            verbose=0,
            device="cpu",
            beta=beta,
            deterministic_policy=deterministic_policy,
            tau=0.05,
            learning_rate=3e-3,
            reward_transform="none",
            train_steps=300,
            batch_size=128,
            policy_kwargs={"net_arch": [64, 64]},
            preset=None,
        ).learn(data)
        errors.append(float(np.abs(agent.predict(obs, deterministic=True)[0] - 0.5).mean()))
    assert errors[1] < 0.12 and errors[0] > 0.4, errors
    if isinstance(agent.policy, GaussianPolicy):  # samples are N(mean, sigma), whose middle the clamping leaves alone
        samples = agent.predict(np.repeat(obs[:1], 5000, 0), deterministic=False)[0]
        mean = agent.predict(obs[:1])[0]
        np.testing.assert_allclose(np.median(samples, 0), mean[0], atol=0.05)
        below = (samples < mean) & (samples > mean - agent.policy.log_std.detach().exp().numpy())
        np.testing.assert_allclose(below.mean(0), 0.341, atol=0.03)


def test_every_option_changes_the_result() -> None:
    """No knob is decoration: each alternative value gives another policy."""
    base = {**BRIEF, "train_steps": 20, "tau": 0.1}
    other: dict[str, Any] = {
        "deterministic": False,
        "return_temperature": 0.1,
        "returns_share": 0.5,
        "q_layer_norm": True,
        "expectile": 0.9,
        "beta": 0.5,
        "dropout": 0.5,
        "deterministic_policy": True,
        "gamma": 0.5,
        "tau": 0.5,
        "learning_rate": 1e-3,
        "batch_size": 17,
        "reward_transform": "normalize",
        "normalize_obs": True,
        "train_steps": 21,
    }
    obs = np.ones(3, np.float32)
    results = {name: IQL(**{**base, name: value}).learn(line_data()).predict(obs)[0] for name, value in other.items()}
    results["default"] = IQL(**base).learn(line_data()).predict(obs)[0]
    assert_all_differ(results)
    assert set(other) == offline_knobs("IQL")
