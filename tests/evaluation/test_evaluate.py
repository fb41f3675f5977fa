"""Rollouts: which episodes count, what is summed, every kind of environment, stored specs from strangers, video."""

import ctypes.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from diffagents.envs.make import env_id_of, make_env
from diffagents.evaluation.d4rl import d4rl_score, d4rl_score_of_mean
from diffagents.evaluation.evaluate import Evaluation, evaluate
from diffagents.evaluation.video import record_video

SHORT, LONG = 2, 17


class Toy(gym.Env[np.ndarray, np.ndarray]):
    """Episodes of 2 or 17 steps, drawn at reset. Every step pays a number drawn at reset plus 0.1 t a: short and long
    episodes, other seeds and other actions give other returns. Succeeds at its second step only, if long."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, key: str | None = "success", dict_obs: bool = False, render_mode: str | None = None) -> None:
        self.key, self.dict_obs, self.render_mode = key, dict_obs, render_mode
        if dict_obs:
            self.observation_space = spaces.Dict({"a": Toy.observation_space, "b": spaces.Box(-9, 9, (1,))})  # type: ignore[assignment]

    def _obs(self) -> Any:
        obs = np.array([self.t, self.pay], np.float32)
        return {"a": obs, "b": np.array([self.t], np.float32)} if self.dict_obs else obs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.length = LONG if self.np_random.random() < 0.5 else SHORT
        self.pay, self.t = float(self.np_random.normal()), 0
        return self._obs(), {self.key: False} if self.key else {}

    def step(self, action: np.ndarray) -> Any:
        self.t += 1
        reward = self.pay + 0.1 * self.t * float(action[0])
        info = {self.key: self.length == LONG and self.t == 2} if self.key else {}
        ended = self.t == self.length
        return self._obs(), reward, ended and self.length == SHORT, ended and self.length == LONG, info

    def render(self) -> Any:
        return np.full((21, 33, 3), 10 * self.t, np.uint8)


class Endless(Toy):
    def step(self, action: np.ndarray) -> Any:
        return self._obs(), 0.0, False, False, {}


for toy in (Toy, Endless):
    gym.register(f"diffagents/{toy.__name__}-v0", entry_point=toy, disable_env_checker=True)
TOY = "diffagents/Toy-v0"


class Steer:
    """The action depends on the observation only, row by row."""

    def predict(self, obs: Any, /, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        obs = obs["a"] if isinstance(obs, dict) else obs
        assert obs.ndim == 2
        return np.tanh(obs.sum(axis=1, keepdims=True)).astype(np.float32), None


class Constant(Steer):
    def __init__(self, *action: float) -> None:
        self.action = np.array(action, np.float32)

    def predict(self, obs: Any, /, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        n = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        return np.tile(self.action, (n, 1)), None


def by_hand(n_envs: int, rounds: int, seed: int = 0) -> list[tuple[float, int, bool]]:
    """(return, length, success): n single environments, each seeded once and then reset `rounds` times; by round."""
    columns = []
    for i in range(n_envs):
        env, column = Toy(), []
        for k in range(rounds):
            obs, _ = env.reset(seed=seed + i if k == 0 else None)
            total, length, success, over = 0.0, 0, False, False
            while not over:
                action = Steer().predict(obs[None])[0][0]
                obs, reward, terminated, truncated, info = env.step(action)
                total, length, success = total + reward, length + 1, success or info["success"]
                over = terminated or truncated
            column.append((total, length, success))
        columns.append(column)
    return [columns[i][k] for k in range(rounds) for i in range(n_envs)]


def check_against_hand(result: Evaluation, n_envs: int, rounds: int, seed: int = 0) -> None:
    expected = by_hand(n_envs, rounds, seed)
    np.testing.assert_allclose(result.returns, [r for r, _, _ in expected], rtol=1e-5)
    assert result.lengths == tuple(n for _, n, _ in expected)
    assert result.successes == tuple(s for _, _, s in expected)
    assert set(result.lengths) == {SHORT, LONG}  # else the test would prove little


def sb3_env(n: int, **kwargs: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda: Toy(**kwargs)] * n)


# ------------------------------------------------------------------------------------------------- which episodes


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_autoreset_mode_plays_the_same_episodes_as_single_environments(mode: AutoresetMode) -> None:
    env = SyncVectorEnv([Toy] * 3, autoreset_mode=mode)
    check_against_hand(evaluate(Steer(), env, 12, seed=5), 3, 4, seed=5)
    check_against_hand(evaluate(Steer(), env, 12, seed=5), 3, 4, seed=5)  # still open, and seeded anew
    env.close()


def test_an_sb3_env_plays_the_same_episodes_as_single_environments() -> None:
    check_against_hand(evaluate(Steer(), sb3_env(3), 12, seed=5), 3, 4, seed=5)


def test_short_episodes_are_not_favoured() -> None:
    """The first 8 episodes to finish on 4 environments are mostly short ones; a fixed share of each is not."""
    fair = evaluate(Steer(), SyncVectorEnv([Toy] * 4), 8, seed=1)
    ends = []
    for i in range(4):
        times = np.cumsum([length for _, length, _ in by_hand(4, 8, seed=1)][i::4])
        ends += [(end, i, k) for k, end in enumerate(times)]
    naive = [by_hand(4, 8, seed=1)[k * 4 + i][1] for _, i, k in sorted(ends)[:8]]
    assert fair.mean_length > 1.5 * np.mean(naive)
    assert fair.lengths == tuple(length for _, length, _ in by_hand(4, 2, seed=1))


def test_quotas_differ_by_at_most_one() -> None:
    result = evaluate(Steer(), SyncVectorEnv([Toy] * 3), 7, seed=5)
    np.testing.assert_allclose(result.returns, [r for r, _, _ in by_hand(3, 3, seed=5)][:7], rtol=1e-5)


def test_the_number_of_environments_changes_nothing_for_an_id() -> None:
    one, four, many = (evaluate(Steer(), TOY, 6, seed=3, n_envs=n) for n in (1, 4, 50))
    assert one == four == many
    assert one == evaluate(Steer(), gym.make(TOY), 6, seed=3)
    np.testing.assert_allclose(one.returns, [by_hand(1, 1, seed=3 + k)[0][0] for k in range(6)], rtol=1e-5)
    assert one != evaluate(Steer(), TOY, 6, seed=300)


def test_pendulum() -> None:
    one = evaluate(Constant(0.0), "Pendulum-v1", 3, seed=0, n_envs=2)
    assert one.lengths == (200, 200, 200)
    assert -2000 < one.mean_return < -100
    assert (one.successes, one.score, one.env_id) == (None, None, "Pendulum-v1")
    vector = gym.make_vec("Pendulum-v1", num_envs=3)
    same = evaluate(Constant(0.0), vector, 3, seed=0)
    np.testing.assert_allclose(same.returns, one.returns, rtol=1e-5)
    assert same.env_id == "Pendulum-v1"


class Counter:
    """Recurrent: answers with the number of steps since the episode began, which it can know from `state` only."""

    def predict(self, obs: Any, /, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        assert deterministic
        count = np.where(episode_start, 0, 0 if state is None else state[0])
        np.testing.assert_array_equal(count, obs[:, 0])
        return np.zeros((len(obs), 1), np.float32), (count + 1,)


class Listening(Steer):
    """Notes how it is told to act, and may say how it is meant to, as our agents do."""

    def __init__(self, meant: bool | None = None) -> None:
        self.told: set[Any] = set()
        if meant is not None:
            self.acts_deterministically = meant

    def predict(self, obs: Any, /, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        self.told.add(deterministic)
        return super().predict(obs)


@pytest.mark.parametrize(("meant", "expected"), [(None, True), (True, True), (False, False)])
def test_a_policy_acts_as_it_is_meant_to_unless_told_otherwise(meant: bool | None, expected: bool, tmp_path: Path) -> None:
    """One that does not say how is deterministic, as in SB3's `evaluate_policy`. The result says which it was."""
    for asked in (None, True, False):
        policy, how = Listening(meant), expected if asked is None else asked
        assert evaluate(policy, TOY, 1, deterministic=asked).deterministic is how and policy.told == {how}
        frames = Listening(meant)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing here can render, perhaps
            record_video(frames, TOY, tmp_path / "a.mp4", deterministic=asked)
        assert frames.told in ({how}, set())
    assert evaluate(Listening(meant), TOY, 1).deterministic is expected


