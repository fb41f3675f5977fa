"""select: fitted Q evaluation against closed forms, the other signals in their units, every agent, the report, bad calls."""

import copy
import importlib
import json
import math
import pathlib
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from small_agents import NAMES, small
from toy import line_data

import diffagents
import diffagents.experiments.fqe
from diffagents import load_dataset
from diffagents.data.normalize import RewardTransform
from diffagents.data.transitions import Transitions
from diffagents.experiments.fqe import FQE, FQEConfig, FQEResult, discounted_returns, first_rows
from diffagents.experiments.one_step import OneStep, OneStepConfig
from diffagents.experiments.select import AGREE, EVIDENCE, RULES, Rated, actions_of, agreement, rate, select

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")
QUICK: dict[str, Any] = {"rule": "fqe", "fqe_steps": 15, "max_transitions": 100, "steps": 5, "verbose": 0}
GAMMA = 0.8


class Constant:
    """The same action everywhere."""

    def __init__(self, value: Any) -> None:
        self.value = np.atleast_1d(np.asarray(value, np.float32))
        self.seen = 0

    def predict(self, obs: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> tuple[Any, Any]:
        assert deterministic
        n = len(obs) if not isinstance(obs, dict) else len(next(iter(obs.values())))
        self.seen += n
        return np.repeat(self.value[None], n, 0), state


def fork(n: int = 100, scale: float = 1.0) -> dict[str, Any]:
    """Two-step episodes. State 0: right pays 1 and leads to state 1, left pays 0 and leads to state 2. State 1 pays 2 and
    leads to itself, where a time-out ends the record; state 2 pays 3 and terminates. What follows a termination is state 1.

    So V(1) = 2 / (1 - gamma) = 10, V(2) = 3, Q(0, right) = 1 + 0.8 * 10 = 9 and Q(0, left) = 0.8 * 3 = 2.4.
    """
    states = np.eye(3, dtype=np.float32)
    right = np.arange(n) % 2 == 0
    second = np.where(right, 1, 2)
    other = np.random.default_rng(0).choice([-1.0, 1.0], n)  # the action in states 1 and 2 matters to nothing
    rows = np.arange(2 * n)
    return {
        "observations": states[np.stack([np.zeros(n, int), second], 1).ravel()],
        "actions": np.stack([np.where(right, 1.0, -1.0), other], 1).reshape(-1, 1).astype(np.float32),
        "rewards": scale * np.stack([np.where(right, 1.0, 0.0), np.where(right, 2.0, 3.0)], 1).ravel().astype(np.float32),
        "next_observations": states[np.stack([second, np.ones(n, int)], 1).ravel()],
        "terminations": (rows % 2 == 1) & ~np.repeat(right, 2),
        "truncations": (rows % 2 == 1) & np.repeat(right, 2),
    }


def exact(**settings: Any) -> FQEConfig:
    small_net = {"gamma": GAMMA, "steps": 500, "batch_size": 32, "tau": 0.1, "learning_rate": 1e-2, "hidden": (16, 16)}
    return FQEConfig(**{**small_net, **settings})  # type: ignore[arg-type]


def fit(fqe: FQE, *policies: Any) -> list[FQEResult]:
    """Estimates of functions of observations, all in one go."""
    acts = [torch.stack([policy(obs) for policy in policies]) for obs in (fqe.next_obs, fqe.start_obs)]
    return fqe.fit(*acts)


def right(obs: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(obs), 1)


def left(obs: torch.Tensor) -> torch.Tensor:
    return -torch.ones(len(obs), 1)


@pytest.mark.parametrize("scale", [1.0, -1000.0])
def test_fqe_is_the_closed_form_for_a_termination_and_for_a_time_out(scale: float) -> None:
    fqe = FQE(load_dataset(fork(scale=scale)), exact(n_seeds=2))
    for found, value in zip(fit(fqe, right, left), (9.0, 2.4), strict=True):
        assert found.values.shape == (2, 100)
        torch.testing.assert_close(found.values, torch.full((2, 100), scale * value), rtol=0.03, atol=0)
        assert abs(found.drift) < 0.1 * abs(scale) and found.clipped == 0


def test_the_units_of_reward_change_nothing_but_the_units() -> None:
    one, other = (FQE(load_dataset(fork(scale=scale)), exact(steps=50)) for scale in (1.0, 1024.0))
    (a,), (b,) = fit(one, right), fit(other, right)
    torch.testing.assert_close(b.values, 1024.0 * a.values, rtol=1e-3, atol=0)


def test_fqe_asks_q_at_the_next_state_and_the_policys_action_there() -> None:
    """Odd rows pay a sign(s) and end; even rows pay nothing and lead to them: Q(s, .) = gamma Q(s', pi(s'))."""
    data = line_data(1000, obs_dim=1, act_dim=1)
    even = np.arange(1000) % 2 == 0
    data["next_observations"][even] = data["observations"][~even]
    data["rewards"] = np.where(even, 0.0, data["actions"][:, 0] * np.sign(data["observations"][:, 0])).astype(np.float32)
    data["observations"][even] = 9.0  # where nothing is decided
    data["terminations"], data["truncations"] = ~even, np.zeros(1000, bool)
    fqe = FQE(load_dataset(data), exact(steps=800, hidden=(32, 32)))
    good, bad = fit(fqe, lambda obs: torch.sign(obs), lambda obs: -torch.sign(obs))
    assert float(good.values.mean()) == pytest.approx(GAMMA, abs=0.15)
    assert float(bad.values.mean()) == pytest.approx(-GAMMA, abs=0.15)


def test_targets_stay_within_what_rewards_allow() -> None:
    """A value beyond it is held back and reported; Q itself may be anything."""
    data = load_dataset(fork())
    fqe = FQE(data, exact(steps=300))
    low, high = (bound * fqe.scale for bound in fqe.bounds)
    assert (low, high) == (pytest.approx(0.0), pytest.approx(3.0 / (1.0 - GAMMA)))
    fqe.bounds = (fqe.bounds[0], fqe.bounds[0] + 1e-3)  # as if rewards allowed next to nothing
    (found,) = fit(fqe, right)
    assert found.clipped > 0.3
    assert float(found.values.mean()) == pytest.approx(1.0, abs=0.5)  # the reward, and nothing of the future
    alive = load_dataset({**fork(), "terminations": np.zeros(200, bool), "truncations": np.arange(200) % 2 == 1})
    alive.rew += 5.0
    assert FQE(alive, exact()).bounds[0] > 0  # where nothing terminates, the future is at least the least reward


def test_with_several_fits_a_target_takes_the_least_of_its_own_policys() -> None:
    data = load_dataset(line_data())
    one = FQE(data, exact(steps=1, n_seeds=2, learning_rate=1e-30, tau=1e-6))
    goals: list[torch.Tensor] = []

    def td_target(rew: Any, done: Any, next_value: torch.Tensor, gamma: float) -> torch.Tensor:
        goals.append(next_value)
        return rew + 0 * next_value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffagents.experiments.fqe, "td_target", td_target)
        fit(one, lambda obs: torch.full((len(obs), 2), 0.5), lambda obs: torch.full((len(obs), 2), -0.5))
    (value,) = goals  # (2 policies * 2 fits, B)
    assert torch.equal(value[0], value[1]) and torch.equal(value[2], value[3]) and not torch.allclose(value[0], value[2])
    q = one._network(1)
    first = one.sampler.sample(32, torch.Generator().manual_seed(0))  # as the first step drew them
    expected = q(torch.cat([first.next_obs, torch.full((32, 2), 0.5)], -1)).amin(0)
    torch.testing.assert_close(value[0], expected.clamp(*one.bounds), rtol=1e-4, atol=1e-5)


