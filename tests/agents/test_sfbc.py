"""SfBC against closed forms: planned returns, rounds and their resuming, the choice among candidates."""

import itertools
import math
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_agents import assert_all_differ, offline_knobs
from torch import Tensor, nn
from toy import line_data

from diffagents import SfBC
from diffagents.agents.sfbc import planned_returns
from diffagents.data.sampler import Sampler
from diffagents.training.plan import Plan
from diffagents.types import Batch, Spec

SMALL: dict[str, Any] = {
    "preset": None,
    "seed": 0,
    "verbose": 0,
    "device": "cpu",
    "behavior_steps": 3,
    "critic_steps": 10,
    "planning_steps": 10,
    "batch_size": 16,
    "behavior_batch_size": 8,
    "n_support": 3,
    "n_candidates": 8,
    "solver_steps": 4,
    "policy_kwargs": {"net_arch": [16, 16], "behavior_width": 8},
}
DATA = line_data(100)
TRAINED: dict[str, Any] = {  # enough to learn a line
    **SMALL,
    "behavior_steps": 250,
    "critic_steps": 300,
    "planning_steps": 0,
    "batch_size": 64,
    "behavior_batch_size": 128,
    "solver_steps": 15,
    "policy_kwargs": {"net_arch": [32, 32], "behavior_width": 32},
}
OBS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")