@pytest.mark.parametrize("kind", [*AutoresetMode, "sb3", "single"])
def test_state_and_episode_start_follow_the_episodes(kind: Any) -> None:
    policy = Counter()
    if kind == "sb3":
        env: Any = sb3_env(2)
    elif kind == "single":
        env = Toy()
    else:
        env = SyncVectorEnv([Toy] * 2, autoreset_mode=kind)
    result = evaluate(policy, env, 8, seed=4)
    assert len(result.returns) == 8


def test_dict_observations_arrive_as_a_dict_of_batches() -> None:
    plain = evaluate(Steer(), TOY, 4, n_envs=2)
    assert evaluate(Steer(), TOY, 4, n_envs=2, env_kwargs={"dict_obs": True}) == plain
    vector = SyncVectorEnv([lambda: Toy(dict_obs=True)] * 2)
    assert evaluate(Steer(), vector, 4).lengths == evaluate(Steer(), SyncVectorEnv([Toy] * 2), 4).lengths


# --------------------------------------------------------------------------------------------- returns and success


class Tenfold(gym.RewardWrapper[np.ndarray, np.ndarray]):
    def reward(self, reward: Any) -> float:
        return 10.0 * float(reward)


def normalized(env: DummyVecEnv | VecMonitor) -> VecNormalize:
    normalize = VecNormalize(env, norm_obs=False)
    normalize.ret_rms.var = np.array(100.0)  # as after some training: rewards come out a tenth as large
    return normalize


