"""Next observations are compared with the rows that follow: ends without a flag, shifted recordings, rows of a reset."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
from stable_baselines3 import SAC

from diffagents.data.load import load_dataset
from diffagents.envs.make import make_env

EPISODES, STEPS = 20, 10
ROWS = np.arange(EPISODES * STEPS)
LAST = ROWS % STEPS == STEPS - 1


def walks(**changes: Any) -> dict[str, Any]:
    """Episodes of a walk (episode, step) that all end by a time-out."""
    obs = np.stack([ROWS // STEPS, ROWS % STEPS], 1).astype(np.float32)
    data = {
        "observations": obs,
        "next_observations": obs + np.array([0, 1], np.float32),
        "actions": np.linspace(-1, 1, len(ROWS), dtype=np.float32)[:, None],
        "rewards": np.ones(len(ROWS)),
        "terminations": np.zeros(len(ROWS), bool),
        "truncations": LAST,
    }
    return {**data, **changes}


def said(data: Any, **kwargs: Any) -> tuple[Any, str]:
    """The data, and what was said about next observations and resets."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_dataset(data, **kwargs)
    texts = (str(warning.message) for warning in caught)
    return loaded, "\n".join(text for text in texts if "row" in text)


def test_right_data_are_silent() -> None:
    data, words = said(walks())
    assert data.info["n_episodes"] == EPISODES and len(data) == len(ROWS) and not words


