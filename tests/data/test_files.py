"""Files of other projects: robomimic's, and those that cannot be read, which get a way instead."""

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from diffagents import BC
from diffagents.data.load import load_dataset
from diffagents.errors import ArtifactError

STEPS = 12


def robomimic(path: Path, **changes: Any) -> Path:
    """A low-dimensional file of 11 demonstrations, of which the last does not succeed."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift"})
        for i in range(11):
            demo = data.create_group(f"demo_{i}")
            last = np.eye(1, STEPS, STEPS - 1)[0]
            parts = {
                "actions": rng.uniform(-1, 1, (STEPS, 7)),
                "rewards": last * (i < 10),
                "dones": last.astype(int),
                "states": rng.normal(size=(STEPS, 32)),
            }
            seen = {
                "object": np.full((STEPS + 1, 2), i) + np.arange(STEPS + 1)[:, None] / 100,
                "pos": rng.normal(size=(STEPS + 1, 3)),
            }
            for name, value in {**parts, **changes}.items():
                if value is not None:
                    demo[name] = value
            for name, rows in (("obs", slice(None, -1)), ("next_obs", slice(1, None))):
                for key, value in seen.items():
                    demo.create_group(name) if name not in demo else None
                    demo[name][key] = value[rows]
        file.create_group("mask")["train"] = np.array([b"demo_0", b"demo_1"])
    return path


@pytest.mark.parametrize("cache", [True, False])
def test_robomimics_demonstrations(tmp_path: Path, cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFAGENTS_CACHE", str(tmp_path / "cache"))
    path = robomimic(tmp_path / "low_dim.hdf5")
    for _ in range(2):
        data = load_dataset(path, cache=cache)
        assert data.episode_lengths.tolist() == [STEPS] * 11 and len(data) == 11 * STEPS
        assert data.spec.obs_keys == ("object", "pos") and data.spec.act_dim == 7
        assert data.obs[::STEPS, 0].tolist() == list(range(11))  # demo_10 comes last, not after demo_1
        np.testing.assert_allclose(data.next_obs[:, 0] - data.obs[:, 0], 0.01, atol=1e-5)
        assert data.done.nonzero().flatten().tolist() == [
            i * STEPS + STEPS - 1 for i in range(10)
        ]  # the last one did not succeed
    assert load_dataset(path, obs_keys=("pos",), cache=cache).spec.obs_dim == 3


def test_bad_robomimic_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = robomimic(tmp_path / "a.hdf5", rewards=None)
    with pytest.raises(ValueError, match=r"a.hdf5: data/demo_0 lacks \['rewards'\]: make the file"):
        load_dataset(path, cache=False)
    with pytest.raises(ValueError, match=r"data/demo_0/obs lacks the keys \['eye'\]; it has \['object', 'pos'\]"):
        load_dataset(robomimic(tmp_path / "b.hdf5"), obs_keys=("eye",), cache=False)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("a.parquet", r"pandas.read_parquet"),
        ("a.csv", r"pandas.read_csv"),
        ("a.zarr", r"zarr.open"),
        ("a.pt", r"torch.load\(path, weights_only=True\)"),
        ("a.pkl", r"a pickle can run code when it is opened, .*save_util\.load_from_pkl\('a.pkl'\)$"),
    ],
)
def test_a_foreign_file_gets_a_way(name: str, way: str) -> None:
    for source in (name, Path(name), name.upper()):
        with pytest.raises(ValueError, match=re.compile(way, re.IGNORECASE)):
            load_dataset(source)


def test_the_way_of_a_pickled_replay_buffer_of_sb3_is_one_that_works(tmp_path: Path) -> None:
    """For the data of `learn`, and where SB3 would load the buffer into the model."""
    from stable_baselines3 import TD3

    model = TD3("MlpPolicy", "Pendulum-v1", buffer_size=300, learning_starts=1000, seed=0).learn(250)
    model.save_replay_buffer(tmp_path / "buffer")
    path = tmp_path / "buffer.pkl"
    with pytest.raises(ValueError, match="is no file that can be read here") as refused:
        load_dataset(path)
    module, _, call = str(refused.value).rpartition("SB3 saved is ")[2].rpartition(".load_from_pkl")
    assert len(load_dataset(importlib.import_module(module).load_from_pkl(ast.literal_eval(call)))) == 250
    agent = BC(env="Pendulum-v1", verbose=0, device="cpu", policy_kwargs={"net_arch": [8]})
    with pytest.raises(ArtifactError, match=r"is a pickle, as SB3 saves replay buffers, .*load_from_pkl\(.*\) as dataset="):
        agent.load_replay_buffer(path)
    with pytest.raises(FileNotFoundError, match="there is no replay buffer"):
        agent.load_replay_buffer(tmp_path / "none.pkl")


@pytest.mark.parametrize(
    ("name", "relative"),
    [
        ("hopper-medium-v2", "mujoco/hopper/medium-v0"),
        ("antmaze-umaze-diverse-v2", "D4RL/antmaze/umaze-diverse-v1"),
        ("maze2d-umaze-v1", "D4RL/pointmaze/umaze-v2"),
        ("pen-human-v1", "D4RL/pen/human-v2"),
        ("kitchen-mixed-v0", "D4RL/kitchen/mixed-v2"),
    ],
)
def test_a_name_of_d4rl_hints_at_minari(name: str, relative: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{name!r} is a name of D4RL; .* as {relative!r}"):
        load_dataset(name)


def test_a_name_without_a_relative_is_looked_for_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for name in ("hopper-medium-replay-v2", "my-set-v0"):
        with pytest.raises(FileNotFoundError, match=f"there is no Minari set {name!r}"):
            load_dataset(name, download=False)


def test_what_float32_rounds_away_is_said() -> None:
    """Positions in metres of a map grid: 4.5 million with steps of centimetres."""
    rng, n = np.random.default_rng(0), 400
    x = 4_500_000.0 + np.cumsum(rng.uniform(0.01, 0.1, n + 1))
    rest = {"actions": rng.uniform(-1, 1, (n, 1)), "rewards": np.diff(x), "terminations": np.zeros(n, bool)}
    flat = {**rest, "observations": {"position": x[:-1, None]}, "truncations": np.arange(n) == n - 1}
    for data, name in (
        ([{**rest, "observations": x[:, None]}], "observation dimension 0"),
        (flat, "observation 'position' dimension 0"),
    ):
        with pytest.warns(UserWarning, match=f"{name} reaches 4.5e.06, where float32, .* subtract a constant"):
            load_dataset(data)
    near = load_dataset([{**rest, "observations": (x - x.mean())[:, None]}])
    assert not any("float32" in text for text in near.info["warnings"])
    assert bool((near.obs != near.next_obs).all())
