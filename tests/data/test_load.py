"""Every kind of source gives the same transitions for the same data; ends, replay buffers, environments, the cache."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from diffagents.data.load import load_dataset
from diffagents.data.transitions import Transitions
from diffagents.data.validation import OTHER_NAMES
from diffagents.envs.make import make_env

LENGTHS, TERMINATES = (5, 7, 4, 6), (True, False, True, False)
OBS_SPACE = spaces.Box(-np.inf, np.inf, (3,), np.float64)
ACT_SPACE = spaces.Box(-2.0, 2.0, (2,), np.float32)
COLUMNS = ("obs", "action", "rew", "next_obs", "done", "episode_ends", "episode_returns", "episode_lengths")
Episode = dict[str, Any]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFAGENTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    warnings.filterwarnings("ignore", message="action bounds")


def make_episodes(dict_obs: bool = False) -> list[Episode]:
    rng = np.random.default_rng(0)
    episodes: list[Episode] = []
    for n, terminates in zip(LENGTHS, TERMINATES, strict=True):
        obs: Any = rng.standard_normal((n + 1, 3))
        if dict_obs:
            obs = {"observation": obs, "achieved_goal": obs[:, :2] + 1, "desired_goal": rng.standard_normal((n + 1, 2))}
        last = np.arange(n) == n - 1
        actions = rng.uniform(-2, 2, (n, 2)).astype(np.float32)
        episodes.append(
            {
                "observations": obs,
                "actions": actions,
                "rewards": rng.standard_normal(n),
                "terminations": last & terminates,
                "truncations": last & (not terminates),
            }
        )
    return episodes


def flatten(episodes: list[Episode], with_next: bool = True) -> dict[str, Any]:
    def join(parts: list[Any], rows: slice) -> Any:
        if isinstance(parts[0], dict):
            return {key: np.concatenate([part[key][rows] for part in parts]) for key in parts[0]}
        return np.concatenate([part[rows] for part in parts])

    observations = [episode["observations"] for episode in episodes]
    flat = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0] if key != "observations"}
    flat["observations"] = join(observations, slice(None, -1))
    if with_next:
        flat["next_observations"] = join(observations, slice(1, None))
    return flat


def make_minari(episodes: list[Episode], name: str = "test/set-v0", **kwargs: Any) -> Any:
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    os.makedirs(os.environ["MINARI_DATASETS_PATH"], exist_ok=True)
    buffers = [EpisodeBuffer(id=i, infos={}, **episode) for i, episode in enumerate(episodes)]
    obs = episodes[0]["observations"]
    space: Any = OBS_SPACE
    if isinstance(obs, dict):
        space = spaces.Dict({k: spaces.Box(-np.inf, np.inf, v.shape[1:], np.float64) for k, v in obs.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kwargs = {"observation_space": space, "action_space": ACT_SPACE, **kwargs}
        return minari.create_dataset_from_buffers(name, buffers, **kwargs)


def write_hdf5(path: Path, data: dict[str, Any]) -> Path:
    import h5py

    with h5py.File(path, "w") as file:
        for key, value in data.items():
            for name, array in value.items() if isinstance(value, dict) else [("", value)]:
                file[f"{key}/{name}".rstrip("/")] = array
        file["infos/qpos"] = np.zeros(3)
    return path


def write_npz(path: Path, data: dict[str, Any]) -> Path:
    flat = {k: v for k, v in data.items() if not isinstance(v, dict)}
    flat |= {f"{k}/{name}": array for k, v in data.items() if isinstance(v, dict) for name, array in v.items()}
    np.savez(path, **flat)
    return path


def as_d4rl(data: dict[str, Any]) -> dict[str, Any]:
    theirs = {ours: name for name, ours in OTHER_NAMES.items()}
    return {theirs.get(key, key): value for key, value in data.items()}


def source_of(kind: str, episodes: list[Episode], folder: Path) -> Any:
    flat = flatten(episodes)
    if kind == "minari id":
        make_minari(episodes)
        return "test/set-v0"
    if kind == "minari dataset":
        return make_minari(episodes)
    return {
        "arrays": lambda: flat,
        "tensors": lambda: {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in flat.items()},
        "columns (N, 1)": lambda: flat | {k: flat[k][:, None] for k in ("rewards", "terminations", "truncations")},
        "d4rl names": lambda: as_d4rl(flat),
        "episode_ends": lambda: flat_without(flat, "truncations") | {"episode_ends": np.cumsum(LENGTHS)},
        "breaks": lambda: flat_without(flat, "truncations"),
        "npz": lambda: write_npz(folder / "set.npz", flat),
        "npz as str": lambda: str(write_npz(folder / "set.npz", flat)),
        "hdf5": lambda: write_hdf5(folder / "set.hdf5", as_d4rl(flat)),
        "episodes": lambda: episodes,
    }[kind]()


def flat_without(flat: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in flat.items() if key != name}


KINDS = (
    "minari id", "minari dataset", "arrays", "tensors", "columns (N, 1)", "d4rl names", "episode_ends",
    "breaks", "npz", "npz as str", "hdf5", "episodes",
)  # fmt: skip


def assert_same(a: Transitions, b: Transitions) -> None:
    for name in COLUMNS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.info["sha256"] == b.info["sha256"]


@pytest.mark.parametrize("dict_obs", [False, True], ids=["box", "dict"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_transitions(kind: str, dict_obs: bool, tmp_path: Path) -> None:
    episodes = make_episodes(dict_obs)
    data = load_dataset(source_of(kind, episodes, tmp_path))
    obs = [e["observations"] for e in episodes]
    if dict_obs:  # the parts in this order
        obs = [np.concatenate([o["observation"], o["achieved_goal"], o["desired_goal"]], axis=1) for o in obs]
    rewards = [e["rewards"].astype(np.float32) for e in episodes]
    np.testing.assert_array_equal(data.obs, np.concatenate([o[:-1] for o in obs]).astype(np.float32))
    np.testing.assert_array_equal(data.next_obs, np.concatenate([o[1:] for o in obs]).astype(np.float32))
    np.testing.assert_array_equal(data.action, np.concatenate([e["actions"] for e in episodes]))
    np.testing.assert_array_equal(data.rew, np.concatenate(rewards))
    np.testing.assert_array_equal(np.flatnonzero(data.done), [4, 15])  # the truncations at 11 and 21 are no ends
    assert data.episode_ends.tolist() == [5, 12, 16, 22]
    assert data.episode_lengths.tolist() == list(LENGTHS)
    np.testing.assert_allclose(data.episode_returns, [r.sum() for r in rewards], rtol=1e-5)
    assert {t.dtype for t in (data.obs, data.action, data.rew, data.next_obs, data.done)} == {torch.float32}
    assert data.spec.obs_keys == (("observation", "achieved_goal", "desired_goal") if dict_obs else None)
    assert data.info["n_steps"] == 22
    assert data.info["n_episodes"] == 4
    json.dumps(data.info)
    assert_same(data, load_dataset(episodes))


def test_without_next_observations_a_truncated_row_is_dropped_and_a_terminated_one_kept() -> None:
    episodes = make_episodes()
    full, data = load_dataset(episodes), load_dataset(flatten(episodes, with_next=False))
    kept = np.setdiff1d(np.arange(22), [11, 21])
    for name in ("obs", "action", "rew", "done"):
        assert torch.equal(getattr(data, name), getattr(full, name)[kept]), name
    inner = np.setdiff1d(kept, [4, 15])  # where nothing terminates, the next observation is the next row's
    at = np.searchsorted(kept, inner)
    assert torch.equal(data.next_obs[at], full.next_obs[inner])
    assert data.episode_ends.tolist() == [5, 11, 15, 20]
    assert data.episode_lengths.tolist() == list(LENGTHS)  # as recorded
    assert torch.equal(data.episode_returns, full.episode_returns)


def test_a_last_row_without_a_flag_is_dropped_and_its_episode_counts_as_cut() -> None:
    flat = flatten(make_episodes(), with_next=False)
    flat["truncations"][-1] = False
    data = load_dataset(flat)
    assert len(data) == 20
    assert data.episode_whole.tolist() == [True, True, True, False]


def test_a_short_last_episode_that_was_truncated_counts_as_cut_by_the_end_of_the_recording() -> None:
    episodes = make_episodes()  # 5 terminated, 7 truncated, 4 terminated, 6 truncated
    data = load_dataset(episodes)
    assert data.episode_whole.tolist() == [True, True, True, False]
    assert data.info["mean_return"] == pytest.approx(float(data.episode_returns[:3].mean()), rel=1e-5)
    assert load_dataset(episodes[:3]).episode_whole.all()  # terminated
    assert load_dataset(episodes[:2]).episode_whole.all()  # as long as any


def test_auto_rewards_know_which_rows_terminate() -> None:
    flat = flatten(make_episodes())
    flat["rewards"] = flat["terminations"].astype(float)
    assert load_dataset(flat).fit_reward_transform("auto").name == "minus_one"
    flat["rewards"] = 1.0 - flat["rewards"]  # alive is 1, a fall is 0
    assert load_dataset(flat).fit_reward_transform("auto").name == "return_range"


def test_with_both_flags_the_episode_terminated() -> None:
    flat = flatten(make_episodes())
    flat["truncations"] |= flat["terminations"]
    assert_same(load_dataset(flat), load_dataset(make_episodes()))


def test_the_time_limit_of_env_stands_in_for_missing_truncations() -> None:
    n, limit = 450, 200  # Pendulum-v1 never terminates and stops after 200 steps
    rng = np.random.default_rng(0)
    flat = {
        "observations": rng.standard_normal((n, 3)),
        "actions": rng.uniform(-2, 2, (n, 1)),
        "rewards": rng.standard_normal(n),
        "terminals": np.arange(n) == 99,
    }
    data = load_dataset(flat, env="Pendulum-v1")
    assert data.episode_lengths.tolist() == [100, limit, 150]
    assert len(data) == n - 2  # row 299 was truncated, row 449 is the last


def test_old_episodes_without_their_last_observation_lose_a_transition_unless_they_terminated() -> None:
    episodes = make_episodes()
    for episode in episodes:
        episode["observations"] = episode["observations"][:-1]
    with pytest.warns(UserWarning, match="4 of 4 episodes lack their last observation"):
        data = load_dataset(episodes)
    assert_same(data, load_dataset(flatten(make_episodes(), with_next=False)))


def test_the_arrays_of_the_user_are_copied() -> None:
    flat = {k: v.astype(np.float32) if v.dtype != bool else v for k, v in flatten(make_episodes()).items()}
    data = load_dataset(flat)
    before = data.fingerprint()
    for array in flat.values():
        array[:] = 0
    assert data.fingerprint() == before


def test_transitions_come_back_as_they_are() -> None:
    data = load_dataset(make_episodes())
    assert load_dataset(data) is data


def test_transitions_take_the_spaces_of_env_and_may_be_clipped_in_a_copy() -> None:
    episodes = pendulum_episodes()
    episodes[1]["actions"][3, 0] = 2.5
    data = load_dataset(episodes)
    before = data.action.clone(), data.spec, dict(data.info)
    read = load_dataset(data, env="Pendulum-v1", clip_actions=True)
    assert read.action.max() == 2
    assert read.spec.action_space == spaces.Box(-2, 2, (1,))
    assert json.loads(read.info["env_spec"])["id"] == "Pendulum-v1"
    assert read.obs is data.obs  # no second copy of the data
    assert torch.equal(data.action, before[0])  # and the caller's are as they were
    assert (data.spec, data.info) == before[1:]
    assert load_dataset(read, clip_actions=True) is read


def test_transitions_of_other_units_may_be_clipped() -> None:
    data = load_dataset(pendulum_episodes(), env="Pendulum-v1")
    data.action = data.action * 1.5
    with pytest.raises(ValueError, match=r"load_dataset\(\.\.\., clip_actions=True\)"):
        load_dataset(data)
    assert load_dataset(data, clip_actions=True).action.max() == 2


def test_the_keys_of_transitions_are_looked_for_in_env() -> None:
    flat = flatten(make_episodes(dict_obs=True))
    flat["actions"] = flat["actions"][:, :1]
    data = load_dataset(flat, obs_keys=["achieved_goal", "observation"])
    assert load_dataset(data, obs_keys=["achieved_goal", "observation"]) is data
    parts = (("observation", 3), ("achieved_goal", 2), ("desired_goal", 2))
    env = gymnasium.make("Pendulum-v1")
    env.observation_space = spaces.Dict({key: spaces.Box(-9, 9, (n,)) for key, n in parts})
    assert load_dataset(data, env=env).spec.obs_keys == ("achieved_goal", "observation")


def test_the_order_of_the_given_keys_is_kept() -> None:
    flat = flatten(make_episodes(dict_obs=True))
    for name in ("observations", "next_observations"):
        flat[name] = {"z": flat[name]["achieved_goal"], "b": flat[name]["observation"]}
    data = load_dataset(flat)
    assert data.spec.obs_keys == ("z", "b")
    np.testing.assert_array_equal(data.obs[:, :2], flat["observations"]["z"].astype(np.float32))


def test_one_array_under_both_names_is_fine_where_they_agree() -> None:
    flat = flatten(make_episodes())
    both = flat | {"terminals": flat["terminations"].astype(float), "timeouts": None}  # None: not given
    assert_same(load_dataset(both), load_dataset(flat))


def test_obs_keys_choose_and_order() -> None:
    episodes = make_episodes(dict_obs=True)
    data = load_dataset(episodes, obs_keys=["desired_goal", "achieved_goal"])
    first = episodes[0]["observations"]
    expected = np.concatenate([first["desired_goal"][0], first["achieved_goal"][0]]).astype(np.float32)
    np.testing.assert_array_equal(data.obs[0], expected)
    assert data.info["obs_keys"] == ["desired_goal", "achieved_goal"]


# ---- spaces and environments -----------------------------------------------------------------------------------


def test_arrays_alone_get_the_bounds_of_the_data_and_a_warning() -> None:
    flat = flatten(make_episodes())
    flat["actions"][:, 1] = 0.5  # a constant dimension must still have a width
    with pytest.warns(UserWarning, match="are those of the data; pass env="):
        data = load_dataset(flat)
    low, high = data.spec.action_space.low, data.spec.action_space.high
    assert low[0] == flat["actions"][:, 0].min()
    assert high[0] == flat["actions"][:, 0].max()
    assert low[1] < 0.5 < high[1]
    assert data.info["bounds_from_data"]


def pendulum_episodes(n: int = 2) -> list[Episode]:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=30)
    env.action_space.seed(0)
    episodes = []
    for seed in range(n):
        steps: list[Any] = []
        observations, over = [env.reset(seed=seed)[0]], False
        while not over:
            action = env.action_space.sample()
            obs, rew, terminated, truncated, _ = env.step(action)
            observations.append(obs)
            steps.append((action, rew, terminated, truncated))
            over = terminated or truncated
        names = ("actions", "rewards", "terminations", "truncations")
        columns = {name: np.array(values) for name, values in zip(names, zip(*steps, strict=True), strict=True)}
        episodes.append({"observations": np.array(observations), **columns})
    return episodes


@pytest.mark.parametrize("kind", ["id", "env", "vec env", "vector env"])
def test_env_gives_spaces_and_spec(kind: str) -> None:
    from stable_baselines3.common.env_util import make_vec_env

    make = {
        "id": lambda: "Pendulum-v1",
        "env": lambda: gymnasium.make("Pendulum-v1"),
        "vec env": lambda: make_vec_env("Pendulum-v1", 2),
        "vector env": lambda: gymnasium.make_vec("Pendulum-v1", 2),
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no word about bounds
        data = load_dataset(pendulum_episodes(), env=make())
    assert data.spec.action_space == spaces.Box(-2, 2, (1,))
    assert data.spec.observation_space.shape == (3,)
    assert json.loads(data.info["env_spec"])["id"] == "Pendulum-v1"
    assert not data.info["bounds_from_data"]
    assert not data.done.any()  # every episode ran into the time limit


@pytest.mark.parametrize("kind", ["id", "vec env"])
def test_a_stored_environment_is_kept_and_another_one_is_named(kind: str) -> None:
    from stable_baselines3.common.env_util import make_vec_env

    make_minari(
        pendulum_episodes(), "test/pendulum-v0", env=gymnasium.make("Pendulum-v1", g=5.0, max_episode_steps=30),
        observation_space=None, action_space=None,
    )  # fmt: skip
    env = "Pendulum-v1" if kind == "id" else make_vec_env("Pendulum-v1", 1)
    for source in ("test/pendulum-v0", load_dataset("test/pendulum-v0")):
        with pytest.warns(UserWarning, match=r"test/pendulum-v0: env= is not .*; the stored one is kept") as caught:
            data = load_dataset(source, env=env)
        (line,) = [str(warning.message) for warning in caught]
        assert "(max_episode_steps=200 instead of 30, g=10.0 instead of 5.0)" in line
        stored = json.loads(data.info["env_spec"])
        assert (stored["kwargs"], stored["max_episode_steps"]) == ({"g": 5.0}, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same, though with a window; and one that says nothing of itself
        same = gymnasium.make("Pendulum-v1", g=5.0, max_episode_steps=30, render_mode="rgb_array")
        assert load_dataset("test/pendulum-v0", env=same).info["env_spec"] == data.info["env_spec"]
        nameless = gymnasium.make("Pendulum-v1").unwrapped
        nameless.spec = None
        assert load_dataset("test/pendulum-v0", env=nameless).info["env_spec"] == data.info["env_spec"]


def test_an_env_without_a_spec_gives_none() -> None:
    env = gymnasium.make("Pendulum-v1").unwrapped
    env.spec = None
    assert load_dataset(pendulum_episodes(), env=env).info["env_spec"] is None


def test_the_monitor_of_sb3_is_not_stored_but_other_wrappers_are() -> None:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.monitor import Monitor

    data = load_dataset(pendulum_episodes(), env=make_vec_env("Pendulum-v1", 1))
    assert json.loads(data.info["env_spec"])["additional_wrappers"] == []
    wrapped = Monitor(gymnasium.wrappers.ClipAction(gymnasium.make("Pendulum-v1")))
    wrapped.action_space = wrapped.unwrapped.action_space  # ClipAction's own has no bounds
    stored = json.loads(load_dataset(pendulum_episodes(), env=wrapped).info["env_spec"])
    assert [wrapper["name"] for wrapper in stored["additional_wrappers"]] == ["ClipAction"]


def test_a_tiny_overshoot_is_clipped_silently_a_large_one_only_when_asked() -> None:
    episodes = pendulum_episodes()
    episodes[1]["actions"][3, 0] = 2.0001
    assert load_dataset(episodes, env="Pendulum-v1").action.max() == 2
    episodes[1]["actions"][3, 0] = 2.5
    with pytest.raises(ValueError, match=r"row 33 \(episode 1, step 3\): dimension 0 is 2.5, outside \[-2, 2\]"):
        load_dataset(episodes, env="Pendulum-v1")
    assert load_dataset(episodes, env="Pendulum-v1", clip_actions=True).action.max() == 2


def test_the_place_of_a_bad_action_counts_dropped_rows() -> None:
    flat = flatten(pendulum_episodes(3), with_next=False)
    flat["actions"][65, 0] = 3
    with pytest.raises(ValueError, match=r"row 65 \(episode 2, step 5\)"):
        load_dataset(flat, env="Pendulum-v1")


def test_minari_facts_are_kept_and_the_evaluation_environment_wins() -> None:
    env = gymnasium.make("Pendulum-v1", g=9.0)
    make_minari(
        pendulum_episodes(), "test/pendulum-v0", env=env, eval_env=gymnasium.make("Pendulum-v1", g=5.0),
        observation_space=None, action_space=None, ref_min_score=-1500.0, ref_max_score=-150.0,
    )  # fmt: skip
    info = load_dataset("test/pendulum-v0").info
    assert (info["id"], info["kind"]) == ("test/pendulum-v0", "minari")
    assert (info["ref_min_score"], info["ref_max_score"]) == (-1500.0, -150.0)
    assert make_env(info["env_spec"]).unwrapped.g == 5.0


# ---- Stable-Baselines3 replay buffers ------------------------------------------------------------------------


class GoalPendulum(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Pendulum with a Dict observation, the keys of goal environments."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = spaces.Dict(
            {key: spaces.Box(-8, 8, (n,)) for key, n in (("observation", 3), ("achieved_goal", 1), ("desired_goal", 1))}
        )

    def observation(self, observation: Any) -> Any:
        return {"observation": observation, "achieved_goal": observation[:1], "desired_goal": np.ones(1, np.float32)}


def fill_buffer(n_steps: int, size: int, n_envs: int, dict_obs: bool, **kwargs: Any) -> tuple[Any, list[list[Any]]]:
    """SAC's own collection into its own buffer, and beside it what each environment saw, row by row."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.vec_env import DummyVecEnv

    log: list[list[Any]] = [[] for _ in range(n_envs)]

    class Spy(gymnasium.Wrapper[Any, Any, Any, Any]):
        def __init__(self, env: Any, rows: list[Any]) -> None:
            super().__init__(env)
            self.rows = rows

        def reset(self, **kw: Any) -> Any:
            self.last, info = self.env.reset(**kw)
            return self.last, info

        def step(self, action: Any) -> Any:
            obs, rew, terminated, truncated, info = self.env.step(action)
            terminated = bool(np.random.default_rng(len(self.rows)).random() < 0.05)  # Pendulum itself never does
            self.rows.append((self.last, np.array(action), rew, obs, terminated, truncated))
            self.last = obs
            return obs, rew, terminated, truncated, info

    def make(rows: list[Any]) -> Any:
        env = gymnasium.make("Pendulum-v1", max_episode_steps=15)
        return Spy(GoalPendulum(env) if dict_obs else env, rows)

    env = DummyVecEnv([lambda rows=rows: make(rows) for rows in log])  # type: ignore[misc]
    policy = "MultiInputPolicy" if dict_obs else "MlpPolicy"
    model = SAC(policy, env, buffer_size=size, learning_starts=10**9, seed=0, device="cpu", **kwargs)
    model.learn(n_steps)
    return model.replay_buffer, log


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("full", [False, True], ids=["part", "full"])
@pytest.mark.parametrize("dict_obs", [False, True], ids=["box", "dict"])
def test_replay_buffer_equals_what_the_environments_saw(n_envs: int, full: bool, dict_obs: bool) -> None:
    size = 60
    buffer, log = fill_buffer(n_envs * 70 if full else n_envs * 50, size * n_envs if full else 10_000, n_envs, dict_obs)
    assert buffer.full == full
    rows = [row for env_log in log for row in env_log[-size:]]  # one environment after the other, oldest first
    data = load_dataset(buffer)

    def stack(i: int) -> np.ndarray:
        picked = [row[i] for row in rows]
        if dict_obs and i in (0, 3):
            return np.array(
                [np.concatenate([o["observation"], o["achieved_goal"], o["desired_goal"]]) for o in picked], np.float32
            )
        return np.array(picked, np.float32)

    np.testing.assert_array_equal(data.obs, stack(0))
    np.testing.assert_allclose(data.action, stack(1), atol=1e-6)  # back in [-2, 2]
    np.testing.assert_allclose(data.rew, stack(2), atol=1e-6)
    np.testing.assert_array_equal(data.next_obs, stack(3))
    np.testing.assert_array_equal(data.done, stack(4))
    assert data.done.any()
    assert data.action.abs().max() > 1.5
    assert data.spec.action_space == spaces.Box(-2, 2, (1,))
    ends = [k + 1 for k, row in enumerate(rows) if row[4] or row[5] or (k + 1) % (len(rows) // n_envs) == 0]
    assert data.episode_ends.tolist() == ends
    heads = [0, *ends[:-1]]
    per_env = len(rows) // n_envs
    for whole, head, end in zip(data.episode_whole.tolist(), heads, ends, strict=True):
        cut = not (rows[end - 1][4] or rows[end - 1][5]) or (full and head % per_env == 0)
        last_and_short = end == len(rows) and not rows[-1][4] and end - head < 15
        assert whole == (not cut and not last_and_short)


@pytest.mark.parametrize("full", [False, True], ids=["part", "full"])
def test_memory_saving_replay_buffer_follows_the_rule_for_missing_next_observations(full: bool) -> None:
    kwargs = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    buffer, log = fill_buffer(70 if full else 50, 60 if full else 1000, 1, False, **kwargs)
    with pytest.raises(ValueError, match="pass env="):
        load_dataset(buffer)
    env = gymnasium.make("Pendulum-v1", max_episode_steps=15)
    data = load_dataset(buffer, env=env)
    rows = log[0][-59:] if full else log[0]  # the oldest observation of a full one is gone
    first_end = next(k for k, row in enumerate(rows) if row[4] or row[5])
    kept = [row for k, row in enumerate(rows) if row[4] or not (row[5] or k == len(rows) - 1)]
    if full and rows[first_end][4]:  # its length is unknown: taken for a time-out
        kept = [row for k, row in enumerate(rows) if k != first_end and (row[4] or not (row[5] or k == len(rows) - 1))]
    np.testing.assert_array_equal(data.obs, np.array([row[0] for row in kept], np.float32))
    np.testing.assert_array_equal(data.done, np.array([row[4] for row in kept], np.float32))
    going_on = ~data.done.bool()
    np.testing.assert_array_equal(data.next_obs[going_on], np.array([row[3] for row in kept])[going_on])


# ---- the cache -----------------------------------------------------------------------------------------------


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("dict_obs", [False, True], ids=["box", "dict"])
@pytest.mark.parametrize("kind", ["minari id", "minari dataset", "hdf5"])
def test_the_second_load_comes_from_the_cache_and_is_equal(
    kind: str, dict_obs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(kind, make_episodes(dict_obs), tmp_path)
    first = load_dataset(source)
    assert len(cache_files(tmp_path)) == 1

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("read again in spite of the cache")

    monkeypatch.setattr("diffagents.data.load.from_episodes", fail)
    monkeypatch.setattr("diffagents.data.minari.from_episodes", fail)
    monkeypatch.setattr("diffagents.data.load.from_arrays", fail)
    second = load_dataset(source)
    assert_same(first, second)
    assert second.spec == first.spec
    assert second.info == first.info
    assert torch.equal(second.episode_whole, first.episode_whole)


def test_a_hit_imports_neither_minari_nor_h5py(tmp_path: Path) -> None:
    make_minari(make_episodes())
    load_dataset("test/set-v0")
    code = (
        "import sys; from diffagents.data.load import load_dataset; print(len(load_dataset('test/set-v0')), "
        "[m for m in ('minari', 'h5py', 'stable_baselines3') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert out.stdout.split("\n")[0] == "22 []"


def test_a_cached_set_serves_with_and_without_env(tmp_path: Path) -> None:
    obs_space, act_space = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-2, 2, (1,))
    make_minari(pendulum_episodes(), observation_space=obs_space, action_space=act_space)
    assert load_dataset("test/set-v0").info["env_spec"] is None
    data = load_dataset("test/set-v0", env="Pendulum-v1")
    assert json.loads(data.info["env_spec"])["id"] == "Pendulum-v1"
    assert data.spec.observation_space == gymnasium.make("Pendulum-v1").observation_space
    assert load_dataset("test/set-v0").info["env_spec"] is None  # what env= said is not in the cache
    assert len(cache_files(tmp_path)) == 1


def test_other_obs_keys_have_a_cache_of_their_own(tmp_path: Path) -> None:
    make_minari(make_episodes(dict_obs=True))
    load_dataset("test/set-v0")
    other = load_dataset("test/set-v0", obs_keys=["achieved_goal"])
    assert other.spec.obs_dim == 2
    assert len(cache_files(tmp_path)) == 2


def test_a_changed_set_is_read_again_and_replaces_its_file(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "set.hdf5", flatten(make_episodes()))
    before = load_dataset(path)
    changed = flatten(make_episodes())
    changed["rewards"] = changed["rewards"] + 1  # same size, another time of writing
    write_hdf5(path, changed)
    os.utime(path, ns=(1, 1))
    after = load_dataset(path)
    torch.testing.assert_close(after.rew, before.rew + 1)
    assert len(cache_files(tmp_path)) == 1


def test_a_grown_minari_set_is_read_again() -> None:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    dataset = make_minari(make_episodes())
    assert len(load_dataset("test/set-v0")) == 22
    dataset.update_dataset_from_buffer([EpisodeBuffer(infos={}, **make_episodes()[0])])
    assert len(load_dataset("test/set-v0")) == 27


def test_a_filtered_dataset_has_a_cache_of_its_own() -> None:
    dataset = make_minari(make_episodes())
    assert len(load_dataset(dataset)) == 22
    terminated = dataset.filter_episodes(lambda episode: bool(episode.terminations[-1]))
    truncated = dataset.filter_episodes(lambda episode: bool(episode.truncations[-1]))
    for _ in range(2):
        assert load_dataset(terminated).episode_lengths.tolist() == [5, 4]
        assert load_dataset(truncated).episode_lengths.tolist() == [7, 6]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "older format"])
def test_a_damaged_cache_file_is_made_again_without_a_word(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_minari(make_episodes())
    with monkeypatch.context() as patch:
        if damage == "older format":
            patch.setattr("diffagents.data.transitions.FILE_FORMAT", 0)
        first = load_dataset("test/set-v0")
    (file,) = cache_files(tmp_path)
    good = file.read_bytes()
    bad = {"truncated": good[: len(good) // 2], "foreign": b"not ours" * 100, "empty": b"", "older format": good}[damage]
    file.write_bytes(bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(first, load_dataset("test/set-v0"))
    (file,) = cache_files(tmp_path)
    assert file.read_bytes() != bad
    Transitions.load(file)


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_minari(make_episodes())
    (tmp_path / "file").write_text("in the way of the folder")
    monkeypatch.setenv("DIFFAGENTS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="is not cached .*DIFFAGENTS_CACHE"):
        assert len(load_dataset("test/set-v0")) == 22


def test_cache_false_leaves_no_file(tmp_path: Path) -> None:
    make_minari(make_episodes())
    load_dataset("test/set-v0", cache=False)
    assert not cache_files(tmp_path)


def test_warnings_are_repeated_on_a_hit(tmp_path: Path) -> None:
    make_minari(make_episodes()[:1])
    for _ in range(2):
        with pytest.warns(UserWarning, match="test/set-v0: the data contain one episode"):
            load_dataset("test/set-v0")


def test_verbose_says_how_much_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    load_dataset(make_episodes(), verbose=1)
    assert "arrays: 22 transitions, 4 episodes, read in" in capsys.readouterr().out


def test_verbose_says_why_there_are_fewer_transitions_than_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Everything else speaks of the steps that were recorded."""
    flat = flatten(make_episodes(), with_next=False)
    ends = np.flatnonzero(flat["truncations"])
    n, cut = len(flat["rewards"]), len(ends)
    assert cut > 1
    data = load_dataset(flat, verbose=1)
    assert data.info["n_steps"] == n and len(data) == n - cut
    said = (
        f"arrays: {n - cut} transitions of {n} steps ({cut} episodes are cut, and their last steps lack the next observation), "
    )
    assert said in capsys.readouterr().out
    flat["truncations"][ends[1:]], flat["terminations"][ends[1:]] = False, True
    load_dataset(flat, verbose=1)
    said = f"{n - 1} transitions of {n} steps (1 episode is cut, and its last step lacks the next observation), "
    assert said in capsys.readouterr().out


def test_the_quick_reader_gives_what_minaris_iterator_gives() -> None:
    """All columns to the bit, in the set's dtypes, for Box and Dict observations and for a filtered part of a set."""
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    from diffagents.data.minari import read_episodes

    env = gymnasium.make("Pendulum-v1")
    rng = np.random.default_rng(3)
    for kind in ("box", "dict"):
        buffers = []
        for i, length in enumerate((3, 5, 2)):
            plain = rng.normal(size=(length + 1, 3))
            observations = plain if kind == "box" else {"z": plain.astype(np.float32), "a": rng.normal(size=(length + 1, 2))}
            ends = np.arange(length) == length - 1
            buffers.append(
                EpisodeBuffer(
                    id=i,
                    observations=observations,
                    actions=rng.uniform(-2, 2, (length, 1)).astype(np.float32),
                    rewards=rng.normal(size=length),
                    terminations=ends & (i == 1),
                    truncations=ends & (i != 1),
                    infos={"x": rng.normal(size=length + 1)},
                )
            )
        box = spaces.Box(-np.inf, np.inf, (3,))
        space = box if kind == "box" else spaces.Dict({"z": box, "a": spaces.Box(-np.inf, np.inf, (2,))})
        whole = minari.create_dataset_from_buffers(
            f"test/quick-{kind}-v0", buffers, env=env, observation_space=space, action_space=env.action_space
        )
        for dataset in (whole, whole.filter_episodes(lambda episode: len(episode.rewards) != 3)):
            ours = list(read_episodes(dataset.storage.data_path, dataset.episode_indices))
            theirs = list(dataset.iterate_episodes())
            assert len(ours) == len(theirs) > 0
            for one, other in zip(ours, theirs, strict=True):
                for name, column in one.items():
                    expected = getattr(other, name)
                    keys = list(expected) if isinstance(expected, dict) else []
                    for a, b in [(column[key], expected[key]) for key in keys] or [(column, expected)]:
                        assert a.dtype == b.dtype and np.array_equal(a, b), (kind, name)


def test_the_names_of_gymnasium_are_read() -> None:
    """`env.step` returns `terminated` and `truncated`."""
    episodes = make_episodes()
    arrays: dict[str, Any] = {
        name: np.concatenate([np.asarray(e[name])[: len(e["actions"])] for e in episodes])  # type: ignore[literal-required]
        for name in ("observations", "actions", "rewards", "terminations", "truncations")
    }
    ours = load_dataset(arrays)
    renamed = {"terminated": arrays.pop("terminations"), "truncated": arrays.pop("truncations")}
    theirs = load_dataset({**arrays, **renamed})
    assert theirs.info["sha256"] == ours.info["sha256"] and torch.equal(theirs.done, ours.done) and ours.done.any()


def test_a_key_that_looks_like_the_next_observations_is_named() -> None:
    (first, *_) = make_episodes()
    length = len(first["actions"])
    arrays: dict[str, Any] = {name: np.asarray(value)[:length] for name, value in first.items()}
    with pytest.warns(UserWarning, match="'next_observation' is not read; .* are called 'next_observations'"):
        load_dataset({**arrays, "next_observation": arrays["observations"]})
