"""`collect`: what lies on disk is what happened in the environment; same seed, same data; or there is nothing at all."""

import errno
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hub_clients import client
from hub_server import Hub
from small_agents import small

import diffagents
from diffagents.data.collect import collect, write_dataset
from diffagents.storage import hub

ROOT = Path(__file__).resolve().parents[2]
MAZE = {"continuing_task": False, "max_episode_steps": 40}
LONG = {"max_episode_steps": 1000}


class Counter(gym.Env[Any, Any]):
    """Counts its steps in a buffer that it hands out again and again; `ends` and `fails` say at which step what happens."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    made: "list[Counter]" = []  # noqa: RUF012

    def __init__(self, ends: int | None = None, fails: str = "", render_mode: str | None = None) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(np.float32([-1, -2]), np.float32([1, 3]))
        self.ends, self.fails, self.closed, self.render_mode = ends, fails, False, render_mode
        self.buffer, self.steps = np.zeros(2, np.float32), 0
        Counter.made.append(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.buffer[:] = 0, self.np_random.random()
        return self.buffer, {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        self.buffer[0] += 1
        reward = float(np.sum(action))
        action[:] = 7  # some environments write into what they are given
        if self.steps == 30 and self.fails == "observations":
            self.buffer[1] = np.nan
        if self.steps == 30 and self.fails == "rewards":
            reward = np.inf
        return self.buffer, reward, self.buffer[0] == self.ends, False, {"is_success": self.buffer[0] == 5}

    def close(self) -> None:
        self.closed = True


gym.register(
    "Counter-v0", "test_collect:Counter", max_episode_steps=20, disable_env_checker=True
)  # it would warn of the buffer


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFAGENTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    Counter.made.clear()
    return tmp_path / "minari"


def nothing(obs: Any) -> Any:
    return np.zeros(2)


def steer(obs: Any) -> Any:
    """Depends on everything that PointMaze's ball sees."""
    return obs["desired_goal"] - obs["achieved_goal"] + 0.1 * obs["observation"][2:]


def hop(obs: Any) -> Any:
    return 3 * np.sin(obs[:3] + obs[5:8])


def sb3_model() -> Any:
    from stable_baselines3 import SAC

    return SAC("MlpPolicy", "Pendulum-v1", seed=1, device="cpu", policy_kwargs={"net_arch": [16]}, buffer_size=10)


def agent() -> Any:
    return small("TD3BC", env="Pendulum-v1").learn("test/warm-up-v0")


@pytest.fixture
def trained(root: Path) -> Any:
    collect(lambda obs: np.sin(obs[:1]), "Pendulum-v1", 200, "test/warm-up-v0", noise="uniform:0.5")
    return agent()


def episodes_of(dataset_id: str) -> list[Any]:
    return list(minari.load_dataset(dataset_id).iterate_episodes())


def flat(dataset_id: str, column: str = "actions") -> np.ndarray:
    return np.concatenate([getattr(episode, column) for episode in episodes_of(dataset_id)])


def assert_same(one: Any, other: Any, dtype: type = np.float32) -> None:
    if isinstance(one, dict):
        assert sorted(one) == sorted(other)
        for key in one:
            assert_same(one[key], other[key])
        return
    assert other.dtype == dtype
    np.testing.assert_array_equal(np.asarray(one, dtype), other)


# ---- what lies on disk is what happened ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "env", "kwargs", "n_steps", "noise"),
    [
        ("agent", "Pendulum-v1", {}, 450, None),
        ("sb3", "Pendulum-v1", {}, 450, "gaussian:0.2"),
        (hop, "Hopper-v5", {}, 200, "gaussian:0.3"),
        (steer, "PointMaze_UMaze-v3", MAZE, 100, "uniform:0.2"),
    ],
    ids=["agent", "sb3 model", "hopper", "maze"],
)
def test_the_stored_actions_lead_through_the_stored_states(
    policy: Any, env: str, kwargs: dict[str, Any], n_steps: int, noise: str | None, request: pytest.FixtureRequest
) -> None:
    policy = request.getfixturevalue("trained") if policy == "agent" else sb3_model() if policy == "sb3" else policy
    given = collect(policy, env, n_steps, "test/a/b-v3", seed=5, noise=noise, env_kwargs=kwargs)
    dataset = minari.load_dataset("test/a/b-v3")
    world = dataset.recover_environment()
    limit = kwargs.get("max_episode_steps") or world.spec.max_episode_steps
    assert world.spec.id == env and world.spec.max_episode_steps == limit
    episodes = list(dataset.iterate_episodes())
    assert len(given) == len(episodes) > 1 and given.total_steps == sum(len(e.rewards) for e in episodes) == n_steps
    for i, episode in enumerate(episodes):
        observations, rows = [world.reset(seed=5)[0] if i == 0 else world.reset()[0]], []
        assert episode.actions.dtype == np.float32
        for action in episode.actions:
            assert world.action_space.contains(action)
            obs, *row, _ = world.step(action)
            observations.append(obs)
            rows.append(row)
        assert_same(_stacked(observations), episode.observations)
        rewards, terminations, truncations = (np.array(column) for column in zip(*rows, strict=True))
        assert_same(rewards, episode.rewards)
        assert_same(terminations, episode.terminations, np.bool_)
        if i == len(episodes) - 1:
            truncations[-1] |= not terminations[-1]
        assert_same(truncations, episode.truncations, np.bool_)
        assert (episode.terminations | episode.truncations).tolist() == [False] * (len(rewards) - 1) + [True]


