"""BDPO against closed forms: step weights, penalty, aggregation, the soft optimum on a bandit; its schedule and options."""

from typing import Any

import numpy as np
import pytest
import torch
from small_agents import assert_all_differ, offline_knobs
from toy import line_data

from diffagents import BDPO
from diffagents.diffusion.chain import reverse_mean, reverse_var
from diffagents.types import Batch

SMALL: dict[str, Any] = {
    "preset": None,
    "seed": 0,
    "verbose": 0,
    "device": "cpu",
    "batch_size": 16,
    "n_critics": 3,
    "n_samples": 2,
    "behavior_steps": 6,
    "train_steps": 6,
    "policy_kwargs": {"net_arch": [16, 16]},
}
DATA = line_data()
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")


def small(**knobs: Any) -> BDPO:
    return BDPO(**{**SMALL, **knobs})


def batch_of(n: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(n, 3, generator=generator)
    return Batch(obs, torch.rand(n, 2, generator=generator) * 2 - 1, torch.zeros(n), obs, torch.zeros(n))


def test_step_weights() -> None:
    """w_n for five steps, as the KL of the chains' Gaussian kernels gives them."""
    agent = small().learn(DATA, total_timesteps=2)
    expected = torch.tensor([0.62179, 0.75051, 1.03720, 1.60204, 2.54721])
    torch.testing.assert_close(agent.step_weights, expected, rtol=0, atol=1e-5)


def test_penalty_is_the_kl_of_the_two_kernels() -> None:
    """|| mu_pi - mu_nu ||^2 / (2 beta_n), with the means of the unclipped sampler."""
    agent = small(clip_x0=False).learn(DATA, total_timesteps=2)
    chain, generator = agent.policy.chain, torch.Generator().manual_seed(0)
    x, eps, eps_nu = (torch.randn(7, 2, generator=generator) for _ in range(3))
    for i in range(5):
        mu, mu_nu = (reverse_mean(chain, i, x, e, clip_x0=False) for e in (eps, eps_nu))
        kl = (mu - mu_nu).square().sum(-1) / (2 * chain.beta[i])
        torch.testing.assert_close(agent.penalty(eps, eps_nu, i), kl, rtol=1e-4, atol=1e-5)


def test_penalty_around_a_clone_is_the_kl_of_kernels_with_the_exact_variance() -> None:
    """[F5]"""
    agent = small(clip_x0=False, precondition=True).learn(DATA, total_timesteps=2)
    agent.behavior_ema.net.log_var.data = torch.tensor([-5.0, -1.0])  # type: ignore[union-attr]
    chain, generator = agent.policy.chain, torch.Generator().manual_seed(0)
    x, eps, eps_nu = (torch.randn(7, 2, generator=generator) for _ in range(3))
    variances = reverse_var(chain, torch.tensor([-5.0, -1.0]).exp())
    for i in range(5):
        mu, mu_nu = (reverse_mean(chain, i, x, e, clip_x0=False) for e in (eps, eps_nu))
        kl = ((mu - mu_nu).square() / (2 * variances[i])).sum(-1)
        torch.testing.assert_close(agent.penalty(eps, eps_nu, i), kl, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(agent.penalty(eps, eps_nu, torch.full((7,), i)), kl, rtol=1e-4, atol=1e-5)


def test_no_penalty_and_no_pull_where_the_policy_is_the_behaviour() -> None:
    agent = small().learn(DATA)
    agent.policy.load_state_dict(agent.behavior_ema.state_dict())
    agent.policy_ema.load_state_dict(agent.behavior_ema.state_dict())
    batch = batch_of(16)
    _, path = agent.q_target(batch, agent.draw_critics(16, agent.generator))
    noise = agent.draw_policy(16, agent.generator)
    mean, step = agent.step(batch, noise, agent.policy)
    objective = agent.value_before(batch.obs, mean, noise)
    assert path.abs().max() == 0 and step.abs().max() == 0 and objective.abs().max() > 0
    gradients = torch.autograd.grad(step.sum(), list(agent.policy.parameters()), retain_graph=True)
    assert all(g.abs().max() == 0 for g in gradients)
    assert any(g.abs().max() > 0 for g in torch.autograd.grad(objective.sum(), list(agent.policy.parameters())))


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("lcb", [2.0 - 0.5 * (2 / 3) ** 0.5, 5.0]),  # population deviation of 1, 2, 3
        ("min", [1.0, 5.0]),
        ("mean", [2.0, 5.0]),
        ("convex", [0.5 * 1.0 + 0.5 * 3.0, 5.0]),
        ("random_convex", [(0.2 * 1 + 0.1 * 2 + 0.1 * 3) / 0.4, 5.0]),
    ],
)
def test_aggregation(aggregation: str, expected: list[float]) -> None:
    agent = small(aggregation=aggregation, rho=0.5)
    q = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    torch.testing.assert_close(agent.aggregate(q, {"mix": torch.tensor([0.2, 0.1, 0.1])}), torch.tensor(expected))