def test_every_policy_meets_the_same_rows_batches_and_first_weights() -> None:
    data = load_dataset(line_data())
    settings: dict[str, Any] = {"steps": 20, "max_transitions": 50, "n_seeds": 2}
    fqe = FQE(data, FQEConfig(**settings))
    assert len(fqe.sampler) == len(fqe.next_obs) == 50

    def act(obs: torch.Tensor) -> torch.Tensor:
        return torch.full((len(obs), 2), 0.3)

    first, third = fit(fqe, act, lambda obs: -act(obs), act)[::2]
    torch.manual_seed(5)  # what others drew before changes nothing
    state = torch.get_rng_state()
    (alone,) = fit(fqe, act)
    torch.testing.assert_close(first.values, third.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.values, alone.values, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first.values[0], first.values[1])  # the two fits begin otherwise
    assert torch.equal(torch.get_rng_state(), state)
    other = FQE(data, FQEConfig(**settings, seed=1))
    assert not torch.equal(other.next_obs, fqe.next_obs) and not torch.allclose(fit(other, act)[0].values, first.values)


def test_first_rows_and_discounted_returns() -> None:
    data = load_dataset(fork(2))
    assert first_rows(data).tolist() == [0, 2]
    beyond = 1.5 / (1.0 - GAMMA)  # the mean reward for ever, after the time-out
    expected = torch.tensor([1 + GAMMA * (2 + GAMMA * beyond), 2 + GAMMA * beyond, GAMMA * 3, 3.0])
    torch.testing.assert_close(discounted_returns(data, GAMMA), expected)
    data.episode_ends = torch.tensor([0, 2, 2, 4])  # of the first and the third episode no row is left
    assert first_rows(data).tolist() == [0, 2]