def _stacked(observations: list[Any]) -> Any:
    if isinstance(observations[0], dict):
        return {key: np.stack([obs[key] for obs in observations]) for key in observations[0]}
    return np.stack(observations)


@pytest.mark.parametrize("kind", ["agent", "sb3"])
def test_actions_are_those_of_the_policy(kind: str, request: pytest.FixtureRequest) -> None:
    policy = request.getfixturevalue("trained") if kind == "agent" else sb3_model()
    collect(policy, "Pendulum-v1", 250, "test/mean-v0", deterministic=True)
    for episode in episodes_of("test/mean-v0"):
        expected = policy.predict(episode.observations[:-1], deterministic=True)[0]
        np.testing.assert_allclose(episode.actions, expected, atol=1e-5)
    collect(policy, "Pendulum-v1", 250, "test/drawn-v0", deterministic=False)
    if kind == "sb3":
        assert np.abs(flat("test/drawn-v0") - flat("test/mean-v0"))[0] > 1e-3


@pytest.mark.parametrize(("meant", "expected"), [(None, False), (True, True), (False, False)])
def test_a_policy_acts_as_it_is_meant_to_unless_told_otherwise(meant: bool | None, expected: bool, root: Path) -> None:
    """One that does not say how samples, the default of SB3's `predict`."""
    policy = Recurrent()
    if meant is not None:
        policy.acts_deterministically = meant  # type: ignore[attr-defined]
    for number, asked in enumerate((None, True, False)):
        how = expected if asked is None else asked
        collect(policy, "Counter-v0", 20, f"test/how{number}-v0", deterministic=asked)
        assert set(flat(f"test/how{number}-v0")[:, 1]) == {float(how)}
        assert ("deterministic actions" in metadata(root, f"test/how{number}-v0")["description"]) == how


def test_actions_are_stored_as_they_were_executed() -> None:
    collect(lambda obs: np.array([0.25, 100.0]), "Counter-v0", 30, "test/wild-v0")
    assert flat("test/wild-v0").tolist() == [[0.25, 3.0]] * 30
    assert set(flat("test/wild-v0", "rewards").tolist()) == {3.25}


