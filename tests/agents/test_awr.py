"""AWR against closed forms: returns, weights, its Gaussian; and what it learns from one-step choices."""

from typing import Any

import numpy as np
import pytest
import torch
from small_agents import assert_all_differ, offline_knobs, update
from torch import Tensor
from toy import line_data

from diffagents import AWR
from diffagents.data.load import load_dataset
from diffagents.data.sampler import Sampler
from diffagents.functional import lambda_returns
from diffagents.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore:action bounds")
NONE = torch.Generator()  # AWR prepares without random numbers


def an_agent(**knobs: Any) -> AWR:
    settings: dict[str, Any] = {
        "preset": None,
        "critic_steps": 5,
        "policy_steps": 5,
        "batch_size": 16,
        "policy_kwargs": {"net_arch": [16, 16]},
    }
    return AWR(seed=0, verbose=0, device="cpu", **{**settings, **knobs}).learn(line_data())


def the_data(agent: AWR) -> Sampler:
    data = load_dataset(line_data(), verbose=0)
    return data.sampler("cpu", agent.reward_transform, agent.obs_normalizer)


# ---- returns ---------------------------------------------------------------------------------------------------------
REW = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
DONE = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # rows 0-1 terminate, 2-3 run into a time-out, 4-5 are cut
NEXT_VALUE = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
ENDS = torch.tensor([0, 2, 4, 4, 6])  # two episodes of which no row is left


@pytest.mark.parametrize(
    ("lam", "next_value", "expected"),
    [
        (1.0, torch.zeros(6), [1 + 0.5 * 2, 2.0, 4 + 0.5 * 8, 8.0, 16 + 0.5 * 32, 32.0]),  # Monte-Carlo
        (1.0, NEXT_VALUE, [1 + 0.5 * 2, 2.0, 4 + 0.5 * 28, 28.0, 16 + 0.5 * 62, 62.0]),
        (0.0, NEXT_VALUE, [1 + 0.5 * 10, 2.0, 4 + 0.5 * 30, 8 + 0.5 * 40, 16 + 0.5 * 50, 32 + 0.5 * 60]),  # one step
        (0.8, NEXT_VALUE, [1 + 0.5 * (2 + 1.6), 2.0, 4 + 0.5 * (6 + 22.4), 28.0, 16 + 0.5 * (10 + 49.6), 62.0]),
    ],
)
def test_lambda_returns(lam: float, next_value: Tensor, expected: list[float]) -> None:
    """By hand at gamma 0.5: a termination ends the sum, a time-out and a cut go on with V(s')."""
    returns = lambda_returns(REW, DONE, next_value, ENDS, 0.5, lam)
    assert returns.dtype == torch.float32
    assert returns.tolist() == pytest.approx(expected, rel=1e-6)


def test_lambda_returns_of_a_true_value_are_that_value() -> None:
    """Where V(s) = r + gamma V(s') holds along the data, every lambda gives back V."""
    rew = torch.randn(50, generator=torch.Generator().manual_seed(0))
    value = lambda_returns(rew, torch.zeros(50), torch.full((50,), 3.0), torch.tensor([50]), 0.9, 1.0)
    next_value = torch.cat([value[1:], torch.tensor([3.0])])
    for lam in (0.0, 0.5, 0.95):
        torch.testing.assert_close(lambda_returns(rew, torch.zeros(50), next_value, torch.tensor([50]), 0.9, lam), value)


# ---- weights ---------------------------------------------------------------------------------------------------------
def test_critic_is_fitted_to_monte_carlo_returns() -> None:
    """[D1] gamma^k r summed to the end of the episode, whatever the end; rows find their own."""
    agent = an_agent(gamma=0.9)
    data = the_data(agent)
    sampler = agent.prepare_critic(data, NONE)
    rew = data.all().rew.view(40, 10)  # episodes of 10, the third of them terminate
    expected = sum(0.9**k * torch.nn.functional.pad(rew[:, k:], (0, k)) for k in range(10))
    torch.testing.assert_close(sampler.tables["returns"], torch.as_tensor(expected).reshape(-1))

    rows = torch.tensor([399, 3, 3, 70])
    batch = sampler.gather(rows)
    value = agent.critic(batch.obs)[:, 0].detach()
    loss = update(agent.critic_loss, batch, {})["critic_loss"]
    torch.testing.assert_close(loss, (sampler.tables["returns"][rows] - value).square().mean())


def test_weights_of_one_step_advantages() -> None:
    """td_lambda = 0: A = r + gamma (1 - d) V(s') - V(s), through time-outs too; standardised over all data."""
    agent = an_agent(td_lambda=0.0, temperature=0.7, weight_clip=1e9)
    data = the_data(agent)
    weights = agent.prepare_policy(data, NONE).tables["weights"]
    b = data.all()
    with torch.no_grad():
        advantage = b.rew + 0.99 * (1.0 - b.done) * agent.critic(b.next_obs)[:, 0] - agent.critic(b.obs)[:, 0]
    expected = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-5) / 0.7
    torch.testing.assert_close(weights.log(), expected, rtol=1e-3, atol=1e-4)


def test_weights_are_standardised_and_clipped() -> None:
    agent = an_agent(weight_clip=1e9)
    whole = agent.prepare_policy(the_data(agent), NONE).tables["weights"]
    assert whole.shape == (400,)
    logs = whole.log()
    assert logs.mean().item() == pytest.approx(0.0, abs=1e-5) and logs.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    agent = agent.clone(weight_clip=1.5)
    weights = agent.prepare_policy(the_data(agent), NONE).tables["weights"]
    torch.testing.assert_close(weights, whole.clamp(max=1.5))
    assert 0 < int((whole > 1.5).sum()) < 400