# ---- select ----------------------------------------------------------------------------------------------------------
def test_select_ranks_the_good_policy_first_and_says_in_what_units() -> None:
    policies = {"left": Constant(-1.0), "right": Constant(1.0)}
    found = select(policies, fork(), rule="fqe", gamma=GAMMA, fqe_steps=150, steps=200, verbose=0)
    assert found.order == ["right", "left"] and found.best == "right"
    fqe, (low, high) = found["right"].fqe or math.nan, found["right"].interval or (math.nan, math.nan)
    assert low <= fqe <= high and high - low < 1e-6  # all first states are alike
    # half of the data's first actions are the policy's, half 2 away; in states 1 and 2 they are random
    assert found["right"].bc_loss == pytest.approx(2.0, abs=0.3)
    assert found["right"].q_mean is None and found["right"].q_ratio is None
    text = str(found)
    assert "from 200 transitions of arrays; for ranking only, no prediction of the return" in text
    assert "best: right; 0 environment episodes used" in text and "in the order of fqe" in text
    lines = text.splitlines()
    assert lines[1].startswith("right ") and lines[2].startswith("left ") and len(lines[0]) >= len(lines[1].rstrip()) - 2
    assert lines[0].split() == ["policy", *RULES, "q_ratio"] and lines[3].startswith("rank correlation ")
    report = json.loads(json.dumps(found.to_json()))
    assert (
        report["best"] == "right"
        and report["n_env_episodes"] == 0
        and report["config"]["gamma"] == GAMMA == report["fqe_config"]["gamma"]
    )
    assert [row["name"] for row in report["rows"]] == ["right", "left"] and report["rows"][0]["fqe"] == found["right"].fqe


@pytest.fixture(scope="module")
def everyone() -> tuple[Transitions, dict[str, Any]]:
    data = load_dataset(line_data())
    return data, {name: small(name).learn(data) for name in NAMES}