class Sum(nn.Module):
    """Q of pairs [s, a] of 1 + 1 or 3 + 2 numbers: the sum of the actions."""

    def forward(self, pairs: Tensor) -> Tensor:
        return pairs[..., -(pairs.shape[-1] // 2) :].sum(-1, keepdim=True)


def trajectories() -> Sampler:
    """Three steps that end in a time-out, two in a terminal, one more. Columns s, a, r, d, s'."""
    rewards, done = [0.0, 4.0, -8.0, 1.0, 2.0, 5.0], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    rows = [[float(n), 0.0, rewards[n], done[n], 0.0] for n in range(6)]
    return Sampler(torch.tensor(rows), 1, 1, torch.tensor([0, 3, 6, 6]))  # of two more episodes no row is left


# ---- returns ---------------------------------------------------------------------------------------------------------
def test_planned_returns_by_hand() -> None:
    """gamma 1/2; V lifts rows 0 and 2, and what precedes row 2 inherits it; nothing crosses the end of a trajectory."""
    plain = planned_returns(trajectories(), 0.5)
    assert plain.tolist() == [0.0 + 0.5 * 0.0, 4.0 - 0.5 * 8.0, -8.0, 1.0 + 0.5 * 2.0, 2.0, 5.0]
    values = torch.tensor([2.5, 0.0, -2.0, 1.0, -5.0, 1.0])
    assert planned_returns(trajectories(), 0.5, values).tolist() == [2.5, 4.0 - 0.5 * 2.0, -2.0, 2.0, 2.0, 5.0]
    nowhere = torch.full((6,), -torch.inf)
    assert planned_returns(trajectories(), 0.5, nowhere).tolist() == plain.tolist()


def test_targets_are_standardised_and_the_critic_knows_by_what() -> None:
    agent = SfBC(**SMALL, gamma=0.5).learn(DATA)
    targets = agent.prepare_critic(trajectories(), agent.generator).tables["targets"]
    returns = torch.tensor([0.0, 0.0, -8.0, 2.0, 2.0, 5.0])
    mean, std = returns.mean(), returns.std(correction=0)
    torch.testing.assert_close(targets, (returns - mean) / std)
    assert (agent.critic.mean.item(), agent.critic.std.item()) == pytest.approx((mean.item(), std.item()))
    sampler = trajectories()
    sampler.matrix[:, 2] *= 1e-3
    targets = agent.prepare_critic(sampler, agent.generator).tables["targets"]
    torch.testing.assert_close(targets, (returns - mean) * 1e-3 / 0.1)  # the deviation counts as 0.1 at least
    assert agent.critic.std.item() == pytest.approx(0.1)


def test_the_critic_regresses_on_its_targets() -> None:
    agent = SfBC(**SMALL).learn(DATA)
    agent.critic.net = Sum()  # type: ignore[assignment]
    targets = torch.tensor([20.0, 10.0])
    agent.critic.mean.fill_(100.0)
    agent.critic.std.fill_(2.0)
    obs, act = torch.zeros(2, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    loss, metrics = agent.critic_loss(Batch(obs, act, obs[:, 0], obs, obs[:, 0], {"targets": targets}), {})
    assert loss.item() == pytest.approx(((3.0 - 20.0) ** 2 + (7.0 - 10.0) ** 2) / 2)
    assert metrics["q"].item() == pytest.approx(100.0 + 2.0 * 5.0)  # in units of reward


@pytest.mark.parametrize("some", [None, 2, 9])
def test_values_of_states_by_hand(some: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q = a, standardised; support 0 and s: V(s) = mean + std s e^(alpha s) / (1 + e^(alpha s)), where it is taken."""
    agent = SfBC(**SMALL, alpha=2.0, n_support_states=some).learn(DATA)
    agent.critic_before.net = Sum()  # type: ignore[assignment]
    agent.critic_before.mean.fill_(10.0)
    agent.critic_before.std.fill_(3.0)

    def support(obs: Tensor, n: int, *_: Any) -> Any:
        for row in range(len(obs)):  # one at a time
            yield slice(row, row + 1), torch.stack([torch.zeros(1, 1), obs[row : row + 1]], 1)

    monkeypatch.setattr(agent.behavior, "support", support)
    values = agent.state_values(trajectories(), torch.Generator().manual_seed(0))
    s = torch.arange(6.0)
    taken = values.isfinite()
    assert taken.sum() == (2 if some == 2 else 6) and bool((values[~taken] == -torch.inf).all())
    torch.testing.assert_close(values[taken], (10.0 + 3.0 * s * torch.sigmoid(2.0 * s))[taken])
    assert torch.equal(values, agent.state_values(trajectories(), torch.Generator().manual_seed(0)))


# ---- rounds ----------------------------------------------------------------------------------------------------------
def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_round_begins_with_the_first_weights_and_a_new_optimizer_and_goes_on_with_what_is_there() -> None:
    agent = SfBC(**SMALL).learn(DATA, stages=("behavior", "critic"))
    sampler, generator = Sampler(torch.randn(40, 10), 3, 2), torch.Generator().manual_seed(0)
    agent.state.plan = Plan({"planning": 10})
    trained = state_of(agent.critic)
    assert len(agent.optimizers["critic"].state) > 0
    targets = agent.prepare_planning(sampler, generator).tables["targets"]
    assert same(state_of(agent.critic_before), trained)
    built = SfBC(**SMALL)
    built.set_up(agent.spec)  # type: ignore[arg-type]
    assert same(state_of(agent.critic.net), state_of(built.critic.net))
    assert len(agent.optimizers["critic"].state) == 0
    mean = agent.critic.mean.clone()
    assert mean != trained["mean"]

    agent.plan.done["planning"] = 3  # a resumed stage: the same targets, and nothing else is touched
    with torch.no_grad():
        next(agent.critic.net.parameters()).add_(1.0)
    moved = state_of(agent.critic.net)
    again = agent.prepare_planning(sampler, torch.Generator().manual_seed(0)).tables["targets"]
    assert torch.equal(again, targets) and torch.equal(agent.critic.mean, mean)
    assert same(state_of(agent.critic.net), moved) and same(state_of(agent.critic_before), trained)


def test_another_round_plans_on_the_last_critic() -> None:
    agent = SfBC(**SMALL).learn(DATA)
    last, behavior = state_of(agent.critic), state_of(agent.behavior)
    agent.learn(DATA, stages=("planning",), reset_num_timesteps=False)
    assert same(state_of(agent.critic_before), last) and not same(state_of(agent.critic), last)
    assert same(state_of(agent.behavior), behavior)
    assert agent.num_timesteps == 3 + 10 + 10 + 10


def test_planning_stopped_and_loaded_ends_as_the_uninterrupted_one(tmp_path: pathlib.Path) -> None:
    whole, run = SfBC(**SMALL).learn(DATA), SfBC(**SMALL)
    for stop in (13, 17):  # between the rounds, within planning
        run.learn(DATA, reset_num_timesteps=stop == 13, callback=lambda local, _: local["self"].num_timesteps < stop)  # noqa: B023
        run = SfBC.load(run.save(tmp_path / f"{stop}.zip"), verbose=0)
    run.learn(DATA, reset_num_timesteps=False)
    for name, state in whole.get_parameters().items():
        assert same(state, run.get_parameters()[name]), name


# ---- the choice ------------------------------------------------------------------------------------------------------
def chooser(candidates: list[float]) -> SfBC:
    """An agent whose candidates are these numbers, (a, 0) each, and whose Q is a."""
    agent = SfBC(**SMALL)
    agent.set_up(Spec(spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1, 1, (2,))))
    table = torch.tensor([[x, 0.0] for x in candidates])
    agent.behavior.sample = lambda obs, noise, steps: table.expand(len(obs), -1, -1)  # type: ignore[method-assign]
    agent.critic.net = Sum()  # type: ignore[assignment]
    return agent


def test_deterministic_is_the_mean_of_the_best() -> None:
    agent = chooser([0.1, -0.9, 0.5, 0.4, 0.0])
    for top, mean in ((1, 0.5), (2, 0.45), (4, 0.25), (5, 0.02), (9, 0.02)):
        action = agent.predict(OBS, deterministic=True, average_top=top, n_candidates=5)[0]
        np.testing.assert_allclose(action[:, 0], mean, atol=1e-6)
        cold = agent.predict(OBS, average_top=top, temperature=1e-4, n_candidates=5)[0]
        np.testing.assert_allclose(cold[:, 0], mean, atol=1e-6)


def test_draws_are_by_softmax_and_without_replacement() -> None:
    agent, obs = chooser([0.0, 0.3, 0.9]), np.zeros((20_000, 3), np.float32)
    p = np.exp(np.array([0.0, 0.3, 0.9]) / 0.5)
    p /= p.sum()
    one = agent.predict(obs, temperature=0.5, average_top=1, n_candidates=3)[0][:, 0]
    np.testing.assert_allclose([(np.abs(one - x) < 1e-6).mean() for x in (0.0, 0.3, 0.9)], p, atol=0.015)
    two = agent.predict(obs, temperature=0.5, average_top=2, n_candidates=3)[0][:, 0]
    for i, j in itertools.combinations(range(3), 2):
        pair = np.abs(two - ((0.0, 0.3, 0.9)[i] + (0.0, 0.3, 0.9)[j]) / 2) < 1e-6
        assert pair.mean() == pytest.approx(p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j])), abs=0.015)


def test_only_the_end_is_clipped() -> None:
    """Candidates may lie outside of [-1, 1]: their Q and their mean are taken there."""
    agent = chooser([2.0, -0.5, 3.0])
    action = agent.predict(OBS, deterministic=True, average_top=3, n_candidates=3)[0]
    np.testing.assert_allclose(action[:, 0], 1.0)  # the mean is 1.5
    action = chooser([-2.0, -3.0]).predict(OBS, deterministic=True, n_candidates=2)[0]
    np.testing.assert_allclose(action[:, 0], -1.0)


def test_a_choice_is_among_256_at_most() -> None:
    agent = SfBC(**SMALL).learn(DATA)
    assert agent.predict(OBS, deterministic=True, n_candidates=256)[0].shape == (5, 2)
    with pytest.raises(ValueError, match="n_candidates=300 must be at most 256"):
        agent.predict(OBS, n_candidates=300)


# ---- learning --------------------------------------------------------------------------------------------------------
def test_planning_stitches_trajectories() -> None:
    """Two steps: from s = 0 some go to s = 1 and act badly there, where others acted well. Monte-Carlo returns blame the first
    step, planned returns know what can be had at s = 1.
    """
    rng = np.random.default_rng(0)
    n = 300
    last = rng.uniform(-1, 1, n).astype(np.float32)  # the action at s = 1 is its reward
    first = rng.uniform(-1, 1, n).astype(np.float32)  # pays nothing
    zeros, ones = np.zeros(n, np.float32), np.ones(n, np.float32)
    data = {
        "observations": np.stack([zeros, ones], 1).reshape(-1, 1),
        "actions": np.stack([first, last], 1).reshape(-1, 1),
        "rewards": np.stack([zeros, last], 1).reshape(-1),
        "next_observations": np.stack([ones, ones], 1).reshape(-1, 1),
        "terminations": np.tile([False, True], n),
        "truncations": np.zeros(2 * n, bool),
    }
    agent = SfBC(
        **TRAINED | {"planning_steps": 300, "n_support": 16},
        learning_rate=3e-3,
        critic_learning_rate=3e-3,
    ).learn(data)
    with torch.no_grad():
        q = [c.mean + c.std * c(torch.zeros(50, 1), torch.rand(50, 1)).mean() for c in (agent.critic_before, agent.critic)]
    assert abs(q[0].item()) < 0.2  # the mean of what followed
    assert 0.6 < q[1].item() < 1.1  # the best that can follow
    action = agent.predict(np.ones((200, 1), np.float32))[0]
    assert action.mean() > 0.7


def test_learns_the_best_action_of_the_data() -> None:
    """One-step choices, reward -|a - 0.5|^2 under uniform data: the choice lands near 0.5, a single candidate like the data."""
    agent = SfBC(**TRAINED, learning_rate=3e-3, critic_learning_rate=3e-3).learn(line_data(2000, horizon=1))
    obs = np.random.default_rng(1).normal(size=(300, 3)).astype(np.float32)
    errors = [np.abs(agent.predict(obs, n_candidates=n)[0] - 0.5).mean() for n in (1, 64)]
    assert errors[1] < 0.25 < 0.35 < errors[0], errors
    averaged = np.abs(agent.predict(obs, n_candidates=64, average_top=4)[0] - 0.5).mean()
    assert averaged < 0.25


def test_bad_knobs() -> None:
    for knobs, match in (
        ({"alpha": -1.0}, "alpha=-1.0 must not be negative"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"average_top": 0}, "average_top=0 must be a positive whole number"),
        ({"solver_steps": 0}, "solver_steps=0 must be a positive whole number"),
        ({"n_support_states": 1.5}, "n_support_states=1.5 must be a positive whole number"),
    ):
        with pytest.raises(ValueError, match=match):
            SfBC(**knobs)


def test_every_option_changes_the_result() -> None:
    """No knob is decoration: each alternative value gives other critics or other actions."""
    other: dict[str, Any] = {
        "deterministic": True,
        "cosine": True,
        "precondition": True,
        "return_temperature": 0.1,
        "alpha": 1.0,
        "n_support": 4,
        "n_support_states": 20,
        "n_candidates": 9,
        "temperature": 5.0,
        "average_top": 4,
        "solver_steps": 5,
        "gamma": 0.5,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-2,
        "batch_size": 17,
        "behavior_batch_size": 9,
        "reward_transform": "normalize",
        "normalize_obs": True,
        "behavior_steps": 4,
        "critic_steps": 11,
        "planning_steps": 11,
    }

    def result(**knobs: Any) -> np.ndarray:
        agent = SfBC(**{**SMALL, **knobs}).learn(DATA)
        sample = agent.behavior.sample  # of a denoiser that knows nothing yet, and so out of all bounds
        agent.behavior.sample = lambda *args: sample(*args).sin()  # type: ignore[method-assign]
        q = agent.critic(torch.zeros(3), torch.zeros(2)).item() * agent.critic.std.item() + agent.critic.mean.item()
        return np.append(agent.predict(np.ones((8, 3), np.float32))[0].reshape(-1), q)

    results = {name: result(**{name: value}) for name, value in other.items()} | {"default": result()}
    assert_all_differ(results)
    for name in ("n_candidates", "temperature", "average_top", "deterministic"):  # these act on the choice alone
        assert results[name][-1] == results["default"][-1] and math.isfinite(results[name][-1])
    assert set(other) == offline_knobs("SfBC")
