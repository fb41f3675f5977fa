"""Bad datasets stop at the door, each with one line that names the place and the cure."""

# ruff: noqa: E501  (a table is read by rows)

import io
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
from gymnasium import spaces

from diffagents.data.load import load_dataset

N = 20
Arrays = dict[str, Any]


def good() -> Arrays:
    """Two episodes of ten steps, obs 3, act 1 within Pendulum's bounds; the first terminates, the second is truncated."""
    rng = np.random.default_rng(0)
    step = np.arange(N)
    return {
        "observations": rng.standard_normal((N, 3)),
        "actions": rng.uniform(-2, 2, (N, 1)).astype(np.float32),
        "rewards": rng.standard_normal(N),
        "terminations": step == 9,
        "truncations": step == 19,
    }


def good_episode() -> Arrays:
    data = {key: value[:10] for key, value in good().items()}
    return data | {"observations": good()["observations"][:11]}


def but(**changes: Any) -> Arrays:
    """The good arrays with some replaced, or left out where the change is None."""
    return {key: value for key, value in {**good(), **changes}.items() if value is not None}


def put(name: str, index: Any, value: float) -> Arrays:
    data = good()
    data[name] = data[name].astype(np.float64)
    data[name][index] = value
    return data


def dict_obs(**parts: Any) -> Arrays:
    obs = {"observation": good()["observations"], "desired_goal": np.ones((N, 2)), **parts}
    return but(observations=obs)