@pytest.mark.filterwarnings("ignore:action bounds")
def test_every_agent_can_be_selected(everyone: tuple[Transitions, dict[str, Any]]) -> None:
    data, agents = everyone
    found = select(agents, data, **QUICK)
    assert sorted(found.order) == sorted(NAMES) and found.n_transitions == len(data)
    for row in found.rows:
        assert all(math.isfinite(getattr(row, rule)) for rule in RULES), row
        assert (row.q_mean is None) == (row.name in ("AWR", "BC", "DiffusionBC")), row
        assert row.q_mean is None or (row.data_return is not None and math.isfinite(row.q_mean)), row
    fqes = [row.fqe for row in found.rows]
    assert fqes == sorted(fqes, reverse=True)


def test_the_policy_is_judged_as_it_is_deployed(everyone: tuple[Transitions, dict[str, Any]]) -> None:
    data, agents = everyone
    for name in ("SRPO", "DiffusionQL", "IQL"):
        action, _ = agents[name].predict(data.obs[:300].numpy(), deterministic=True)
        np.testing.assert_allclose(actions_of(agents[name], data.obs[:300], data.spec), action, rtol=0, atol=1e-5)


def test_selecting_trains_and_changes_nothing(everyone: tuple[Transitions, dict[str, Any]]) -> None:
    data, agents = everyone
    agent = agents["IQL"]
    before = copy.deepcopy(agent.get_parameters())
    states = agent.generator.get_state(), agent.predict_generator.get_state()
    obs = data.obs.clone()
    select([agent], data, **QUICK)
    for name, state in agent.get_parameters().items():
        assert all(torch.equal(value, before[name][key]) for key, value in state.items())
    assert torch.equal(agent.generator.get_state(), states[0]) and torch.equal(agent.predict_generator.get_state(), states[1])
    assert torch.equal(data.obs, obs)


@pytest.mark.parametrize("name", ["IQL", "TD3BC", "SfBC"])
def test_q_mean_is_in_the_units_of_the_datas_return(name: str, everyone: tuple[Transitions, dict[str, Any]]) -> None:
    """A critic that knows every return exactly, in the learner's units, has a ratio of 1."""
    data, agents = everyone
    agent = agents[name].clone()
    agent.state.reward_transform = RewardTransform("iql_locomotion", scale=10.0)
    truth = float(discounted_returns(data, agent.config.gamma).mean())
    if name == "SfBC":
        critic, networks = agent.critic, [agent.critic.net]
        critic.mean.fill_(10.0 * truth)
    else:
        critic = agent.critic.q_target if name == "IQL" else agent.critic_target
        networks = [critic]
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter.zero_()
        if name != "SfBC":
            critic.biases[-1].fill_(10.0 * truth)
    row = select({name: agent}, data, **QUICK)[name]
    assert row.q_mean == pytest.approx(truth, rel=1e-4)
    assert row.data_return == pytest.approx(truth, rel=1e-3) and row.q_ratio == pytest.approx(1.0, rel=1e-3)
    if name == "TD3BC":
        with torch.no_grad():
            critic.biases[-1].fill_(1e4)
        (note,) = select({name: agent}, data, **QUICK)[name].notes
        assert "its critic promises 1000, more than the rewards allow (0): it diverged" in note


@pytest.mark.parametrize("name", ["IQL", "TD3BC", "SfBC"])
def test_q_mean_asks_the_agents_own_critic(name: str, everyone: tuple[Transitions, dict[str, Any]]) -> None:
    data, agents = everyone
    agent = agents[name]
    obs, act = data.obs, torch.from_numpy(agent.predict(data.obs.numpy(), deterministic=True)[0])
    with torch.no_grad():
        if name == "IQL":
            q = agent.critic.q_target(torch.cat([act, agent.obs_normalizer(obs)], -1)).amin(0)
        elif name == "TD3BC":
            q = agent.critic_target(torch.cat([agent.obs_normalizer(obs), act], -1)).amin(0)
        else:
            q = agent.critic.mean + agent.critic.std * agent.critic(obs, act)
    row = select({name: agent}, data, **QUICK)[name]
    assert row.q_mean == pytest.approx(float(q.mean()) / agent.reward_transform.scale, rel=1e-3)