def recorded(mode: AutoresetMode, factor: float = 1.0) -> gym.vector.VectorEnv[Any, Any, Any]:
    env = gym.wrappers.vector.RecordEpisodeStatistics(SyncVectorEnv([Toy] * 2, autoreset_mode=mode))
    return env if factor == 1.0 else gym.wrappers.vector.TransformReward(env, lambda reward: factor * reward)


RAW = [r for r, _, _ in by_hand(2, 3)]


@pytest.mark.parametrize(
    "env",
    [
        DummyVecEnv([lambda: Tenfold(Monitor(Toy()))] * 2),  # type: ignore[list-item]
        normalized(DummyVecEnv([lambda: Monitor(Toy())] * 2)),
        normalized(sb3_env(2)),
        normalized(VecMonitor(sb3_env(2))),
        SyncVectorEnv([lambda: Tenfold(gym.wrappers.RecordEpisodeStatistics(Toy()))] * 2),
        SyncVectorEnv(
            [lambda: Tenfold(gym.wrappers.RecordEpisodeStatistics(Toy()))] * 2, autoreset_mode=AutoresetMode.SAME_STEP
        ),
        *(recorded(mode) for mode in AutoresetMode),
        recorded(AutoresetMode.NEXT_STEP, 10.0),
        recorded(AutoresetMode.SAME_STEP, 10.0),
    ],
    ids=lambda env: type(env).__name__,
)
def test_the_raw_return_is_reported(env: Any) -> None:
    np.testing.assert_allclose(evaluate(Steer(), env, 6).returns, RAW, rtol=1e-4)


def test_what_one_sub_environment_recorded_is_not_taken_for_another() -> None:
    """A VectorEnv fills the places of those that said nothing with zeros."""
    seed = next(s for s in range(99) if len({n for _, n, _ in by_hand(2, 1, s)}) == 1)  # both end in the same step
    env = SyncVectorEnv([lambda: gym.wrappers.RecordEpisodeStatistics(Toy()), Toy])
    expected = [r for r, _, _ in by_hand(2, 1, seed)]
    np.testing.assert_allclose(evaluate(Steer(), env, 2, seed=seed).returns, expected, rtol=1e-5)


def test_evaluation_leaves_a_vec_normalize_as_it_was() -> None:
    env = VecNormalize(sb3_env(2))
    env.reset()
    env.step(np.zeros((2, 1), np.float32))
    before = (env.obs_rms.mean.copy(), env.ret_rms.var.copy())  # type: ignore[union-attr]
    evaluate(Steer(), env, 4)
    assert env.training
    np.testing.assert_array_equal(env.obs_rms.mean, before[0])  # type: ignore[union-attr]
    np.testing.assert_array_equal(env.ret_rms.var, before[1])