def minari_set(tmp: Path, **changes: Any) -> str:
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    os.makedirs(os.environ["MINARI_DATASETS_PATH"], exist_ok=True)
    action_space = changes.pop("action_space", spaces.Box(-2, 2, (1,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            "bad/set-v0",
            [EpisodeBuffer(id=0, infos={}, **{**good_episode(), **changes})],
            observation_space=spaces.Box(-np.inf, np.inf, (3,), np.float64),
            action_space=action_space,
        )
    return "bad/set-v0"


def damaged_minari_set(tmp: Path) -> str:
    name = minari_set(tmp)
    (file,) = (tmp / "minari").rglob("main_data.hdf5")
    file.write_bytes(file.read_bytes()[:1000])
    return name


def minari_set_without_metadata(tmp: Path) -> str:
    name = minari_set(tmp)
    (file,) = (tmp / "minari").rglob("metadata.json")
    file.write_text(file.read_text()[:50])
    return name


def written(tmp: Path, name: str, content: bytes) -> Path:
    (tmp / name).write_bytes(content)
    return tmp / name


def npz(tmp: Path, data: Arrays) -> Path:
    np.savez(tmp / "set.npz", **data)
    return tmp / "set.npz"


def hdf5(tmp: Path, data: Arrays) -> Path:
    with h5py.File(tmp / "set.hdf5", "w") as file:
        for key, value in data.items():
            file[key] = value
    return tmp / "set.hdf5"


def inside_of_minari(tmp: Path) -> Path:
    minari_set(tmp)
    (file,) = (tmp / "minari").rglob("main_data.hdf5")
    return Path(file)


def buffer(handle: bool = True, scale: float = 1.0, n: int = N) -> Any:
    from stable_baselines3.common.buffers import ReplayBuffer

    made = ReplayBuffer(50, spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (1,)), "cpu", handle_timeout_termination=handle)
    for _ in range(n):
        obs = np.zeros((1, 3), np.float32)
        made.add(obs, obs, np.full((1, 1), scale, np.float32), np.ones(1), np.zeros(1), [{}])
    return made


class Discrete(gymnasium.Env[Any, Any]):
    observation_space = spaces.Box(-1, 1, (3,))
    action_space = spaces.Discrete(2)


IMAGE = np.zeros((N, 8, 8, 3), np.uint8)
RAGGED = [np.zeros(3)] * (N - 1) + [np.zeros(4)]
# what is wrong -> (the source, made in a folder; keyword arguments; the error; what its message must say: place, then cure)
CASES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], type[Exception], str]] = {
    # values
    "NaN in an observation": (lambda t: put("observations", (7, 1), np.nan), {}, ValueError,
                              r"observations contains NaN or infinity in 1 of 20 rows, first at row 7 \(episode 0, step 7\); drop"),
    "infinite reward": (lambda t: put("rewards", slice(12, 15), np.inf), {}, ValueError,
                        r"rewards contains .* in 3 of 20 rows, first at row 12 \(episode 1, step 2\); drop"),
    "NaN in an action": (lambda t: put("actions", 3, np.nan), {}, ValueError, r"actions contains .* row 3 .*; drop"),
    "too large for float32": (lambda t: put("observations", (4, 0), 1e300), {}, ValueError, r"observations .* row 4 .*drop"),
    "NaN in a next observation": (lambda t: but(next_observations=np.full((N, 3), np.nan)), {}, ValueError,
                                  r"next_observations contains .* in 19 of 20 rows, first at row 0 .*; drop"),
    "NaN in the last observation of an episode": (
        lambda t: [good_episode() | {"observations": np.r_[good()["observations"][:10], np.full((1, 3), np.nan)]}], {},
        ValueError, r"next_observations contains .* row 9 \(episode 0, step 9\); drop"),
    "action outside the bounds": (lambda t: put("actions", (13, 0), -2.6), {"env": "Pendulum-v1"}, ValueError,
                                  r"row 13 \(episode 1, step 3\): dimension 0 is -2.6, outside \[-2, 2\]; clip them with load_dataset\(\.\.\., clip_actions=True\)"),
    "Minari action outside the bounds": (lambda t: minari_set(t, actions=np.full((10, 1), 3.0)), {}, ValueError,
                                         r"in 10 of 10 rows, first at row 0 .* is 3, outside .*clip_actions=True"),
    "flag of 2": (lambda t: put("terminations", 5, 2.0), {}, ValueError, r"terminations is 2 at row 5; only 0 .* and 1"),
    "NaN flag": (lambda t: put("truncations", 6, np.nan), {}, ValueError, r"truncations is nan at row 6; only 0"),
    # shapes and lengths
    "a row too few": (lambda t: but(rewards=np.zeros(N - 1)), {}, ValueError,
                      r"disagree in length \(observations 20, actions 20, rewards 19, .*\); every array needs one row"),
    "one observation too many": (lambda t: but(observations=np.zeros((N + 1, 3))), {}, ValueError,
                                 r"observations 21, actions 20.* is one episode: pass a list of such dicts"),
    "parts of a dict disagree": (lambda t: dict_obs(desired_goal=np.ones((N - 2, 2))), {}, ValueError,
                                 r"parts of observations disagree in length .*'desired_goal': 18.*; every part"),
    "episode arrays disagree": (lambda t: [good_episode(), good_episode() | {"rewards": np.zeros(9)}], {}, ValueError,
                                r"episode 1 disagree in length .*rewards 9.*; every array"),
    "observations do not fit the episode": (lambda t: [good_episode() | {"observations": np.zeros((8, 3))}], {}, ValueError,
                                            r"episode 0 has 8 observations for 10 actions, expected 11: .* belongs to"),
    "two rewards a step": (lambda t: but(rewards=np.zeros((N, 2))), {}, ValueError,
                           r"rewards has shape \(20, 2\), expected \(N,\): one number per step"),
    "observations without a dimension": (lambda t: but(observations=np.zeros(N)), {}, ValueError,
                                         r"observations has shape \(20,\), expected \(N, D\); .*array\[:, None\]"),
    "actions without a dimension": (lambda t: but(actions=np.zeros(N)), {}, ValueError,
                                    r"actions has shape \(20,\), expected \(N, D\); .*array\[:, None\]"),
    "ragged rows": (lambda t: but(observations=RAGGED), {}, ValueError, r"observations is not an array .*; every row must have the same shape"),
    "images": (lambda t: but(observations=IMAGE), {}, ValueError, r"looks like an image, but only vectors .*; encode it as a vector"),
    # dtypes
    "strings": (lambda t: but(rewards=np.full(N, "1.0")), {}, TypeError, r"rewards has dtype <U3.*; convert it to float32"),
    "objects": (lambda t: but(observations=np.full((N, 3), None)), {}, TypeError, r"observations has dtype object.*; convert"),
    "complex numbers": (lambda t: but(actions=np.full((N, 1), 1j)), {}, TypeError, r"actions has dtype complex128.*real part"),
    "integer actions": (lambda t: but(actions=np.zeros((N, 1), np.int64)), {}, TypeError,
                        r"actions has dtype int64: .* suggest discrete actions, .*astype\('float32'\)"),
    # missing or ambiguous
    "no rewards": (lambda t: but(rewards=None), {}, ValueError, r"lacks rewards; it has observations, actions"),
    "no arrays": (lambda t: {}, {}, ValueError, r"lacks observations, actions, rewards, terminations; it has nothing"),
    "no terminations": (lambda t: but(terminations=None), {}, ValueError, r"has no terminations .*pass zeros if there are none"),
    "no truncations": (lambda t: but(truncations=None), {}, ValueError,
                       r"no truncations \(D4RL: timeouts\).*; pass zeros .*or next_observations, or env= with a time limit"),
    "dones beside terminated, which is read": (
        lambda t: but(terminations=None, dones=np.ones(N), terminated=np.zeros(N), actions=np.full((N, 1), 9.0)),
        {"env": "Pendulum-v1"}, ValueError, r"dimension 0 is 9, outside"),
    "dones": (lambda t: but(terminations=None, truncations=None, dones=np.zeros(N)), {}, ValueError,
              r"has 'dones', which may be time-outs; pass terminations and truncations"),
    "OGBench masks": (lambda t: but(terminations=None, terminals=np.zeros(N), masks=np.ones(N)), {}, ValueError,
                      r"'masks' next to 'terminals' .*, or pass terminations=1 - masks"),
    "OGBench without rewards": (lambda t: {"observations": np.ones((N, 3)), "actions": np.ones((N, 2)), "terminals": np.zeros(N),
                      "qpos": np.ones((N, 5))}, {}, ValueError, r"layout of OGBench, without rewards and masks, .*-singletask-v0"),
    "episode_ends fall": (lambda t: but(truncations=None, episode_ends=np.array([12, 10, 20])), {}, ValueError,
                          r"episode_ends must rise strictly up to the number of steps, 20; pass one past"),
    "episode without actions": (lambda t: [good_episode(), {"observations": np.zeros((2, 3))}], {}, ValueError,
                                r"episode 1 lacks actions, rewards, terminations; it has observations"),
    "terminations beside other terminals": (lambda t: but(terminals=np.zeros(N)), {}, ValueError,
                                            r"'terminals' next to 'terminations', .* and they differ; leave one out"),
    "truncations beside other timeouts": (lambda t: [good_episode() | {"timeouts": np.eye(10)[9]}], {}, ValueError,
                                          r"episode 0 has 'timeouts' next to 'truncations', .* differ; leave one out"),
    "an episode that goes on after a termination": (
        lambda t: [good_episode(), good_episode() | {"terminations": np.eye(10)[3]}], {}, ValueError,
        r"episode 1 continues after step 3 of 10, where terminations is true.*; cut it after that step, or pass flat arrays"),
    "an episode that goes on after a truncation": (
        lambda t: [good_episode() | {"truncations": np.eye(10)[0]}], {}, ValueError,
        r"episode 0 continues after step 0 of 10, where truncations is true.*; cut it"),
    "an episode with next observations": (
        lambda t: [good_episode() | {"next_observations": np.ones((10, 3))}], {}, ValueError,
        r"episode 0: the next observation of step 0 is not the observation of step 1; end the episode there, or leave"),
    # empty
    "no steps": (lambda t: {key: value[:0] for key, value in good().items()}, {}, ValueError, r"are empty \(0 steps\), .*; check"),
    "no episodes": (lambda t: [], {}, ValueError, r"arrays is empty \(no episode\), .*; check"),
    "episodes of one truncated step": (
        lambda t: but(terminations=np.zeros(N), truncations=np.ones(N)), {}, ValueError,
        r"every episode is a single truncated step, .*; pass next_observations"),
    "empty replay buffer": (lambda t: buffer(n=0), {}, ValueError, r"are empty \(0 steps\), .*; check"),
    # spaces and environments
    "env of another task": (lambda t: good(), {"env": "MountainCarContinuous-v0"}, ValueError,
                            r"observations are \(3,\) in the data, but \(2,\) in env; pass the environment"),
    "env with other actions": (lambda t: but(actions=np.zeros((N, 2))), {"env": "Pendulum-v1"}, ValueError,
                               r"actions have shape \(2,\) in the data, but \(1,\) in env; pass the environment"),
    "env with other bounds": (lambda t: minari_set(t, action_space=spaces.Box(-3, 3, (1,))), {"env": "Pendulum-v1"}, ValueError,
                              r"bounds are \[-3, 3\] in the data, but \[-2, 2\] in env; pass the environment"),
    "discrete env": (lambda t: good(), {"env": Discrete()}, ValueError, r"action space Discrete\(2\) is not a Box: .*wrap"),
    "discrete Minari set": (lambda t: minari_set(t, actions=np.zeros(10, int), action_space=spaces.Discrete(2)), {}, ValueError,
                            r"action space Discrete\(2\) is not a Box: .*wrap"),
    "unknown env": (lambda t: good(), {"env": "Pendulum-v99"}, ValueError, r"Pendulum-v99.*(check|use)"),
    "env is no environment": (lambda t: good(), {"env": 3}, TypeError, r"env is a int; pass an environment id"),
    "unknown obs key": (lambda t: dict_obs(), {"obs_keys": ["observation", "goal"]}, ValueError,
                        r"obs_keys names 'goal', but the observation has .*'desired_goal'"),
    "obs_keys for an array": (lambda t: good(), {"obs_keys": ["observation"]}, ValueError,
                              r"obs_keys=\('observation',\) needs a Dict"),
    "obs_keys a string": (lambda t: dict_obs(), {"obs_keys": "observation"}, TypeError,
                          r"obs_keys='observation' is a string, .*; pass obs_keys=\('observation',\)$"),
    "a key is missing in a later episode": (
        lambda t: [good_episode() | {"observations": obs} for obs in ({"a": np.ones((11, 1))}, {"b": np.ones((11, 1))})], {},
        ValueError, r"episode 1 observations lacks the keys \['a'\]; it has \['b'\]; choose"),
    # Transitions
    "other obs_keys for Transitions": (
        lambda t: load_dataset(dict_obs()), {"obs_keys": ["desired_goal"]}, ValueError,
        r"read with obs_keys=\('observation', 'desired_goal'\), which obs_keys=\('desired_goal',\) cannot .*; read the source again"),
    "obs_keys for Transitions of an array": (lambda t: load_dataset(good()), {"obs_keys": ["a"]}, ValueError,
                                             r"read with obs_keys=None, which .*; read the source again"),
    "Transitions and env of another task": (
        lambda t: load_dataset(good()), {"env": "MountainCarContinuous-v0"}, ValueError,
        r"observations are \(3,\) in the data, but \(2,\) in env; pass the environment"),
    "Transitions outside the bounds of env": (
        lambda t: load_dataset(put("actions", (13, 0), -2.6)), {"env": "Pendulum-v1"}, ValueError,
        r"row 13 \(episode 1, step 3\): dimension 0 is -2.6, outside \[-2, 2\]; clip them with load_dataset\(\.\.\., clip_actions=True\)"),
    # files and ids
    "missing file": (lambda t: t / "none.npz", {}, FileNotFoundError, r"none.npz does not exist; pass the path"),
    "a folder": (lambda t: t, {}, FileNotFoundError, r"is a folder; pass the path of an .npz or .hdf5 file, or a Minari id"),
    "file of another kind": (lambda t: written(t, "set.txt", b"1,2"), {}, ValueError, r"set.txt ends in '.txt'; only .npz"),
    "npz that is none": (lambda t: written(t, "set.npz", b"no zip"), {}, ValueError, r"set.npz cannot be read .*; write it with"),
    "npz that is a pickle": (lambda t: written(t, "set.npz", pickle.dumps(good())), {}, ValueError, r"set.npz cannot .*; write it"),
    "npz of objects": (lambda t: npz(t, but(rewards=np.full(N, None))), {}, ValueError, r"set.npz cannot be read .*; write it"),
    "cut npz": (lambda t: written(t, "set.npz", cut_npz()), {}, ValueError, r"set.npz cannot be read .*; write it with"),
    "hdf5 that is none": (lambda t: written(t, "set.hdf5", b"no hdf5"), {}, ValueError, r"set.hdf5 cannot be read as an HDF5 file"),
    "hdf5 without rewards": (lambda t: hdf5(t, but(rewards=None)), {}, ValueError, r"lacks rewards; it has actions, observ.*; BC and .* pass zeros"),
    "the file inside a Minari set": (inside_of_minari, {}, ValueError, r"inside of a Minari set: pass the set's id"),
    "two names of ends that differ": (lambda t: but(terminated=np.ones(N, bool)), {"env": "Pendulum-v1"}, ValueError,
                                      r"'term\w+' next to 'term\w+', two names of the same thing, and they differ"),
    "the folder of a Minari set": (lambda t: str(t / "minari" / minari_set(t)), {}, ValueError,
                                   r"is the folder of a Minari set: pass its id, 'bad/set-v0', .* of all sets, .*minari, in the env"),
    "the folder inside it, as a Path": (lambda t: t / "minari" / minari_set(t) / "data", {}, ValueError, r"pass its id, 'bad/set-v0'"),
    "malformed id": (lambda t: "hopper medium", {}, ValueError, r"'hopper medium' is neither a Minari id, .*namespace/name-v0"),
    "id without a version": (lambda t: "mujoco/hopper/medium", {}, ValueError, r"neither a Minari id, which looks like"),
    "id that is not here": (lambda t: "some/set-v0", {"download": False}, FileNotFoundError,
                            r"there is no Minari set 'some/set-v0' in .*; pass download=True, or set MINARI_DATASETS_PATH"),
    "damaged Minari set": (damaged_minari_set, {}, OSError, r"'bad/set-v0' in .* is damaged .*; delete the folder"),
    "damaged Minari metadata": (minari_set_without_metadata, {}, OSError, r"metadata.json is damaged .*; delete the folder"),
    # replay buffers and the rest
    "buffer that mixes time-outs": (lambda t: buffer(handle=False), {}, ValueError, r"handle_timeout_termination=False.*; pass env="),
    "buffer in units of the environment": (lambda t: buffer(scale=1.7), {}, ValueError,
                                           r"contains an action of 1.7, but .*; if yours .* pass a dict of arrays"),
    "a data frame or the like": (lambda t: io.BytesIO(), {}, TypeError, r"from BytesIO; accepted are a Minari id, .*ReplayBuffer"),
    "a list of tuples": (lambda t: [(1, 2)], {}, TypeError, r"from list; accepted are .*a list of episode dicts"),
    "nothing": (lambda t: None, {}, TypeError, r"^there is no dataset: agents learn from recorded data"),
}  # fmt: skip