def test_policy_loss_looks_weights_up_by_row() -> None:
    agent = an_agent()
    data = the_data(agent)
    sampler = agent.prepare_policy(data, NONE)
    rows = torch.tensor([399, 3, 3, 70])
    batch: Batch = sampler.gather(rows)
    with torch.no_grad():
        expected = -(sampler.tables["weights"][rows] * agent.policy.log_prob(batch.obs, batch.act)).mean()
    torch.testing.assert_close(update(agent.policy_loss, batch, {})["policy_loss"], expected)


def test_the_scale_of_rewards_is_no_temperature() -> None:
    """[D3] Rewards in other units, with a critic in them: the same weights."""
    agent = an_agent()
    data = the_data(agent)
    before = agent.prepare_policy(data, NONE).tables["weights"]
    with torch.no_grad():
        data.matrix[:, 3 + 2] *= 1000.0
        agent.critic[-1].weight *= 1000.0  # type: ignore[operator]
        agent.critic[-1].bias *= 1000.0  # type: ignore[operator]
    weights = agent.prepare_policy(data, NONE).tables["weights"]
    torch.testing.assert_close(weights, before, rtol=1e-3, atol=1e-4)


# ---- what it learns --------------------------------------------------------------------------------------------------
def test_one_gaussian_on_a_ring_falls_into_its_centre() -> None:
    """Every action of the data is 0.8 from the centre and worth the same; the mean that AWR clones is worth nothing."""
    n, rng = 1000, np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, n)
    data = {
        "observations": np.zeros((n, 1), np.float32),
        "actions": (0.8 * np.stack([np.cos(angle), np.sin(angle)], 1)).astype(np.float32),
        "rewards": np.ones(n, np.float32),
        "next_observations": np.zeros((n, 1), np.float32),
        "terminations": np.ones(n, bool),
        "truncations": np.zeros(n, bool),
    }
    agent = AWR(
        seed=0,
        verbose=0,
        device="cpu",
        critic_steps=50,
        policy_steps=300,
        learning_rate=3e-3,
        batch_size=128,
        policy_kwargs={"net_arch": [32, 32]},
        preset=None,
    ).learn(data)
    mean = agent.predict(np.zeros(1), deterministic=True)[0]
    assert np.linalg.norm(mean) < 0.1, mean
    samples = agent.predict(np.zeros((2000, 1)), deterministic=False)[0]
    assert (np.linalg.norm(samples, axis=-1) < 0.5).mean() > 0.2  # no action of the data is there
    assert samples.std(0) == pytest.approx(0.8 / 2**0.5, abs=0.1)


def test_learns_the_best_action_of_the_data() -> None:
    """One-step choices, reward -|a - 0.5|^2 under uniform data: a high temperature clones to the middle, a low one not."""
    data = line_data(2000, horizon=1)
    data["terminations"][:], data["truncations"][:] = True, False
    obs, errors = np.random.default_rng(1).normal(size=(100, 3)).astype(np.float32), []
    for temperature in (100.0, 1.0, 0.2):
        agent = AWR(
            seed=0,
            verbose=0,
            device="cpu",
            temperature=temperature,
            critic_steps=200,
            policy_steps=300,
            learning_rate=3e-3,
            batch_size=128,
            policy_kwargs={"net_arch": [64, 64]},
            preset=None,
        ).learn(data)
        errors.append(float(np.abs(agent.predict(obs, deterministic=True)[0] - 0.5).mean()))
    assert errors[0] > 0.4 > 0.3 > errors[1] > errors[2], errors


def test_a_trained_critic_serves_other_policies() -> None:
    """stages=("policy",) weighs anew with the critic as it is, and leaves it so."""
    base = an_agent()
    other = base.clone(temperature=0.3, fresh=("policy",)).learn(line_data(), stages=("policy",))
    assert all(torch.equal(a, b) for a, b in zip(base.critic.parameters(), other.critic.parameters(), strict=True))
    data = the_data(base)
    weights, ours = (agent.prepare_policy(data, NONE).tables["weights"].double() for agent in (other, base))
    torch.testing.assert_close(weights, (ours ** (1.0 / 0.3)).clamp(max=20.0), rtol=1e-3, atol=1e-4)


def test_every_option_changes_the_result() -> None:
    """No knob is decoration: each alternative value gives another policy."""
    base: dict[str, Any] = {
        "preset": None,
        "critic_steps": 20,
        "policy_steps": 20,
        "batch_size": 16,
        "verbose": 0,
        "seed": 0,
        "device": "cpu",
    }
    other: dict[str, Any] = {
        "deterministic": False,
        "cosine": True,
        "return_temperature": 0.1,
        "temperature": 0.5,
        "weight_clip": 1.2,
        "td_lambda": 0.5,
        "gamma": 0.5,
        "learning_rate": 1e-3,
        "batch_size": 17,
        "reward_transform": "normalize",
        "normalize_obs": False,
        "critic_steps": 21,
        "policy_steps": 21,
    }
    obs = np.ones(3, np.float32)
    results = {name: AWR(**{**base, name: value}).learn(line_data()).predict(obs)[0] for name, value in other.items()}
    results["default"] = AWR(**base).learn(line_data()).predict(obs)[0]
    assert_all_differ(results)
    assert set(other) == offline_knobs("AWR")
