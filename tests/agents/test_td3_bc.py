"""TD3+BC against closed forms, and what it learns from one-step choices."""

from typing import Any

import numpy as np
import pytest
import torch
from small_agents import BRIEF, assert_all_differ, offline_knobs, update
from toy import line_data

from diffagents import TD3BC
from diffagents.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore:action bounds", "ignore:.*consider normalize_obs")


def a_batch(n: int = 32) -> Batch:
    g = torch.Generator().manual_seed(5)
    act = 2.0 * torch.rand(n, 2, generator=g) - 1.0
    obs, next_obs = torch.randn(n, 3, generator=g), torch.randn(n, 3, generator=g)
    return Batch(obs, act, torch.randn(n, generator=g), next_obs, (torch.rand(n, generator=g) < 0.3).float())


def an_agent(**knobs: Any) -> TD3BC:
    settings: dict[str, Any] = {"preset": None, "train_steps": 5, "batch_size": 16, "policy_kwargs": {"net_arch": [16, 16]}}
    return TD3BC(seed=0, verbose=0, device="cpu", **{**settings, **knobs}).learn(line_data())


def test_policy_loss() -> None:
    """MSE over batch and dimensions, minus alpha E[Q_1] / E|Q_1|: Q_2 has no say, and the divisor no gradient."""
    agent, batch = an_agent(alpha=3.0), a_batch()
    with torch.no_grad():
        agent.critic.biases[-1][0] += 0.2  # Q_1 of both signs
        act = torch.tanh(agent.policy.net(batch.obs))  # type: ignore[operator]
        q = agent.critic(torch.cat([batch.obs, act], -1))[0]
        assert q.min() < 0 < q.max()
        weight = 3.0 / q.abs().mean()
        expected = (act - batch.act).square().mean() - weight * q.mean()
    loss, metrics = agent.policy_loss(batch, {})
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(metrics["lambda"], weight)

    parameters = list(agent.policy.parameters())
    gradient = torch.autograd.grad(loss, parameters)
    act = agent.policy(batch.obs)
    q = agent.critic(torch.cat([batch.obs, act], -1))[0]
    for ours, theirs in zip(
        gradient, torch.autograd.grad((act - batch.act).square().mean() - weight * q.mean(), parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)

    with torch.no_grad():
        agent.critic.biases[-1][1] += 5.0
    torch.testing.assert_close(agent.policy_loss(batch, {})[0], loss)


def test_lambda_makes_the_scale_of_rewards_irrelevant() -> None:
    """Q and 1000 Q give one and the same policy loss."""
    agent, batch = an_agent(), a_batch()
    before = agent.policy_loss(batch, {})[0]
    with torch.no_grad():
        agent.critic.weights[-1] *= 1000.0
        agent.critic.biases[-1] *= 1000.0
    torch.testing.assert_close(agent.policy_loss(batch, {})[0], before)


def test_critic_loss() -> None:
    """MSE_1 + MSE_2 to the smaller lagged twin at the lagged policy's action, with clipped noise, clipped to the space."""
    agent, batch = an_agent(policy_noise=0.4, noise_clip=0.3), a_batch()
    noise = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        agent.policy_target.net[-1].bias.fill_(1.0)  # type: ignore[index, union-attr, operator]
        raw = agent.policy_target(batch.next_obs) + (0.4 * noise).clamp(-0.3, 0.3)
        assert (raw > 1).any() and (0.4 * noise).abs().max() > 0.3
        q = agent.critic_target(torch.cat([batch.next_obs, raw.clamp(-1, 1)], -1))
        goal = batch.rew + 0.99 * (1 - batch.done) * torch.minimum(q[0], q[1])
        q1, q2 = agent.critic(torch.cat([batch.obs, batch.act], -1))
        expected = (q1 - goal).square().mean() + (q2 - goal).square().mean()
    loss, metrics = agent.critic_loss(batch, {"eps": noise})
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(metrics["q"], (q1.mean() + q2.mean()) / 2)


@pytest.mark.parametrize(("freq", "moves"), [(2, [2, 4, 6]), (3, [3, 6]), (1, [1, 2, 3, 4, 5, 6])])
def test_targets_move_on_policy_steps_only(freq: int, moves: list[int]) -> None:
    """Of steps 1, 2, ... the policy and both lagged copies move at the multiples of policy_freq; the critic at all."""
    agent = TD3BC(
        "MlpPolicy", "Pendulum-v1", seed=0, verbose=0, device="cpu", policy_freq=freq, batch_size=16, tau=0.1, preset=None
    )
    names = ("policy", "policy_target", "critic", "critic_target")
    last = {name: [p.detach().clone() for p in getattr(agent, name).parameters()] for name in names}
    moved: dict[str, list[int]] = {name: [] for name in names}

    def look(local: dict[str, Any], _: Any) -> bool:
        for name in names:
            now = [p.detach().clone() for p in getattr(agent, name).parameters()]
            if not all(map(torch.equal, now, last[name])):
                moved[name].append(agent.num_timesteps)
            last[name] = now
        return True

    agent.learn(line_data(act_dim=1), total_timesteps=6, callback=look)
    assert moved == {"policy": moves, "policy_target": moves, "critic": [1, 2, 3, 4, 5, 6], "critic_target": moves}


def test_targets_take_a_share_tau_of_the_new_networks() -> None:
    agent, batch = an_agent(tau=0.25), a_batch()
    pairs = ((agent.policy_target, agent.policy), (agent.critic_target, agent.critic))
    before = [next(target.parameters()).clone() for target, _ in pairs]
    update(agent.policy_loss, batch, {})
    for old, (target, online) in zip(before, pairs, strict=True):
        torch.testing.assert_close(next(target.parameters()), 0.75 * old + 0.25 * next(online.parameters()).detach())


def test_learns_the_best_action_of_the_data() -> None:
    """One-step choices, reward -|a - 0.5|^2 under uniform data: alpha = 0 clones to the middle, 2.5 goes to 0.5."""
    data = line_data(2000, horizon=1)
    data["terminations"][:], data["truncations"][:] = True, False
    cloned = TD3BC(
        seed=0,
        verbose=0,
        device="cpu",
        alpha=0.0,
        tau=0.05,
        learning_rate=3e-3,
        batch_size=128,
        policy_kwargs={"net_arch": [64, 64]},
        preset=None,
    ).learn(data, total_timesteps=300)
    agent = cloned.clone(alpha=2.5).learn(data, total_timesteps=200)
    obs = np.random.default_rng(1).normal(size=(100, 3)).astype(np.float32)
    errors = [float(np.abs(a.predict(obs)[0] - 0.5).mean()) for a in (cloned, agent)]
    assert errors[1] < 0.2 and errors[0] > 0.4, errors


def test_acts_on_observations_as_it_was_trained_on_them() -> None:
    """normalize_obs: data in other units give the same actions."""
    data, obs = line_data(), np.ones((4, 3), np.float32)
    other = {k: 50.0 * v + 7.0 if k.endswith("observations") else v for k, v in data.items()}
    one, two = (
        TD3BC(seed=0, verbose=0, device="cpu", train_steps=20, batch_size=16, preset=None).learn(d) for d in (data, other)
    )
    np.testing.assert_allclose(one.predict(obs)[0], two.predict(50.0 * obs + 7.0)[0], atol=0.02)
    assert np.abs(one.predict(obs)[0] - one.predict(50.0 * obs + 7.0)[0]).max() > 0.1


def test_every_option_changes_the_result() -> None:
    """No knob is decoration: each alternative value gives another policy."""
    base = {**BRIEF, "train_steps": 20, "tau": 0.1}
    other: dict[str, Any] = {
        "q_norm": "spread",
        "cosine": True,
        "return_temperature": 0.1,
        "returns_share": 0.5,
        "q_layer_norm": True,
        "alpha": 0.5,
        "policy_noise": 0.4,
        "noise_clip": 0.1,
        "policy_freq": 1,
        "gamma": 0.5,
        "tau": 0.5,
        "learning_rate": 1e-3,
        "batch_size": 17,
        "reward_transform": "normalize",
        "normalize_obs": False,
        "train_steps": 22,
    }
    obs = np.ones(3, np.float32)
    results = {name: TD3BC(**{**base, name: value}).learn(line_data()).predict(obs)[0] for name, value in other.items()}
    results["default"] = TD3BC(**base).learn(line_data()).predict(obs)[0]
    assert_all_differ(results)
    assert set(other) == offline_knobs("TD3BC")