@pytest.mark.parametrize("key", ["success", "is_success"])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_success_at_any_step_counts(key: str, mode: AutoresetMode) -> None:
    """Toy succeeds in the middle of a long episode: neither its last info nor the next reset's says so."""
    env = SyncVectorEnv([lambda: Toy(key=key)] * 2, autoreset_mode=mode)
    result = evaluate(Steer(), env, 6)
    assert result.successes == tuple(length == LONG for length in result.lengths)
    assert 0 < result.success_rate < 1  # type: ignore[operator]


class AtTheEnd(gym.Wrapper[Any, Any, Any, Any]):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return obs, reward, terminated, truncated, {"is_success": True} if truncated else {}


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_success_that_is_told_at_the_end_only(mode: AutoresetMode) -> None:
    result = evaluate(Steer(), SyncVectorEnv([lambda: AtTheEnd(Toy())] * 2, autoreset_mode=mode), 6)
    assert result.successes == tuple(length == LONG for length in result.lengths)


def test_no_success_key_no_success_rate() -> None:
    result = evaluate(Steer(), TOY, 2, env_kwargs={"key": None})
    assert result.successes is None
    assert result.success_rate is None


class ToGoal:
    """A spring to the goal of a point maze."""

    def predict(self, obs: Any, /, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        place, speed = obs["observation"][:, :2], obs["observation"][:, 2:]
        return np.clip(5 * (obs["desired_goal"] - place) - speed, -1, 1).astype(np.float32), None


def test_point_maze_success() -> None:
    pytest.importorskip("gymnasium_robotics", reason="gymnasium-robotics is not installed")
    maze = [[1, 1, 1, 1, 1], [1, "r", 0, "g", 1], [1, 1, 1, 1, 1]]
    kwargs = {"maze_map": maze, "continuing_task": False, "max_episode_steps": 150}
    stored = make_env("PointMaze_UMaze-v3", **kwargs).spec.to_json()
    result = evaluate(ToGoal(), stored, 2, n_envs=2)
    assert result.successes == (True, True)
    assert max(result.lengths) < 150  # continuing_task=False came out of the stored spec
    assert result.env_id == "PointMaze_UMaze-v3"
    assert result.score is None
    idle = evaluate(Constant(0.0, 0.0), stored, 1)
    assert (idle.successes, idle.lengths) == ((False,), (150,))


# ------------------------------------------------------------------------------------------------------ the numbers


def test_d4rl_scale_in_closed_form() -> None:
    assert d4rl_score("Hopper-v5", [-20.272305]) == pytest.approx(0.0)
    assert d4rl_score("Hopper-v4", [3234.3, 3234.3]) == pytest.approx(100.0)
    assert d4rl_score("HalfCheetah-v5", [(12135.0 - 280.178953) / 2]) == pytest.approx(50.0)
    assert d4rl_score("mujoco/Walker2d", [1.629008 + 0.25 * (4592.3 - 1.629008)]) == pytest.approx(25.0)
    assert d4rl_score("AntMaze_Large_Diverse_GR-v5", [0.0, 1.0, 57.0, 0.0]) == pytest.approx(50.0)
    for name in ("PointMaze_UMaze-v3", "AntMaze_UMazeDense-v5", "AdroitHandPenSparse-v1", "Pendulum-v1", None):
        assert d4rl_score(name, [1.0]) is None


def test_the_interval_holds_the_mean() -> None:
    assert Evaluation((3.0,), (1,), env_id="Hopper-v5").interval is None
    assert "interval" not in str(Evaluation((3.0,), (1,), env_id="Hopper-v5"))
    random = np.random.default_rng(3)
    for n in (2, 10, 100):
        values = tuple(random.normal(50, 10, n).tolist())
        result = Evaluation(values, (1,) * n, env_id="Hopper-v5")
        assert result.interval is not None
        low, high = result.interval
        assert low <= result.mean_return <= high
        scale = np.array([d4rl_score("Hopper-v5", [low]), d4rl_score("Hopper-v5", [high])], float)
        np.testing.assert_allclose(np.array(result.score_interval), scale, rtol=1e-6)
    # of 100 normal numbers: about two standard errors to each side
    assert high - low == pytest.approx(2 * 1.96 * result.std_return / 10, rel=0.1)


@pytest.mark.parametrize("successes", [None, (True, False)])
def test_an_evaluation_is_read_from_its_json(successes: tuple[bool, ...] | None) -> None:
    result = Evaluation((1000.0, 2000.0), (500, 1000), successes, "Hopper-v5", seed=7, choice={"n_candidates": 4})
    assert Evaluation.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_what_is_printed_and_what_is_stored() -> None:
    result = Evaluation((1000.0, 2000.0), (500, 1000), (True, False), "Hopper-v5", seed=7)
    line = str(result)
    assert "\n" not in line
    assert line.startswith("Hopper-v5: return 1500.00 ± 500.00 (2 episodes")
    assert f"D4RL scale {100 * 1520.272305 / 3254.572305:.1f} [" in line
    assert line.endswith("success 50 % [9, 91]")
    stored = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert stored["returns"] == [1000.0, 2000.0]
    assert stored["n_episodes"] == 2
    assert (stored["mean_return"], stored["std_return"], stored["mean_length"]) == (1500.0, 500.0, 750.0)
    assert (stored["success_rate"], stored["seed"], stored["env_id"]) == (0.5, 7, "Hopper-v5")
    assert stored["score_reference"] == ["D4RL Hopper (mujoco-py)", -20.272305, 3234.3]
    plain = str(Evaluation((1.0,), (3,)))
    assert "(1 episode)" in plain
    assert "D4RL" not in plain
    assert "success" not in plain


# ------------------------------------------------------------------------------------------- specs from strangers


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a mark when it is imported."""
    mark = tmp_path / "was_here"
    (tmp_path / "diffagents_evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Env: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    return mark


def spec_with(**changes: Any) -> str:
    return json.dumps(json.loads(gym.make("Pendulum-v1").spec.to_json()) | changes)  # type: ignore[union-attr]


def test_a_stored_spec_imports_nothing(evil: Path) -> None:
    wrapper = {"name": "Evil", "entry_point": "diffagents_evil:Env", "kwargs": {}}
    spec = spec_with(
        entry_point="diffagents_evil:Env",
        vector_entry_point="diffagents_evil:Env",
        additional_wrappers=[wrapper],
        kwargs={"g": 5.0, "render_mode": "human", "num_envs": 3},
        max_episode_steps=9,
    )
    with pytest.warns(UserWarning, match="without the wrappers"):
        env = make_env(spec)
    assert type(env.unwrapped).__name__ == "PendulumEnv"
    assert (env.unwrapped.g, env.render_mode, env.spec.max_episode_steps) == (5.0, None, 9)
    assert make_env(spec_with(kwargs={"g": 5.0}), g=1.0).unwrapped.g == 1.0
    with pytest.raises(ValueError, match="unknown environment 'diffagents_evil/Env-v0'"):
        make_env(spec_with(id="diffagents_evil/Env-v0", entry_point="diffagents_evil:Env"))
    assert not evil.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "diffagents_evil:Env-v0"}, "would import a module"),
        ({"kwargs": {"env_id": "diffagents_evil:Env-v0"}}, "looks like a path or a module"),
        ({"kwargs": {"nested": [{"xml_file": "../robot.xml"}]}}, "looks like a path or a module"),
        ({"kwargs": [1]}, "no usable id and kwargs"),
        ({"id": None}, "no usable id and kwargs"),
        ({"max_episode_steps": -1}, "must be null or a whole number"),
        ({"max_episode_steps": 10**30}, "must be null or a whole number"),
        ({"kwargs": {"xml_file": "~alice"}}, "looks like a path or a module"),
        ({"kwargs": {"xml_file": ".robot.xml"}}, "looks like a path or a module"),
        ({"kwargs": {"frame_skip": 10**9}}, r"frame_skip='1000000000', which is larger than 10,000; .* pass env='Pendulum-v1'"),
        ({"kwargs": {"default_camera_config": {"distance": [-1e300]}}}, "default_camera_config='-1e.300', which is larger"),
        ({"kwargs": {"maze_map": [[1] * 200] * 200}}, "maze_map='1', which is one of too many values"),
        ({"kwargs": {"unknown": 1}}, r"does not work with the stored arguments unknown\b.*pass env= instead"),
        ({"kwargs": {"id": "x"}}, r"does not work with the stored arguments id\b"),
        ({"id": "a/b/c"}, r"unknown environment 'a/b/c' \(Malformed environment ID"),
        ({"additional_wrappers": [3]}, "cannot be read"),
    ],
)
def test_a_bad_stored_spec_is_refused(evil: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env(spec_with(**changes))
    assert not evil.exists()


@pytest.mark.parametrize("where", ["id", "key", "wrapper", "unknown"])
def test_control_characters_of_a_stored_spec_reach_no_message(where: str) -> None:
    """They could rename the window of a terminal, or hide what was printed before."""
    escape = "\x1b]0;owned\x07\x1b[2J"
    changes: dict[str, Any] = {
        "id": {"id": f"{escape}X-v0"},
        "key": {"kwargs": {f"{escape}k": "a/b"}},
        "wrapper": {"id": "Nope-v0", "additional_wrappers": [{"name": escape}]},
        "unknown": {"kwargs": {f"{escape}k": 1}},
    }[where]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=r"environment|spec") as refusal:
            make_env(spec_with(**changes))
    assert all(char.isprintable() for text in (refusal.value, *(w.message for w in caught)) for char in str(text))


def test_a_spec_object_follows_the_same_rules(evil: Path) -> None:
    spec = gym.make("Pendulum-v1", g=5.0).spec
    assert spec is not None
    assert make_env(spec).unwrapped.g == 5.0
    spec.entry_point = "diffagents_evil:Env"
    assert type(make_env(spec).unwrapped).__name__ == "PendulumEnv"
    with pytest.raises(ValueError, match="cannot be read"):
        make_env('{"id": "Pendulum-v1"')
    assert not evil.exists()


def test_env_id_of() -> None:
    pendulum = gym.make("Pendulum-v1")
    monitored = DummyVecEnv([lambda: Monitor(gym.make("Pendulum-v1"))])
    vector = SyncVectorEnv([lambda: gym.make("Pendulum-v1")])
    for env in (pendulum, monitored, vector, "Pendulum-v1", pendulum.spec, pendulum.spec.to_json()):  # type: ignore[union-attr]
        assert env_id_of(env) == "Pendulum-v1"
    assert env_id_of(Toy()) is None
    assert env_id_of(sb3_env(1)) is None


# ---------------------------------------------------------------------------------------------------- bad arguments


class WithSpaces(Constant):
    def __init__(self, obs: spaces.Space[Any], act: spaces.Space[Any]) -> None:
        super().__init__(0.0)
        self.observation_space, self.action_space = obs, act


BOX = spaces.Box


@pytest.mark.parametrize(
    ("policy", "env", "arguments", "error", "message"),
    [
        (Steer(), TOY, {"n_episodes": 0}, ValueError, "at least 1"),
        (Steer(), TOY, {"n_envs": 0}, ValueError, "at least 1"),
        (Steer(), Toy(), {"n_envs": 2}, ValueError, "is for an environment id"),
        (Steer(), Toy(), {"env_kwargs": {"key": "x"}}, ValueError, "made already"),
        (Steer(), "Nope-v0", {}, ValueError, "unknown environment 'Nope-v0'.*spelling"),
        (Steer(), "Pendulum-v77", {}, ValueError, "unknown environment 'Pendulum-v77'"),
        (Steer(), 3, {}, TypeError, "not int"),
        (3, TOY, {}, TypeError, "no predict"),
        (Constant(np.nan), TOY, {}, ValueError, "NaN or infinity"),
        (Constant(0.0, 0.0), TOY, {}, ValueError, r"shape \(1, 2\).*expected \(1, 1\)"),
        (Steer(), "diffagents/Endless-v0", {}, ValueError, "TimeLimit"),
        (WithSpaces(BOX(-1, 1, (3,)), BOX(-1, 1, (1,))), TOY, {}, ValueError, "policy's observation space"),
        (WithSpaces(BOX(-1, 1, (2,)), BOX(-1, 1, (2,))), TOY, {}, ValueError, "policy's action space"),
        (WithSpaces(BOX(-1, 1, (2,)), spaces.Discrete(2)), TOY, {}, ValueError, "policy's action space"),
        (WithSpaces(BOX(-1, 1, (2,)), BOX(-2, 1, (1,))), TOY, {}, ValueError, r"\[-2, 1\].*\[-1, 1\]"),
        (WithSpaces(BOX(-1, 1, (2,)), BOX(-1, 2, (1,))), TOY, {}, ValueError, r"\[-1, 2\].*\[-1, 1\]"),
        (WithSpaces(spaces.Dict({"a": BOX(-1, 1, (2,))}), BOX(-1, 1, (1,))), TOY, {}, ValueError, "observation space"),
    ],
)
def test_bad_calls(policy: Any, env: Any, arguments: Any, error: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffagents.evaluation.episodes.MAX_EPISODE_STEPS", 1000)
    with pytest.raises(error, match=message) as caught:
        evaluate(policy, env, **{"n_episodes": 1, **arguments})
    assert "\n" not in str(caught.value)


def test_dict_spaces_are_compared_key_by_key() -> None:
    env = Toy(dict_obs=True)
    evaluate(WithSpaces(spaces.Dict({"a": BOX(-1, 1, (2,))}), env.action_space), env, 1)
    with pytest.raises(ValueError, match=r"'c'.*only \['a', 'b'\]"):
        evaluate(WithSpaces(spaces.Dict({"c": BOX(-1, 1, (2,))}), env.action_space), env, 1)
    with pytest.raises(ValueError, match="observation 'b'"):
        evaluate(WithSpaces(spaces.Dict({"b": BOX(-1, 1, (2,))}), env.action_space), env, 1)


def test_narrower_action_bounds_warn() -> None:
    with pytest.warns(UserWarning, match=r"\[-0.5, 0.5\]"):
        evaluate(WithSpaces(Toy.observation_space, BOX(-0.5, 0.5, (1,))), TOY, 1)


def test_nan_rewards_stop_the_evaluation() -> None:
    env = gym.wrappers.TransformReward(Toy(), lambda _: float("nan"))
    with pytest.raises(ValueError, match="reward of nan at step 1"):
        evaluate(Steer(), env, 1)


def test_only_what_was_made_here_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str | None] = []
    monkeypatch.setattr(Toy, "close", lambda self: closed.append(self.key))
    evaluate(Steer(), Toy(key="mine"), 1)
    evaluate(Steer(), sb3_env(2, key="mine"), 1)
    evaluate(Steer(), SyncVectorEnv([lambda: Toy(key="mine")]), 1)
    assert closed == []
    evaluate(Steer(), TOY, 3, n_envs=3, env_kwargs={"key": "theirs"})
    with pytest.raises(ValueError, match="NaN"):
        evaluate(Constant(np.nan), TOY, 2, n_envs=2, env_kwargs={"key": "broken"})
    assert closed == ["theirs"] * 3 + ["broken"] * 2


def run_python(code: str) -> str:
    """The output of a fresh process without a screen, in which nothing is imported and MUJOCO_GL is not set."""
    dropped = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=kept, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_missing_packages_name_the_extra_to_install() -> None:
    code = """
import sys
sys.modules["mujoco"] = sys.modules["gymnasium_robotics"] = None
from diffagents.envs.make import make_env, prefer_egl
assert not prefer_egl()
for name in ("Hopper-v5", "PointMaze_UMaze-v3", "AdroitHandPen-v1", "Nope-v0"):
    try:
        make_env(name)
    except Exception as error:
        print(type(error).__name__, error)
"""
    hopper, maze, adroit, nope = run_python(code).splitlines()
    assert hopper.startswith('ImportError Hopper-v5 needs MuJoCo: pip install "gymnasium[mujoco]"')
    assert maze == "ImportError PointMaze_UMaze-v3 needs Gymnasium-Robotics: pip install gymnasium-robotics"
    assert adroit.startswith("ImportError AdroitHandPen-v1 needs")
    assert nope.startswith("ValueError unknown environment 'Nope-v0'")
    assert "pip install gymnasium-robotics" in nope


# ------------------------------------------------------------------------------------------------------------ video


def test_video_of_one_episode(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg (the video extra) is not installed")
    fast = Toy(render_mode="rgb_array")
    fast.metadata = Toy.metadata | {"render_fps": 125}  # type: ignore[misc]
    seed = next(s for s in range(99) if by_hand(1, 1, s)[0][1] == LONG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = record_video(Steer(), TOY, tmp_path / "new" / "a.mp4", seed=seed)
        short = record_video(Steer(), TOY, tmp_path / "b.mp4", seed=seed, max_steps=3, fps=20)
        thinned = record_video(Steer(), fast, tmp_path / "c.mp4", seed=seed, min_seconds=0.0)
    assert path == tmp_path / "new" / "a.mp4"
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]
    for file, last, n_frames, fps in ((path, LONG, LONG + 1, 5), (short, 3, 4, 20), (thinned, LONG, 6, 31.25)):
        reader = ffmpeg.read_frames(str(file))
        meta = next(reader)
        assert meta["codec"] == "h264"
        assert meta["pix_fmt"].startswith("yuv420p")
        assert meta["fps"] == fps
        assert meta["size"] == (34, 22)  # 33 x 21, made even
        frames = [np.frombuffer(frame, np.uint8) for frame in reader]
        assert len(frames) == n_frames
        assert abs(float(frames[-1].mean()) - 10 * last) < 6  # the last picture is that of the last step


class Falls(Steer):
    def predict(self, obs: Any, /, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        if obs[0, 0] >= 1:
            raise RuntimeError("the policy\nfell over")
        return super().predict(obs)


class Blind(Toy):
    metadata = {"render_modes": []}  # noqa: RUF012

    def render(self) -> Any:
        return None


@pytest.mark.parametrize(
    ("policy", "env", "name", "message"),
    [
        (Falls(), TOY, "a.mp4", "the policy fell over"),
        (Steer(), Toy(), "a.mp4", 'made with render_mode="rgb_array"'),
        (Steer(), Blind(render_mode="rgb_array"), "a.mp4", "returned no uint8 image"),
        (Steer(), sb3_env(1), "a.mp4", "a single one"),
        (Steer(), "Nope-v0", "a.mp4", "unknown environment"),
        (Steer(), TOY, "a.gif", "must end in .mp4"),
        (Constant(np.nan), TOY, "a.mp4", "NaN"),
    ],
)
def test_a_failed_video_is_one_warning_and_no_file(policy: Any, env: Any, name: str, message: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert record_video(policy, env, tmp_path / name) is None
    (text,) = [str(w.message) for w in caught if "no video" in str(w.message)]
    assert message in text
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("threads", "seen"), [("auto", 1), (2, 3)])
def test_an_agent_plays_with_one_thread_unless_a_number_is_given(
    threads: int | str, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine several threads that act on one observation wait for each other."""
    number, found = [3], set()
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: number.__setitem__(0, count))

    class Threaded(Steer):
        def predict(self, *args: Any, **kwargs: Any) -> Any:
            found.add(number[0])
            return super().predict(*args, **kwargs)

    policy = Threaded()
    policy.threads = threads  # type: ignore[attr-defined]
    evaluate(policy, TOY, 1)
    assert found == {seen} and number == [3]