def test_a_policy_that_was_loaded_to_act_only(everyone: tuple[Transitions, dict[str, Any]]) -> None:
    data, agents = everyone
    agent = agents["IQL"].clone()
    agent.has_training_networks = False
    row = select([agent], data, **QUICK).rows[0]
    assert row.q_mean is None and "without its critic" in row.notes[0] and math.isfinite(row.fqe)


def test_a_diverged_estimate_ranks_last(everyone: tuple[Transitions, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = everyone
    original = FQE.fit

    def runs_away(self: FQE, next_act: Any, start_act: Any) -> list[FQEResult]:
        wild, tame = original(self, next_act, start_act)
        return [FQEResult(wild.values + 1e6, wild.drift, 0.5), tame]

    monkeypatch.setattr(FQE, "fit", runs_away)
    found = select({"wild": Constant([1.0, 1.0]), "tame": Constant([0.0, 0.0])}, data, **QUICK)
    assert found.order == ["tame", "wild"] and not found["wild"].trusted
    assert "50 % of its targets lay outside the range that the rewards allow" in str(found) and "wild (not trusted)" in str(
        found
    )


def test_a_policy_far_from_the_data_ranks_behind_whatever_q_guesses() -> None:
    """The data act near (s, -s); off_data is a distance in units of the data's own."""
    data = line_data(2000, obs_dim=1, act_dim=2)
    rng = np.random.default_rng(0)
    s = np.linspace(-0.5, 0.5, 2000, dtype=np.float32)[:, None]
    data["observations"] = s
    data["actions"] = (np.concatenate([s, -s], 1) + rng.normal(0, 0.05, (2000, 2))).astype(np.float32)
    data["actions"][:2] = [[-1, -1], [1, 1]]  # the bounds
    data["rewards"] = data["actions"].sum(1)  # larger actions promise more
    data["terminations"], data["truncations"] = np.ones(2000, bool), np.zeros(2000, bool)

    class Line(Constant):
        def predict(self, obs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            return np.concatenate([obs, -obs], 1) + self.value, None

    policies = {"near": Line([0.0, 0.0]), "edge": Line([0.05, 0.05]), "far": Line([0.4, 0.4])}
    found = select(policies, data, rule="fqe", fqe_steps=100, steps=200, verbose=0)
    fqe = {row.name: row.fqe or math.nan for row in found.rows}
    assert fqe["far"] > fqe["edge"] > fqe["near"] and found.order == ["edge", "near", "far"]
    assert found["near"].off_data < found["edge"].off_data < 2.5 < found["far"].off_data
    assert "times further from the data" in str(found) and found["edge"].trusted and not found["far"].trusted
    uniform = line_data(4000, obs_dim=1, act_dim=2)
    corner = select([Constant([1.0, 1.0])], uniform, **QUICK).rows[0]  # data do tell about it
    assert corner.trusted and corner.off_data == pytest.approx(2.0, abs=0.35)


def test_a_policy_that_turns_nan_somewhere_is_reported_not_raised(everyone: tuple[Transitions, dict[str, Any]]) -> None:
    data, _ = everyone

    class Sometimes(Constant):
        def predict(self, obs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            action, state = super().predict(obs, *args, **kwargs)
            return (action, state) if len(obs) == 2 else (action * np.nan, state)

    found = select({"nan": Sometimes([0.0, 0.0]), "fine": Constant([0.0, 0.0])}, data, **QUICK)
    assert found.order == ["fine", "nan"] and "not finite" in found["nan"].notes[0]
    json.dumps(found.to_json())


def test_dict_observations_reach_the_policy_as_a_dict() -> None:
    arrays = line_data(200)
    flat = arrays["observations"], arrays["next_observations"]
    keys = ("observation", "desired_goal")
    arrays["observations"], arrays["next_observations"] = ({keys[0]: x[:, :2], keys[1]: x[:, 2:]} for x in flat)
    data = load_dataset(arrays)
    agent = small("TD3BC").learn(data)
    row = select({"goal": agent}, data, **QUICK)["goal"]
    assert math.isfinite(row.fqe) and row.q_mean is not None
    swapped = small("TD3BC", obs_keys=keys[::-1]).learn(arrays)
    expected = swapped.predict({keys[0]: flat[0][:5, :2], keys[1]: flat[0][:5, 2:]}, deterministic=True)[0]
    np.testing.assert_allclose(actions_of(swapped, data.obs[:5], data.spec), expected, atol=1e-6)


def test_paths_and_what_loads_them(everyone: tuple[Transitions, dict[str, Any]], tmp_path: pathlib.Path) -> None:
    data, agents = everyone
    paths = [agents[name].save(tmp_path / name) for name in ("IQL", "TD3BC")]
    found = select(paths, data, **QUICK)
    assert sorted(found.order) == sorted(map(str, paths))
    assert found[str(paths[0])].fqe == pytest.approx(select([agents["IQL"]], data, **QUICK).rows[0].fqe, rel=1e-4)
    asked: list[Any] = []
    select(["a", "b"], data, load=lambda path: asked.append(path) or Constant([0.0, 0.0]), **QUICK)  # type: ignore[func-returns-value]
    assert asked == ["a", "b"]


# ---- with an environment ---------------------------------------------------------------------------------------------
class Target(gym.Env[Any, Any]):
    """Five steps; the reward is minus the distance of the action to 0.5."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.n_resets = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.n_resets = 0, self.n_resets + 1
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return np.zeros(3, np.float32), -float(np.abs(action - 0.5).sum()), False, self.t == 5, {}


def test_episodes_are_played_by_the_top_only_counted_and_decide() -> None:
    data, env = load_dataset(line_data()), Target()
    policies = {str(x): Constant([x, x]) for x in (-0.9, -0.2, 0.1, 0.5)}
    without = select(policies, data, steps=40, verbose=0)
    found = select(policies, data, steps=40, env=env, n_episodes=2, top=2, verbose=0)
    assert found.n_env_episodes == env.n_resets == 4 and found.order == without.order and without.n_env_episodes == 0
    assert [row.evaluation is not None for row in found.rows] == [True, True, False, False]
    returns = {row.name: row.evaluation.mean_return for row in found.rows if row.evaluation is not None}
    assert found.best == max(returns, key=lambda name: returns[name])
    assert "4 environment episodes used" in str(found) and "return" in str(found).splitlines()[0].split()
    assert json.loads(json.dumps(found.to_json()))["n_env_episodes"] == 4


def test_the_policy_that_was_estimated_is_the_one_that_plays() -> None:
    """The deterministic one, though it is meant to sample: `Constant` insists on that."""
    policy = Constant([0.1, 0.1])
    policy.acts_deterministically = False  # type: ignore[attr-defined]
    found = select({"it": policy}, load_dataset(line_data()), steps=5, env=Target(), n_episodes=1, verbose=0)
    assert found["it"].evaluation is not None and found["it"].evaluation.deterministic


def test_a_policy_of_stable_baselines3() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.TD3("MlpPolicy", Target(), policy_kwargs={"net_arch": [8]}, buffer_size=10, device="cpu", seed=0)
    row = select({"theirs": model}, line_data(), **QUICK)["theirs"]
    assert math.isfinite(row.fqe) and row.q_mean is None  # its critic_target is none of ours


def test_the_return_decides_among_those_that_were_played() -> None:
    """The data say -0.5, the environment 0.5."""
    data = line_data()
    data["rewards"] = -((data["actions"] + 0.5) ** 2).sum(-1)
    policies = {"data's": Constant([-0.5, -0.5]), "env's": Constant([0.5, 0.5])}
    found = select(policies, data, env=Target(), n_episodes=1, top=2, gamma=0.5, steps=300, verbose=0)
    assert found.order == ["data's", "env's"] and found.best == "env's"


def test_a_good_and_a_bad_policy_of_a_real_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(ROOT / "examples" / "data"))
    data = load_dataset("diffagents/reacher/replay-v0")
    learnt = diffagents.TD3BC(seed=0, verbose=0, device="cpu", compile="eager", policy_kwargs={"net_arch": [64, 64]})
    policies = {"learnt": learnt.learn(data, 600), "pushes": Constant([1.0, 1.0]), "circles": Constant([1.0, -1.0])}
    for rule in ("agreement", "fqe"):
        found = select(policies, data, rule=rule, gamma=0.9, fqe_steps=150, max_transitions=3000, steps=300, verbose=0)
        assert found.best == "learnt" and found.rule == rule
        assert found["learnt"].agreement == 1.0  # the best by each of its signals
    intervals = {name: found[name].interval or (0.0, 0.0) for name in policies}
    assert intervals["learnt"][0] > max(intervals[name][1] for name in ("pushes", "circles"))


# ---- bad calls -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("agents", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "agents is empty: pass at least one policy"),
        ({"a": 3}, {}, TypeError, r"policy 'a' is a int, which has no predict\(obs, deterministic=True\)"),
        (Constant([0, 0]), {}, TypeError, "agents must contain several policies: a dict of name -> policy, or a list"),
        ("runs/a", {}, TypeError, "agents must contain several"),
        (["a", "a"], {"load": lambda _: Constant([0, 0])}, ValueError, "agents contains a twice"),
        (
            {"a": Constant([0, 0, 0])},
            {},
            ValueError,
            r"policy 'a' cannot act on arrays: its actions have shape \(3,\), the data's",
        ),
        ({"a": Constant([0, np.nan])}, {}, ValueError, "policy 'a' cannot act on arrays .*not finite"),
        ({"a": Constant([0, 0])}, {"gamma": 1.0}, ValueError, r"gamma=1.0 must lie in \[0, 1\)"),
        ({"a": Constant([0, 0])}, {"rule": "luck"}, ValueError, "rule='luck'; choose from 'agreement', 'gain'"),
        ({"a": Constant([0, 0])}, {"steps": -1}, ValueError, "steps=-1 must be a positive whole number"),
        ({"a": Constant([0, 0])}, {"fqe_steps": 0}, ValueError, "steps=0 must be a positive whole number"),
        ({"a": Constant([0, 0])}, {"n_episodes": -1}, ValueError, "n_episodes=-1 must be zero or a positive"),
        ({"a": Constant([0, 0])}, {"top": 0, "n_episodes": 1}, ValueError, "top=0 must be a positive whole number"),
        ({"a": Constant([0, 0])}, {"n_episodes": 2}, ValueError, "no environment is stored with arrays: pass env="),
    ],
)
def test_bad_calls(agents: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select(agents, line_data(60), **{**QUICK, **arguments})


def test_an_agent_of_another_task_is_refused(everyone: tuple[Transitions, dict[str, Any]]) -> None:
    _, agents = everyone
    with pytest.raises(ValueError, match=r"policy 'it' cannot act on arrays .*shape \(2, 5\).*policies for one task"):
        select({"it": agents["IQL"]}, line_data(60, obs_dim=5), **QUICK)


def test_rate_is_what_select_says(everyone: tuple[Transitions, dict[str, Any]]) -> None:
    data, agents = everyone
    fqe, one_step = FQE(data, FQEConfig(steps=15, max_transitions=100)), OneStep(data, OneStepConfig(steps=5))
    (row,) = rate({"IQL": agents["IQL"]}, data, one_step, fqe)
    assert row == select({"IQL": agents["IQL"]}, data, **QUICK)["IQL"]
    (without,) = rate({"IQL": agents["IQL"]}, data, one_step)
    assert without.fqe is None and without.gain == row.gain and without.agreement == 0.5
    (only,) = rate({"IQL": agents["IQL"]}, data, None, fqe)
    assert only.fqe == row.fqe and math.isnan(only.gain) and math.isnan(only.agreement)


# ---- the rules -------------------------------------------------------------------------------------------------------
def test_agreement_is_the_share_of_the_others_that_a_policy_beats() -> None:
    rows = [
        Rated("best", gain=3.0, loss_on_best=0.1, off_data=0.5),
        Rated("greedy", gain=4.0, loss_on_best=0.4, off_data=2.0),
        Rated("clone", gain=1.0, loss_on_best=0.2, off_data=0.5),
        Rated("broken"),
    ]
    assert AGREE == ("gain", "loss_on_best", "off_data")
    expected = [(1 / 2 + 1 + 3 / 4) / 3, (1 + 0 + 0) / 3, (0 + 1 / 2 + 3 / 4) / 3]
    assert agreement(rows)[:3] == pytest.approx(expected) and math.isnan(agreement(rows)[3])
    assert agreement(rows[:1]) == [0.5] and agreement([]) == []


def test_loss_on_best_is_that_of_the_best_episodes_and_bc_loss_of_all() -> None:
    data = line_data(400)
    data["actions"] = np.where(np.arange(400)[:, None] < 360, -0.5, 0.5) * np.ones((400, 2), np.float32)
    data["actions"][0], data["actions"][-1] = -1, 1  # the bounds
    data["rewards"] = (np.arange(400) >= 360).astype(np.float32)
    data["terminations"], data["truncations"] = np.ones(400, bool), np.zeros(400, bool)  # episodes of one step
    found = select({"like the best": Constant([0.5, 0.5]), "like most": Constant([-0.5, -0.5])}, data, steps=300, verbose=0)
    best, most = found["like the best"], found["like most"]
    assert best.loss_on_best < 0.05 and most.loss_on_best == pytest.approx(1.0, abs=0.1)
    assert best.bc_loss == pytest.approx(0.9, abs=0.05) and most.bc_loss == pytest.approx(0.1, abs=0.05)
    assert best.gain == pytest.approx(3.0, abs=0.3) and most.gain == pytest.approx(-0.33, abs=0.1)  # from 1 / 10 to 1, in 0.3
    assert best.agreement == pytest.approx(2 / 3)  # far from the data: most actions there are others
    assert len(best.gain_of_networks) == 4 and best.gain == pytest.approx(np.mean(best.gain_of_networks), rel=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_orders_by_its_signal(rule: str, everyone: tuple[Transitions, dict[str, Any]]) -> None:
    data, agents = everyone
    found = select(agents, data, **{**QUICK, "rule": rule})
    trusted = [getattr(row, rule) for row in found.rows if row.trusted]
    assert trusted == sorted(trusted, reverse=RULES[rule]) and len(trusted) > 3
    assert (found.rows[0].fqe is None) == (rule != "fqe") == (found.fqe_config is None) == ("fqe" not in str(found))


def test_the_evidence_is_that_of_the_stored_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "zoo" / "benchmarks"))
    benchmark = importlib.import_module("selection")
    pools = json.loads((ROOT / "zoo" / "results" / "selection.json").read_text())["pools"]
    assert len(pools) == 4 and all(len(one["policies"]) >= 12 for one in pools.values())
    lines, means = benchmark.tables(pools)
    assert {rule: (round(means[rule][0], 2), round(means[rule][1])) for rule in RULES} == EVIDENCE
    assert max(RULES, key=lambda rule: EVIDENCE[rule][0]) == "agreement"
    page = (ROOT / "docs" / "tutorials" / "choose.md").read_text()
    assert all(line in page for line in lines if line)