def test_first_step_of_the_chain_is_valued_by_q_the_others_by_v_of_the_step_below() -> None:
    agent = small(eta=1.0, aggregation="mean").learn(DATA)
    agent.policy.load_state_dict(agent.behavior_ema.state_dict())  # no penalty
    asked: list[torch.Tensor] = []

    def value(obs: torch.Tensor, act: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        asked.append(i)
        return (10.0 + i)[:, None].expand(3, -1, act.shape[1])

    agent.value_target.forward = value  # type: ignore[method-assign]
    agent.critic_target.forward = lambda pairs: torch.full((3, len(pairs)), -1.0)  # type: ignore[method-assign]
    batch = batch_of(5)
    noise = {"i": torch.arange(5), "eps": torch.randn(5, 2), "z": torch.randn(5, 2, 2)}
    objective = agent.value_before(batch.obs, agent.step(batch, noise, agent.policy)[0], noise)
    torch.testing.assert_close(objective.detach(), torch.tensor([-1.0, 10.0, 11.0, 12.0, 13.0]))


def test_the_distance_from_the_behaviour_is_one_over_eta_at_most() -> None:
    """[F6] Where V is linear with the same slope everywhere, the optimum is one half-bounded step from the behaviour's mean."""
    agent = small(eta=4.0, precondition=True, q_norm="spread", aggregation="mean", clip_x0=False).learn(DATA)
    agent.policy.load_state_dict(agent.behavior_ema.state_dict())
    slope = torch.tensor([3.0, -50.0])
    agent.value_target.forward = lambda obs, act, i: (act @ slope).expand(3, -1, -1)  # type: ignore[method-assign]
    agent.critic_target.forward = lambda pairs: (pairs[:, -2:] @ slope).expand(3, -1)  # type: ignore[method-assign]
    batch, n = batch_of(5), torch.arange(5)
    noise = {"i": n, "eps": torch.randn(5, 2), "z": torch.randn(5, 2, 2)}
    var = agent.reverse_variances()  # (T, A)
    u = var.sqrt() * slope
    u = u / u.square().mean().sqrt()
    shift = var.sqrt() * u / (1.0 + u.square().mean(-1, keepdim=True)).sqrt() / 4.0
    assert (shift / var.sqrt()).square().mean(-1).max() < 1.0 / 16.0
    start, _ = agent.step(batch, noise, agent.behavior_ema)
    chain, predicted = agent.policy.chain, agent.policy.net.forward
    per_eps = chain.from_x0 * chain.noise / chain.signal  # of the mean, by a unit of predicted noise
    agent.policy.net.forward = lambda *args: predicted(*args) - shift / per_eps[:, None]  # type: ignore[method-assign]
    torch.testing.assert_close(agent.step(batch, noise, agent.policy)[0], start + shift, rtol=1e-4, atol=1e-5)
    loss, _ = agent.policy_loss(batch, noise)
    gradients = torch.autograd.grad(loss, list(agent.policy.net.net.parameters()))  # type: ignore[union-attr]
    assert max(float(g.abs().max()) for g in gradients) < 1e-4
    with pytest.raises(ValueError, match="q_norm='spread' needs precondition=True"):
        small(q_norm="spread")


def test_order_of_a_run() -> None:
    """The policy starts as the lagged behaviour, waits for the warm-up, and moves every policy_freq-th step after it."""
    agent = small(behavior_steps=5, train_steps=9, warmup_steps=4, policy_freq=3)
    seen: list[dict[str, torch.Tensor]] = []

    def watch(local: dict[str, Any], _: Any) -> bool:
        run = local["self"]
        names = ("policy", "policy_ema", "behavior", "behavior_ema", "critic", "value")
        seen.append({n: torch.cat([p.detach().flatten() for p in getattr(run, n).parameters()]) for n in names})
        return True

    agent.learn(DATA, callback=watch)

    def moved(name: str) -> list[int]:
        return [i - 5 for i in range(5, 14) if not torch.equal(seen[i][name], seen[i - 1][name])]

    assert torch.equal(seen[5]["policy"], seen[4]["behavior_ema"])
    assert torch.equal(seen[5]["policy_ema"], seen[4]["behavior_ema"])
    assert not torch.equal(seen[4]["behavior"], seen[4]["behavior_ema"])
    assert moved("critic") == moved("value") == list(range(9))
    for name in ("policy", "policy_ema"):
        assert moved(name) == [4, 7]
    assert moved("behavior") == moved("behavior_ema") == [4, 7]
    planned = small(train_steps=4000).learn(DATA, total_timesteps=400, callback=lambda local, _: False)
    assert planned.stages()[1].updates[1].start == round(0.025 * 200)


def test_policy_of_a_second_run_goes_on() -> None:
    agent = small().learn(DATA)
    before = next(agent.policy.parameters()).detach().clone()
    agent.learn(DATA, stages=("train",), total_timesteps=1)
    assert not torch.equal(before, next(agent.behavior_ema.parameters()))
    torch.testing.assert_close(before, next(agent.policy.parameters()).detach(), rtol=0, atol=1e-4)


def test_behaviour_stage_alone_leaves_a_policy_that_acts_as_the_behaviour() -> None:
    agent = small().learn(DATA, stages=("behavior",))
    ours, theirs = agent.policy_ema.net.state_dict(), agent.behavior_ema.net.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    policy = agent.learn(DATA, stages=("train",)).policy.net.state_dict()
    policy = {key: value.clone() for key, value in policy.items()}
    agent.learn(DATA, stages=("behavior",))  # a trained policy is left alone
    assert all(torch.equal(policy[key], value) for key, value in agent.policy.net.state_dict().items())


def test_a_fresh_policy_starts_from_the_behaviour_again() -> None:
    agent = small(warmup_steps=2).learn(DATA).clone(eta=0.2, fresh=("policy", "policy_ema", "critic", "critic_target"))
    agent.learn(DATA, stages=("train",), callback=lambda local, _: False)  # one step, of the warm-up
    for name in ("policy", "policy_ema"):
        ours = getattr(agent, name).net.state_dict()
        assert all(torch.equal(ours[key], value) for key, value in agent.behavior_ema.net.state_dict().items())


def test_warmup_is_once_and_shorter_than_the_stage() -> None:
    with pytest.raises(ValueError, match="warmup_steps=6 leaves none of the 6 train steps for the policy"):
        small(warmup_steps=6).learn(DATA)
    agent = small(train_steps=400).learn(DATA, callback=lambda local, _: local["self"].num_timesteps < 6 + 1)
    assert agent.stages()[1].updates[1].start == 10
    agent.learn(DATA, stages=("train",), total_timesteps=1)
    agent.state.plan = type(agent.plan)({"train": 1000})  # type: ignore[misc]
    assert agent.stages()[1].updates[1].start == 0


def test_gamma_zero_equals_terminal_data() -> None:
    """Without a future no path is walked at the next state; the targets are those of data that all terminate."""
    agent = small().learn(DATA)
    batch = batch_of(8)
    ended = batch._replace(done=torch.ones(8), rew=torch.arange(8.0))
    noise = agent.draw_critics(8, agent.generator)
    y, _ = agent.q_target(ended, noise)
    bandit = agent.clone(gamma=0.0)
    assert "path" not in bandit.draw_critics(8, bandit.generator)
    y_bandit, _ = bandit.q_target(ended, noise)
    torch.testing.assert_close(y, y_bandit)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_value_of_noise_is_the_soft_optimum_on_a_bandit(seed: int) -> None:
    """One dimension, actions N(0, .4) cut to [-1, 1], reward 1 - (a - .5)^2: V_T(noise) is eta log E_nu exp(e / eta) within
    10 %, more than half of the way up from the behaviour's mean reward, and so are the policy's rewards.
    """
    eta, n = 0.1, 4000
    act = np.clip(np.random.default_rng(0).normal(0.0, 0.4, (n, 1)), -1, 1).astype(np.float32)
    reward = 1.0 - (act[:, 0] - 0.5) ** 2
    data = {
        "observations": np.zeros((n, 1), np.float32),
        "actions": act,
        "rewards": reward,
        "next_observations": np.zeros((n, 1), np.float32),
        "terminations": np.ones(n, bool),
        "truncations": np.zeros(n, bool),
    }
    agent = BDPO(
        seed=seed,
        verbose=0,
        eta=eta,
        gamma=0.0,
        aggregation="mean",
        n_critics=2,
        n_samples=4,
        tau=0.1,
        ema_tau=0.05,
        policy_freq=2,
        batch_size=128,
        learning_rate=3e-3,
        critic_learning_rate=3e-3,
        behavior_learning_rate=3e-3,
        reward_transform="none",
        behavior_steps=300,
        train_steps=450,
        policy_kwargs={"net_arch": [32, 32]},
        preset=None,
    ).learn(data)
    with torch.no_grad():
        obs, noise = torch.zeros(2000, 1), torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
        value = agent.value_target(obs, noise, torch.full((2000,), 4)).mean().item()
    optimum = eta * np.log(np.mean(np.exp(reward.astype(np.float64) / eta)))
    mean = float(reward.mean())
    assert abs(value - optimum) < 0.1 * abs(optimum), (value, optimum, mean)
    assert value - mean > 0.5 * (optimum - mean), (value, optimum, mean)  # not merely the behaviour's mean reward
    sampled = agent.predict(np.zeros((1000, 1), np.float32), select="first")[0]
    assert (1.0 - (sampled[:, 0] - 0.5) ** 2).mean() > mean + 0.5 * (optimum - mean)


def test_every_option_changes_the_result() -> None:
    base: dict[str, Any] = {
        **SMALL,
        "n_diffusion_steps": 3,
        "tau": 0.1,
        "warmup_steps": 0,
        "policy_freq": 1,
        "learning_rate": 1e-3,
    }
    base["max_grad_norm"] = 0.1
    other: dict[str, Any] = {
        "deterministic": True,
        "deterministic_backup": True,
        "cosine": True,
        "precondition": True,
        "return_temperature": 0.1,
        "returns_share": 0.5,
        "eta": 0.5,
        "rho": 0.1,
        "aggregation": "min",
        "n_critics": 4,
        "n_samples": 3,
        "n_diffusion_steps": 4,
        "clip_x0": False,
        "gamma": 0.5,
        "tau": 0.5,
        "ema_tau": 0.9,
        "policy_freq": 2,
        "warmup_steps": 1,
        "learning_rate": 1e-4,
        "critic_learning_rate": 1e-3,
        "behavior_learning_rate": 1e-3,
        "max_grad_norm": None,
        "batch_size": 17,
        "max_q_backup": True,
        "q_layer_norm": True,
        "n_candidates": 3,
        "select": "first",
        "solver": "ddim",
        "reward_transform": "normalize",
        "normalize_obs": True,
        "behavior_steps": 7,
        "train_steps": 7,
    }
    results = {name: run({**base, name: value}) for name, value in other.items()}
    results["temperature"] = run({**base, "select": "softmax", "temperature": 0.05})
    results["softmax"] = run({**base, "select": "softmax"})
    for kind in ("mean", "convex", "random_convex"):
        results[kind] = run({**base, "aggregation": kind})
    results["q_norm"] = run({**base, "precondition": True, "q_norm": "spread"})
    results["default"] = run(base)
    assert_all_differ(results)
    assert {*other, "q_norm", "temperature", "solver_steps"} == offline_knobs("BDPO")


def run(knobs: dict[str, Any]) -> np.ndarray:
    agent = BDPO(**knobs).learn(DATA)
    actions = agent.predict(np.ones((20, 3), np.float32))[0].ravel()
    return np.concatenate([actions, agent.critic_target.weights[0].detach().flatten().numpy()])