def test_a_video_without_ffmpeg_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    old = tmp_path / "a.mp4"
    old.write_bytes(b"an older video")
    with pytest.warns(UserWarning, match=r"pip install moviepy imageio-ffmpeg"):
        assert record_video(Steer(), TOY, old) is None
    assert old.read_bytes() == b"an older video"
    assert list(tmp_path.iterdir()) == [old]


def test_mujoco_renders_without_a_screen(tmp_path: Path) -> None:
    """In a fresh process: registers Gymnasium-Robotics by itself, finds EGL by itself."""
    for package in ("gymnasium_robotics", "imageio_ffmpeg", "OpenGL"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    if not sys.platform.startswith("linux") or not ctypes.util.find_library("EGL"):
        pytest.skip("no libEGL on this machine")
    code = f"""
import os, numpy as np
from diffagents.envs.make import prefer_egl
from diffagents.evaluation.video import record_video
class Still:
    def predict(self, obs, state=None, episode_start=None, deterministic=True):
        return np.zeros((1, 2), np.float32), None
print(record_video(Still(), "PointMaze_UMaze-v3", {str(tmp_path / "a.mp4")!r}, max_steps=1), os.environ["MUJOCO_GL"])
"""
    assert run_python(code).splitlines()[-1] == f"{tmp_path / 'a.mp4'} egl"
    assert (tmp_path / "a.mp4").stat().st_size > 0


def test_the_score_of_a_mean_is_the_mean_of_the_scores() -> None:
    assert d4rl_score_of_mean("AntMaze_UMaze-v5", 0.2) == pytest.approx(d4rl_score("AntMaze_UMaze-v5", [0, 0, 1, 0, 0]))
    assert d4rl_score_of_mean("Hopper-v5", 1000.0) == pytest.approx(d4rl_score("Hopper-v5", [500.0, 1500.0]))
    assert d4rl_score_of_mean("Pendulum-v1", 1.0) is None