class Whole(Counter):
    """Integer actions, and rewards of shape (1,)."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Box(0, 10, (2,), np.int64)  # type: ignore[assignment]

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward]), *rest


gym.register("Whole-v0", "test_collect:Whole", max_episode_steps=20, disable_env_checker=True)


def test_integers_are_rounded_and_a_reward_may_be_an_array() -> None:
    collect(lambda obs: np.array([0.6, 9.4]), "Whole-v0", 30, "test/whole-v0")
    assert flat("test/whole-v0").tolist() == [[1, 9]] * 30
    assert flat("test/whole-v0", "rewards").tolist() == [10.0] * 30


def test_an_agent_in_a_wrapper_that_normalises_is_noticed(trained: Any) -> None:
    env = gym.wrappers.NormalizeObservation(gym.make("Pendulum-v1"))
    with pytest.warns(UserWarning, match="inside a NormalizeObservation"):
        collect(trained, env, 10, "test/normalised-v0")


def test_observations_are_copies() -> None:
    collect(nothing, "Counter-v0", 10, "test/count-v0")
    (episode,) = episodes_of("test/count-v0")
    assert episode.observations[:, 0].tolist() == list(range(11))


@pytest.mark.parametrize(
    ("ends", "n_steps", "terminated", "truncated"),
    [
        (None, 45, [0, 0, 0], [1, 1, 1]),  # time-outs after 20 steps, the budget after 5
        (None, 40, [0, 0], [1, 1]),  # nothing to cut: no empty episode
        (8, 20, [1, 1, 0], [0, 0, 1]),
        (8, 16, [1, 1], [0, 0]),  # the budget ends with an episode: a termination it stays
        (20, 20, [1], [1]),  # both at once, as the environment says it
    ],
)
def test_ends(ends: int | None, n_steps: int, terminated: list[int], truncated: list[int]) -> None:
    collect(nothing, "Counter-v0", n_steps, "test/ends-v0", env_kwargs={"ends": ends})
    episodes = episodes_of("test/ends-v0")
    assert [int(episode.terminations[-1]) for episode in episodes] == terminated
    assert [int(episode.truncations[-1]) for episode in episodes] == truncated
    assert sum(int(e.terminations[:-1].sum() + e.truncations[:-1].sum()) for e in episodes) == 0


# ---- randomness ------------------------------------------------------------------------------------------------------


def test_gaussian_noise_is_in_the_units_of_actions_and_clipped() -> None:
    collect(nothing, "Counter-v0", 4000, "test/narrow-v0", env_kwargs=LONG, noise="gaussian:0.25")
    actions = flat("test/narrow-v0")
    np.testing.assert_allclose(actions.std(0), 0.25, rtol=0.05)
    assert abs(np.corrcoef(actions.T)[0, 1]) < 0.1
    collect(nothing, "Counter-v0", 50, "test/other-v0", noise="gaussian:0.25", seed=1, env_kwargs=LONG)
    assert not (flat("test/other-v0") == actions[:50]).any()
    collect(nothing, "Counter-v0", 2000, "test/wide-v0", env_kwargs=LONG, noise="gaussian:9")
    wide = flat("test/wide-v0")
    assert wide.min(0).tolist() == [-1, -2] and wide.max(0).tolist() == [1, 3]


def test_uniform_noise_replaces_a_share_of_the_actions() -> None:
    collect(nothing, "Counter-v0", 4000, "test/share-v0", env_kwargs=LONG, noise="uniform:0.3")
    actions = flat("test/share-v0")
    replaced = actions[np.any(actions != 0, axis=1)]
    assert 0.26 < len(replaced) / len(actions) < 0.34
    np.testing.assert_allclose(replaced.mean(0), [0, 0.5], atol=0.15)
    np.testing.assert_allclose(replaced.std(0), np.array([2, 5]) / np.sqrt(12), rtol=0.1)


@pytest.mark.parametrize("kind", ["agent", "sb3"])
def test_same_seed_same_data_whatever_was_drawn_before(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "agent":
        request.getfixturevalue("trained")
        policy: Any = small("DiffusionBC", env="Pendulum-v1").learn("test/warm-up-v0")
    else:
        policy = sb3_model()
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        torch.rand(7)
        policy.predict(np.zeros((5, 3), np.float32))
        collect(policy, "Pendulum-v1", 60, f"test/{name}-v0", seed=seed, noise="gaussian:0.1")
    for column in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(flat("test/one-v0", column), flat("test/two-v0", column))
        assert not np.array_equal(flat("test/one-v0", column), flat("test/three-v0", column))


def test_collecting_moves_no_generator_of_others(trained: Any) -> None:
    policy = small("DiffusionBC", env="Pendulum-v1").learn("test/warm-up-v0")
    torch.manual_seed(123)
    before = torch.get_rng_state(), policy.generator.get_state(), policy.predict_generator.get_state()
    collect(policy, "Pendulum-v1", 30, "test/quiet-v0")
    after = torch.get_rng_state(), policy.generator.get_state(), policy.predict_generator.get_state()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


class Recurrent:
    """Its action is the number of steps of the episode so far, which it carries as its state."""

    def __init__(self) -> None:
        self.resets, self.firsts = 0, 0

    def reset(self) -> None:
        self.resets += 1

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        assert observation.shape == (1, 2) and episode_start.shape == (1,)
        assert (state is None) == bool(episode_start[0])
        self.firsts += int(episode_start[0])
        state = 0.0 if state is None else state + 0.01
        return np.array([[state, float(deterministic)]]), state


def test_state_and_reset_follow_the_episodes() -> None:
    policy = Recurrent()
    collect(policy, "Counter-v0", 50, "test/memory-v0", deterministic=True)
    assert policy.resets == policy.firsts == 3
    for episode in episodes_of("test/memory-v0"):
        np.testing.assert_allclose(episode.actions[:, 0], 0.01 * np.arange(len(episode.actions)), atol=1e-6)
        assert set(episode.actions[:, 1]) == {1.0}


# ---- what is told ----------------------------------------------------------------------------------------------------


def metadata(root: Path, dataset_id: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / dataset_id / "data" / "metadata.json").read_text())
    return found


def test_where_the_data_come_from(root: Path, trained: Any) -> None:
    trained.origin = hub.Origin("me/pendulum", "0123456789abcdef")
    collect(trained, "Pendulum-v1", 60, "test/agent-v0", seed=7, noise="gaussian:0.1", author="me", description="for a test.")
    facts = metadata(root, "test/agent-v0")
    assert facts["algorithm_name"] == "TD3BC" and facts["author"] == ["me"]
    who = "TD3BC from me/pendulum (commit 01234567) trained on test/warm-up-v0, deterministic actions"
    assert facts["description"] == f"for a test. {who}, noise gaussian:0.1, seed 7"
    assert facts["collection"] == {"policy": who, "noise": "gaussian:0.1", "seed": 7, "success_rate": None}
    assert json.loads(facts["env_spec"])["id"] == "Pendulum-v1" and "ref_min_score" not in facts
    made = diffagents.load_dataset("test/agent-v0").info["made"]
    assert made["description"] == facts["description"] and made["algorithm_name"] == "TD3BC"


def test_d4rl_references_are_stored_where_there_are_any(root: Path) -> None:
    dataset = collect(hop, "Hopper-v5", 30, "test/hopper-v0", algorithm_name="hop")
    assert dataset.observation_space.dtype == np.float32  # as the data; the environment's are float64
    facts = metadata(root, "test/hopper-v0")
    assert (facts["ref_min_score"], facts["ref_max_score"]) == (-20.272305, 3234.3) and facts["algorithm_name"] == "hop"
    assert minari.get_normalized_score(dataset, np.array([3234.3]))[0] == pytest.approx(1.0)


def test_one_line_is_printed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collect(nothing, "Counter-v0", 44, "test/a-v0", env_kwargs={"ends": 4}, verbose=1)
    line = capsys.readouterr().out
    assert line.startswith("test/a-v0: 44 steps, 11 episodes, ") and line.count("\n") == 1 and "success 0 %" in line
    collect(lambda obs: np.ones(2), "Counter-v0", 43, "test/b-v0", verbose=1)
    assert "Counter-v0: return 40.00 ± 0.00 (2 episodes" in (line := capsys.readouterr().out) and "success 100 %" in line
    assert metadata(root, "test/b-v0")["collection"]["success_rate"] == pytest.approx(2 / 3)
    collect(nothing, "Counter-v0", 5, "test/c-v0")
    assert capsys.readouterr().out == ""


def test_nothing_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(lambda obs: obs[:1], "Pendulum-v1", 30, "test/silent-v0")


# ---- use -------------------------------------------------------------------------------------------------------------


def test_agents_learn_from_it_and_are_evaluated_in_its_environment(root: Path) -> None:
    dataset = collect(steer, "PointMaze_UMaze-v3", 100, "test/maze-v0", env_kwargs=MAZE)
    for source in ("test/maze-v0", dataset):
        data = diffagents.load_dataset(source)
        assert len(data) == 100 and data.spec.obs_keys == ("observation", "achieved_goal", "desired_goal")
        learnt: Any = small("TD3BC").learn(source)
        found = learnt.evaluate(n_episodes=1)
        assert found.env_id == "PointMaze_UMaze-v3" and found.lengths[0] <= 40
    spec = json.loads(data.info["env_spec"])
    assert spec["max_episode_steps"] == 40 and spec["kwargs"]["continuing_task"] is False


def test_root_says_where_and_others_stay_as_they_are(root: Path, tmp_path: Path) -> None:
    collect(nothing, "Counter-v0", 10, "test/here-v0")
    before = (root / "test" / "here-v0" / "data" / "main_data.hdf5").read_bytes()
    dataset = collect(nothing, "Counter-v0", 10, "top-v0", root=tmp_path / "else" / "where")
    assert dataset.storage.data_path == tmp_path / "else" / "where" / "top-v0" / "data"
    collect(nothing, "Counter-v0", 12, "test/here-v1")
    assert set(minari.list_local_datasets()) == {"test/here-v0", "test/here-v1"}
    assert (root / "test" / "here-v0" / "data" / "main_data.hdf5").read_bytes() == before
    assert sorted(path.name for path in root.iterdir()) == ["test"]
    assert minari.namespace.list_local_namespaces() == ["test"]


def test_an_environment_that_was_passed_stays_open_and_one_made_here_is_closed() -> None:
    with gym.make("Counter-v0") as world:
        collect(nothing, world, 10, "test/mine-v0")
        assert not Counter.made[0].closed
        collect(nothing, world.spec, 10, "test/spec-v0")
        collect(nothing, world.spec.to_json(), 10, "test/json-v0")
    assert len(Counter.made) == 3 and all(made.closed for made in Counter.made[1:])


def test_what_evaluation_would_leave_out_is_said(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from stable_baselines3.common.monitor import Monitor

        collect(nothing, Monitor(gym.make("Counter-v0", render_mode="rgb_array")), 10, "test/monitor-v0")
    assert json.loads(metadata(root, "test/monitor-v0")["env_spec"])["kwargs"] == {}
    with pytest.warns(UserWarning, match=r"without its wrappers \['RescaleAction'\]"):
        collect(nothing, gym.wrappers.RescaleAction(gym.make("Counter-v0"), -1, 1), 10, "test/scaled-v0")


class Filmed(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    def __init__(self, env: Any, folder: str = "", n: int = 0) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, folder=folder, n=n)
        super().__init__(env)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda env: Filmed(env, folder="/home/alice/hunter2"),
        lambda env: Filmed(Filmed(env, n=3), folder="hunter2@acme.com"),
    ],
)
def test_private_arguments_of_a_wrapper_are_left_out_and_minari_still_reads_the_set(wrapped: Any, root: Path) -> None:
    with pytest.warns(UserWarning, match="without its wrappers"):
        dataset = collect(nothing, wrapped(gym.make("Counter-v0")), 10, "test/filmed-v0")
    text = (root / "test" / "filmed-v0" / "data" / "metadata.json").read_text()
    assert "hunter2" not in text and "alice" not in text and "Filmed" in text
    assert dataset.spec.env_spec.id == "Counter-v0" and len(list(dataset.iterate_episodes())) >= 1
    assert len(diffagents.load_dataset("test/filmed-v0")) == 10
    kept = json.loads(metadata(root, "test/filmed-v0")["env_spec"])["additional_wrappers"]
    assert kept[-1]["kwargs"] is None and all(one["kwargs"] == {"folder": "", "n": 3} for one in kept[:-1])


def test_arguments_that_may_be_secret_are_named_in_a_warning(root: Path) -> None:
    with pytest.warns(UserWarning, match=r"contain the arguments fails of Counter-v0, .* do not publish it"):
        collect(nothing, "Counter-v0", 10, "test/secret-v0", env_kwargs={"fails": "hunter2.example"})


# ---- refused before anything is done ---------------------------------------------------------------------------------


def never(obs: Any) -> Any:
    raise AssertionError("the policy was asked")


class Discrete(Counter):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Discrete(3)


class Worded(Counter):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Dict({"observation": self.observation_space, "task": spaces.Text(5)})
        self.observation_space.spaces["desired_goal"] = spaces.Box(-1, 1, (1,))


gym.register("Discrete-v0", "test_collect:Discrete")
gym.register("Worded-v0", "test_collect:Worded")

GOOD: dict[str, Any] = {"policy": never, "env": "Counter-v0", "n_steps": 10, "dataset_id": "test/bad-v0"}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"n_steps": 0}, ValueError, r"n_steps=0 must be a positive whole number"),
    ({"n_steps": 1.5}, ValueError, r"n_steps=1.5 must be"),
    ({"n_steps": "many"}, ValueError, r"n_steps='many' must be"),
    ({"seed": -1}, ValueError, r"seed=-1 must be"),
    ({"seed": None}, ValueError, r"seed=None must be"),
    *(
        ({"dataset_id": name}, ValueError, "is not a Minari id.*namespace/name-v0")
        for name in ("bad", "bad-v", "test/bad", "a/bad-v0", "te.st/bad-v0", "../bad-v0", "/bad-v0", "test//bad-v0", "bad-v01",
                     "hf://me/test/bad-v0", "test/b d-v0", "", None, 3)
    ),
    ({"noise": "gaussian"}, ValueError, r"noise='gaussian' must be None, \"gaussian:S\""),
    ({"noise": "gaussian:-1"}, ValueError, "S > 0"),
    ({"noise": "gaussian:nan"}, ValueError, "S > 0"),
    ({"noise": "uniform:1.2"}, ValueError, "0 < P <= 1"),
    ({"noise": "salt:1"}, ValueError, "noise='salt:1'"),
    ({"noise": 0.1}, ValueError, "noise=0.1"),
    ({"policy": "policy.zip"}, TypeError, r"name 'policy.zip'; load it first"),
    ({"policy": Recurrent}, TypeError, r"class Recurrent; pass a trained instance"),
    ({"policy": object()}, TypeError, r"object, has no predict"),
    ({"env": "Nowhere-v0"}, ValueError, "unknown environment 'Nowhere-v0'"),
    ({"env": 5}, TypeError, "not int"),
    ({"env": lambda: Counter()}, ValueError, "has no spec.*register"),
    ({"env": lambda: gym.make_vec("Counter-v0", 2)}, TypeError, "SyncVectorEnv; pass a single Env"),
    ({"env": lambda: gym.make("Counter-v0"), "env_kwargs": {"ends": 3}}, ValueError, r"\['ends'\]"),
    ({"env_kwargs": {"fails": object()}}, ValueError, "spec of Counter-v0 cannot be stored"),
    ({"env_kwargs": {"fails": "/etc/passwd"}}, ValueError, "spec of Counter-v0 cannot be stored.*looks like a path"),
    ({"env": "Discrete-v0"}, ValueError, "not a Box: diffusion agents need continuous actions"),
    ({"env": "Worded-v0"}, ValueError, "observation 'task' Text.* is not a Box"),
    ({"policy": sb3_model}, ValueError, "the policy's observation space"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=[f"{k}-{next(iter(row[0]))}" for k, row in enumerate(BAD)])
def test_bad_input_is_refused_before_anything_is_done(
    change: dict[str, Any], error: type[Exception], words: str, root: Path
) -> None:
    given = {**GOOD, **change}
    for name in ("env", "policy"):  # made here, as collecting tests must not start environments and networks
        if callable(given[name]) and given[name] not in (never, Recurrent):
            given[name] = given[name]()
    with pytest.raises(error, match=words) as caught:
        collect(**given)
    assert "\n" not in str(caught.value)
    assert not root.exists() or not list(root.iterdir())
    assert minari.list_local_datasets() == {}
    assert all(made.steps == 0 for made in Counter.made)


def test_an_untrained_agent_without_spaces_is_refused(root: Path) -> None:
    with pytest.raises(RuntimeError):
        collect(small("TD3BC"), "Counter-v0", 10, "test/bad-v0")
    assert not list(root.iterdir())


def test_what_exists_is_not_overwritten(root: Path) -> None:
    collect(nothing, "Counter-v0", 10, "test/old-v0")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"old-v0 exists and is a dataset; choose another version"):
        collect(never, "Counter-v0", 10, "test/old-v0")
    (root / "test" / "rest-v0").mkdir()
    with pytest.raises(FileExistsError, match="something else"):
        collect(never, "Counter-v0", 10, "test/rest-v0")
    with pytest.raises(ValueError, match="inside the dataset"):
        collect(never, "Counter-v0", 10, "test/old-v0/new-v0")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        collect(never, "Counter-v0", 10, "test/bad-v0", root=tmp_path / "locked")


def test_a_file_in_the_place_of_the_folder_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        collect(never, "Counter-v0", 10, "test/bad-v0", root=tmp_path / "file")


def test_too_little_space_is_found_before_the_work(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And before anything is written: a disk that gets full can make HDF5 crash the process."""
    free = 99_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"needs about \d+.\d MB, but 0.1 MB are free: free some there") as caught:
        collect(never, "Counter-v0", 100_000, "test/bad-v0")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(root / "test" / "bad-v0")
    collect(nothing, "Counter-v0", 10, "test/good-v0")
    free = 9_000  # enough for the steps, not for the file
    with pytest.raises(OSError, match="are free"):
        collect(nothing, "Counter-v0", 10, "test/bad-v0")
    assert {path.name for path in root.iterdir()} == {"test"} and [path.name for path in (root / "test").glob("*-v0")] == [
        "good-v0"
    ]