def cut_npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, **good())
    return file.getvalue()[:-200]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFAGENTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


def test_the_good_data_are_good() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_dataset(good(), env="Pendulum-v1")) == N - 1
        assert len(load_dataset([good_episode(), good_episode()], env="Pendulum-v1")) == N
    with pytest.warns(UserWarning, match="the reward is always 1"):
        assert len(load_dataset(buffer(), env="Pendulum-v1")) == N


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_bad_data_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, kwargs, kind, message = CASES[case]
    source = make(tmp_path)
    with pytest.raises(kind, match=message) as raised:
        load_dataset(source, **kwargs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rewards": np.ones(N), "terminations": np.zeros(N)},
            r"reward is always 1 and no episode terminates: only behaviour cloning",
        ),
        ({"terminations": np.zeros(N), "truncations": np.zeros(N)}, r"contain one episode: .* ends are missing"),
        ({"observations": good()["observations"] * 200}, r"observation dimension \d has a std of .*normalize_obs=True"),
    ],
)
def test_doubtful_data_get_a_warning_of_one_line(changes: Arrays, message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        load_dataset(but(**changes), env="Pendulum-v1")
    assert all("\n" not in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "OfflineMode"),
        pytest.param(  # the hub's client tries again for half a minute
            {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}, "Connection refused", marks=pytest.mark.slow
        ),
    ],
)
def test_a_download_without_network_ends_in_one_line(settings: dict[str, str], cause: str) -> None:
    code = "from diffagents.data.load import load_dataset; load_dataset('hf://someone/some/set-v0')"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **settings}, check=False,
        cwd=Path(__file__).resolve().parents[2], timeout=120,
    )  # fmt: skip
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: cannot download 'some/set-v0' from hf://someone"), found.stderr
    assert cause in last
    assert "check the network" in last
    assert "another exception" not in found.stderr  # no wall of chained tracebacks