def test_an_end_without_a_flag_is_found() -> None:
    """As in D4RL's replay sets, where some time-outs are not marked."""
    forgotten = LAST & (ROWS // STEPS % 4 == 1)
    data, words = said(walks(truncations=LAST & ~forgotten))
    assert data.info["n_episodes"] == EPISODES and len(data) == len(ROWS)
    assert data.info["mean_return"] == STEPS and not data.done.any()
    assert "5 rows lead to other observations than the next row has" in words and "first row 19" in words


def test_a_second_learn_of_sb3_begins_an_episode() -> None:
    """The second call resets the environment, and no flag in the buffer says so."""
    model = SAC("MlpPolicy", gymnasium.make("Pendulum-v1"), learning_starts=1000, buffer_size=500, seed=0, device="cpu")
    model.learn(30)
    model.learn(30)
    data, words = said(model.replay_buffer)
    assert data.episode_lengths.tolist() == [30, 30] and data.episode_ends.tolist() == [30, 60] and not words


@pytest.mark.parametrize("last", ["first", "its own"])
def test_a_recording_shifted_by_a_row_loses_its_time_outs(last: str) -> None:
    """next_observations = observations moved by one row: after a time-out that is the start of another episode."""
    obs = walks()["observations"]
    shifted = np.roll(obs, -1, axis=0)
    if last == "its own":
        shifted[-1] = obs[-1]
    data, words = said(walks(next_observations=shifted))
    assert len(data) == len(ROWS) - EPISODES and data.episode_lengths.tolist() == [STEPS] * EPISODES
    assert bool((data.next_obs[:, 0] == data.obs[:, 0]).all())
    assert "the next_observations of 20 time-outs are the observations of the row after them (first row 9)" in words


def test_after_a_termination_the_next_observation_may_be_anything() -> None:
    shifted = np.roll(walks()["observations"], -1, axis=0)
    data, words = said(walks(next_observations=shifted, terminations=LAST, truncations=np.zeros(len(ROWS), bool)))
    assert len(data) == len(ROWS) and not words
    missing = np.where(LAST[:, None], np.nan, shifted)
    data, words = said(walks(next_observations=missing, terminations=LAST, truncations=np.zeros(len(ROWS), bool)))
    assert len(data) == len(ROWS) and bool(data.next_obs.isfinite().all()) and not words
    with pytest.raises(ValueError, match="next_observations contains NaN or infinity in 20 of 200 rows, first at row 9"):
        load_dataset(walks(next_observations=missing))


def test_observations_that_never_change_are_no_evidence() -> None:
    same = np.zeros((len(ROWS), 2), np.float32)
    data, words = said(walks(observations=same, next_observations=same))
    assert len(data) == len(ROWS) and not words


@pytest.mark.parametrize("rewards", ["dense", "sparse"])
def test_the_rows_of_a_reset_are_left_out(rewards: str) -> None:
    """Gymnasium's vector environments make a step of each reset: from the last observation to the next episode's first."""
    envs = gymnasium.make_vec("Pendulum-v1", num_envs=1, max_episode_steps=STEPS)
    rng, obs = np.random.default_rng(0), envs.reset(seed=0)[0]
    rows: dict[str, list[Any]] = {name: [] for name in walks()}
    for _ in range(110):
        action = rng.uniform(-2, 2, (1, 1)).astype(np.float32)
        new, reward, terminated, truncated, _ = envs.step(action)
        reward = reward if rewards == "dense" else 0.0 * reward
        for name, value in zip(rows, (obs, new, action, reward, terminated, truncated), strict=True):
            rows[name].append(value[0])
        obs = new
    with make_env("Pendulum-v1") as env:
        data, words = said({name: np.array(values) for name, values in rows.items()}, env=env)
    assert data.episode_lengths.tolist() == [STEPS] * 10 and "10 rows lead from the last observation" in words
    assert "first row 10" in words
    left = 10 * (STEPS if rewards == "dense" else STEPS - 1)  # where all rewards are 0, the time-outs may be wrong, too
    assert len(data) == left and ("where they led was not recorded" in words) == (rewards == "sparse")
    speed = (data.next_obs[:, 2] - data.obs[:, 2]).abs().max()
    assert float(speed) < 2.0  # a reset jumps; one step of the pendulum does not


def test_episodes_may_have_next_observations() -> None:
    flat = walks()
    parts = [slice(i * STEPS, (i + 1) * STEPS) for i in range(EPISODES)]
    data, words = said([{name: flat[name][part] for name in flat} for part in parts])
    expected = load_dataset(flat)
    for column in ("obs", "next_obs", "action", "rew", "done", "episode_ends"):
        assert getattr(data, column).equal(getattr(expected, column)), column
    assert not words
    short = {**flat, "next_observations": flat["next_observations"][:-1]}
    with pytest.raises(ValueError, match="200 observations and 199 next_observations for 200 actions"):
        load_dataset([short])
    with pytest.raises(ValueError, match="the next observation of step 9 is not the observation of step 10"):
        load_dataset([{**flat, "truncations": np.zeros(len(ROWS), bool)}])


@pytest.mark.parametrize("seed", range(20))
def test_episodes_come_back_however_they_are_recorded(seed: int, tmp_path: Path) -> None:
    """Random episodes, some of whose time-outs nobody marked: rows, ends, returns and counts are theirs in every form."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 9, rng.integers(3, 9))
    dies = rng.random(len(lengths)) < 0.4
    dies[0] = False
    episodes = []
    for n, dead in zip(lengths, dies, strict=True):
        last = np.arange(n) == n - 1
        episodes.append(
            {
                "observations": rng.normal(size=(n + 1, 3)).astype(np.float32),
                "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
                "rewards": rng.normal(size=n),
                "terminations": last & dead,
                "truncations": last & ~dead,
            }
        )
    rest = ("actions", "rewards", "terminations", "truncations")
    flat = {name: np.concatenate([episode[name] for episode in episodes]) for name in rest}
    flat["observations"] = np.concatenate([episode["observations"][:-1] for episode in episodes])
    flat["next_observations"] = np.concatenate([episode["observations"][1:] for episode in episodes])
    marked = flat["truncations"] & (rng.random(len(flat["rewards"])) < 0.5)
    d4rl = {"terminations": "terminals", "truncations": "timeouts"}
    np.savez(tmp_path / "a.npz", **flat)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, value in flat.items():
            file[d4rl.get(name, name)] = value
    with_next = [{**e, "observations": e["observations"][:-1], "next_observations": e["observations"][1:]} for e in episodes]
    forms = {
        "episodes": episodes,
        "episodes with next observations": with_next,
        "flat": flat,
        "flat without some marks": {**flat, "truncations": marked},
        "flat without time-outs": {name: value for name, value in flat.items() if name != "truncations"},
        "npz": tmp_path / "a.npz",
        "hdf5": tmp_path / "a.hdf5",
    }
    for form, recorded in forms.items():
        data, _ = said(recorded, cache=False) if form == "hdf5" else said(recorded)
        assert data.episode_lengths.tolist() == lengths.tolist() and data.info["n_episodes"] == len(lengths), form
        assert data.episode_ends.tolist() == np.cumsum(lengths).tolist(), form
        np.testing.assert_allclose(
            data.episode_returns, [e["rewards"].sum() for e in episodes], rtol=1e-5, atol=1e-6, err_msg=form
        )
        for ours, theirs in (
            ("obs", "observations"),
            ("next_obs", "next_observations"),
            ("action", "actions"),
            ("rew", "rewards"),
        ):
            np.testing.assert_array_equal(getattr(data, ours), flat[theirs].astype(np.float32), err_msg=f"{form}: {ours}")
        np.testing.assert_array_equal(data.done, flat["terminations"], err_msg=form)