# ---- what fails later leaves nothing ---------------------------------------------------------------------------------


def after(n: int, what: Any) -> Callable[[Any], Any]:
    """A policy that at its n-th action raises `what`, or gives it."""
    count = iter(range(n))

    def policy(obs: Any) -> Any:
        if next(count, None) is not None:
            return np.zeros(2)
        if isinstance(what, BaseException):
            raise what
        return what

    return policy


@pytest.mark.parametrize(
    ("policy", "fails", "error", "words"),
    [
        (after(30, RuntimeError("burnt out")), "", RuntimeError, "burnt out"),
        (after(30, KeyboardInterrupt()), "", KeyboardInterrupt, ""),
        (after(30, np.zeros(3)), "", ValueError, r"returned actions of shape \(1, 3\)"),
        (after(30, np.array([0, np.nan])), "", ValueError, "NaN"),
        (nothing, "observations", ValueError, "observations of episode 1 contain NaN or infinity at step 10"),
        (nothing, "rewards", ValueError, "rewards of episode 1 contain NaN or infinity at step 9"),
    ],
)
def test_a_failure_while_acting_leaves_nothing(
    policy: Any, fails: str, error: type[BaseException], words: str, root: Path
) -> None:
    with pytest.raises(error, match=words or None):
        collect(policy, "Counter-v0", 100, "test/half-v0", env_kwargs={"fails": fails})
    assert not list(root.iterdir()) and Counter.made[0].closed
    collect(nothing, "Counter-v0", 10, "test/half-v0")
    assert set(minari.list_local_datasets()) == {"test/half-v0"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_nothing(error: BaseException, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minari.dataset._storages.hdf5_storage import HDF5Storage

    def breaks(self: Any, episodes: Iterator[Any]) -> None:
        next(iter(episodes))
        assert minari.list_local_datasets() == {}  # what is half written is not seen by others
        raise error

    monkeypatch.setattr(HDF5Storage, "update_episodes", breaks)
    with pytest.raises(type(error)):
        collect(nothing, "Counter-v0", 30, "test/half-v0")
    assert not list(root.iterdir())
    monkeypatch.undo()
    collect(nothing, "Counter-v0", 10, "test/half-v0", root=root)


# ---- episodes from elsewhere -----------------------------------------------------------------------------------------


def recorded(n: int = 4, **change: Any) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "observations": np.arange(2.0 * n + 2).reshape(n + 1, 2),
        "actions": np.zeros((n, 2)),
        "rewards": np.arange(n),
        "terminations": np.zeros(n, bool),
        "truncations": np.zeros(n, bool),
    }
    return columns | change


def test_recorded_episodes_become_a_dataset(root: Path) -> None:
    dies = recorded(3, terminations=np.array([0, 0, 1]))
    write_dataset([recorded(), dies], "Counter-v0", "test/given-v0", algorithm_name="human", description="by hand", author="me")
    one, two = episodes_of("test/given-v0")
    assert_same(recorded()["observations"], one.observations)
    assert_same(np.arange(4), one.rewards)
    assert one.truncations.tolist() == [False] * 3 + [True] and not one.terminations.any()
    assert two.terminations.tolist() == [False, False, True] and not two.truncations.any()
    facts = metadata(root, "test/given-v0")
    assert (facts["algorithm_name"], facts["description"], facts["author"]) == ("human", "by hand", ["me"])
    assert facts["total_steps"] == 7 and json.loads(facts["env_spec"])["id"] == "Counter-v0"


@pytest.mark.parametrize(
    ("episodes", "words"),
    [
        ([], "there are no episodes"),
        ([recorded(), recorded(observations=np.zeros((4, 2)))], r"observations of episode 1 .* \(4, 2\), expected \(5, 2\)"),
        ([recorded(actions=np.zeros((4, 3)))], r"actions of episode 0 have the shape"),
        ([recorded(terminations=np.array([0, 1, 0, 0]))], "episode 0 has 4 steps, but ends at step 1"),
        ([recorded(rewards=np.array([0, np.nan, 0, 0]))], "rewards of episode 0 contain NaN or infinity at step 1"),
    ],
)  # fmt: skip
def test_recorded_episodes_of_other_shapes_are_refused(episodes: Any, words: str, root: Path) -> None:
    with pytest.raises(ValueError, match=words):
        write_dataset(episodes, "Counter-v0", "test/given-v0", algorithm_name="human", description="by hand")
    assert not list(root.iterdir())


# ---- the recipes of zoo/ ---------------------------------------------------------------------------------------------


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "zoo" / "recipes"))


@pytest.mark.usefixtures("recipes")
def test_recipes_make_datasets_once(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import make_datasets  # type: ignore[import-not-found]

    def run(only: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["make", "--root", str(root), "--steps", "400", "--only", only])
        make_datasets.main()
        return capsys.readouterr().out.splitlines()

    lines = run("pointmaze/umaze,door,hopper/medium")
    assert [line.split(":")[0] for line in lines] == [
        f"diffagents/{name}-v0"
        for name in ("hopper/medium", "hopper/medium-replay", "pointmaze/umaze", "door/expert", "hopper/medium-expert")
    ]
    assert "200 steps" in lines[2] and "100 steps" in lines[3] and "skipped: it needs hopper/expert-v0" in lines[4]
    assert run("pointmaze/umaze,hopper/medium-v") == []
    lines = run("hopper")
    assert [line.split(":")[0][18:] for line in lines] == ["expert-v0", "medium-expert-v0"] and "800 steps" in lines[1]
    both = [episode.actions for part in ("medium", "expert") for episode in episodes_of(f"diffagents/hopper/{part}-v0")]
    np.testing.assert_array_equal(np.concatenate(both), flat("diffagents/hopper/medium-expert-v0"))
    goals = [episode.observations["desired_goal"][0] for episode in episodes_of("diffagents/pointmaze/umaze-v0")]
    assert len(goals) > 2 and all(e.terminations[-1] for e in episodes_of("diffagents/pointmaze/umaze-v0")[:-1])


@pytest.mark.usefixtures("recipes")
def test_the_ant_is_steered_by_symmetry() -> None:
    """What the policy sees does not change when the Ant and its direction are turned together."""
    import behavior_policies as bp  # type: ignore[import-not-found]

    obs = np.random.default_rng(0).normal(size=27)
    tilt = np.array([0.995, 0.07, -0.07, 0])
    obs[1:5] = bp._times(bp._turn(2.0), tilt / np.linalg.norm(tilt))
    seen, k = bp.seen_along(obs, 0.3)
    assert abs(bp._yaw(seen[1:5])) <= np.pi / 4 + 0.05
    turned = obs.copy()
    turned[1:5], turned[13:16] = bp._times(bp._turn(1.1), obs[1:5]), bp._turned(1.1, obs[13:16])
    again, same = bp.seen_along(turned, 0.3 + 1.1)
    np.testing.assert_allclose(again, seen, atol=1e-9)
    action = np.arange(8.0)
    assert same == k and sorted(np.abs(bp.relabelled(action, k))) == sorted(action)
    assert bp.relabelled(action, 0).tolist() == action.tolist()


@pytest.mark.usefixtures("recipes")
def test_human_demonstrations(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import human  # type: ignore[import-not-found]

    monkeypatch.setattr(sys, "argv", ["human", "--root", str(root), "--only", "door"])
    human.main()
    human.main()
    assert capsys.readouterr().out.startswith("diffagents/door/human-v0: 6,704 steps, 25 episodes, mean return ")
    data = diffagents.load_dataset("diffagents/door/human-v0")
    assert len(data) == 6704 and float(data.action.abs().max()) == 1.0


@pytest.mark.usefixtures("recipes")
def test_a_demonstration_of_pusht_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gym_pusht")
    import human

    with gym.make("gym_pusht/PushT-v0") as env:
        episode = next(human.pusht_episodes(env))
        assert len(episode["observations"]) == 162 and episode["rewards"][-1] == pytest.approx(0.9366, abs=1e-3)
        assert (np.diff(episode["observations"][:, :2], axis=0) != 0).any() and not episode["terminations"].any()
        monkeypatch.setattr(human, "TOLERANCE", 1e-9)
        with pytest.raises(RuntimeError, match="demonstration 0"):
            next(human.pusht_episodes(env))


# ---- Minari's published sets -----------------------------------------------------------------------------------------

PUBLISHED = "mujoco/hopper/medium-v0"


def publish() -> None:
    from minari import upload_dataset

    upload_dataset(PUBLISHED, Hub.token)


def use() -> tuple[np.ndarray, str, str | None, int]:
    data = diffagents.load_dataset(PUBLISHED)
    learnt: Any = small("IQL").learn(PUBLISHED)
    found = learnt.evaluate(n_episodes=1)
    return data.action.numpy(), data.info["id"], found.env_id, int(learnt.num_timesteps)


def test_a_published_set_is_downloaded_learnt_from_and_evaluated_in(tmp_path: Path) -> None:
    """By its id alone, from where Minari's own sets are (hf://farama-minari); the real client, a Hub on this machine."""

    def at(name: str) -> dict[str, str]:
        return {"MINARI_DATASETS_PATH": str(tmp_path / name / "minari"), "DIFFAGENTS_CACHE": str(tmp_path / name / "cache")}

    collect(hop, "Hopper-v5", 200, PUBLISHED, noise="gaussian:0.3", root=tmp_path / "a" / "minari")
    sent = np.concatenate(
        [e.actions for e in minari.MinariDataset(tmp_path / "a/minari" / PUBLISHED / "data").iterate_episodes()]
    )
    with Hub("lfs", tmp_path / "cas") as server:
        with client(server, tmp_path / "home-a", **at("a")) as there:
            there(publish)
        assert "hopper/medium-v0/data/main_data.hdf5" in server.files("farama-minari/mujoco", kind="datasets")
        with client(server, tmp_path / "home-b", **at("b")) as here:
            actions, name, env_id, steps = here(use)
    assert name == PUBLISHED and env_id == "Hopper-v5" and steps > 0
    np.testing.assert_allclose(actions, sent, atol=1e-6)
