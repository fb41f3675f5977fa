"""Every verb on every kind of space that `learn` accepts: what works at the start works at the end, too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import CheckpointCallback
from toy import RandomEnv

import diffagents
from diffagents import TD3BC
from diffagents.types import Spec

VECTOR, BOUNDED = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1.0, 1.0, (2,))
OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "float32": VECTOR,
    "float64": spaces.Box(-np.inf, np.inf, (3,), np.float64),
    "float16": spaces.Box(-1, 1, (3,), np.float16),
    "matrix": spaces.Box(-1, 1, (2, 3)),
    "number": spaces.Box(-1, 1, ()),
    "int64": spaces.Box(-5, 5, (3,), np.int64),
    "int8": spaces.Box(0, 1, (3,), np.int8),
    "uint8": spaces.Box(0, 255, (3,), np.uint8),
    "bool": spaces.Box(0, 1, (3,), bool),
    "dict": spaces.Dict({"b": spaces.Box(-1, 1, (2,)), "a": spaces.Box(-1, 1, (1,), np.float64)}),
    "dict with others": spaces.Dict(
        {"observation": VECTOR, "achieved_goal": VECTOR, "desired_goal": VECTOR, "n": spaces.Discrete(3)}
    ),
    "flags": spaces.MultiBinary(3),
    "direction": spaces.Discrete(4),
    "picture": spaces.Box(0, 255, (8, 8, 3), np.uint8),
    "nested dict": spaces.Dict({"inner": spaces.Dict({"a": VECTOR})}),
}
ACTIONS: dict[str, spaces.Space[Any]] = {
    "float32": BOUNDED,
    "float64": spaces.Box(-2.0, 3.0, (2,), np.float64),
    "matrix": spaces.Box(-1, 1, (2, 2)),
    "number": spaces.Box(-1, 1, ()),
    "int64": spaces.Box(0, 10, (2,), np.int64),
    "uint8": spaces.Box(0, 255, (1,), np.uint8),
    "different bounds": spaces.Box(np.array([-1, 0], np.float32), np.array([1, 9], np.float32)),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,)),
    "discrete": spaces.Discrete(3),
}
CASES = [(name, "float32") for name in OBSERVATIONS] + [("float32", name) for name in ACTIONS if name != "float32"]


def world(observation: str, action: str) -> RandomEnv:
    return RandomEnv(OBSERVATIONS[observation], ACTIONS[action])


def recorded(env: RandomEnv, n: int = 40) -> dict[str, Any]:
    rows = [env.observation_space.sample() for _ in range(n)]
    obs = {key: np.stack([row[key] for row in rows]) for key in rows[0]} if isinstance(rows[0], dict) else np.stack(rows)
    return {
        "observations": obs,
        "actions": np.stack([env.action_space.sample() for _ in range(n)]),
        "rewards": np.arange(float(n)),
        "terminations": np.zeros(n, bool),
        "truncations": np.arange(n) % 5 == 4,
    }


def accepted(env: RandomEnv) -> bool:
    try:
        Spec.from_spaces(env.observation_space, env.action_space)
    except ValueError:
        return False
    return True


def test_the_table_has_both_kinds() -> None:
    refused = {case for case in CASES if not accepted(world(*case))}
    assert refused == {
        *((name, "float32") for name in ("bool", "flags", "direction", "picture", "nested dict")),
        *(("float32", name) for name in ("unbounded", "discrete")),
    }


@pytest.mark.parametrize(("observation", "action"), CASES)
def test_every_verb_on_every_space(observation: str, action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A space is refused before any work; if it is accepted, everything that can be done with an agent works."""
    monkeypatch.chdir(tmp_path)
    env = world(observation, action)
    settings: dict[str, Any] = {"env": env, "seed": 0, "verbose": 0, "device": "cpu", "batch_size": 8}
    if not accepted(env):
        with pytest.raises((ValueError, NotImplementedError), match=r"Box|image|bounds|[Nn]ested"):
            TD3BC(**settings)
        return
    agent = TD3BC(policy_kwargs={"net_arch": [8]}, **settings)
    agent.learn(recorded(env), 6, callback=CheckpointCallback(3, str(tmp_path), "step"))
    obs, _ = env.reset(seed=1)
    act = agent.predict(obs)[0]
    assert env.action_space.contains(act)
    agent.save_pretrained(tmp_path / "folder", include_trainer_state=True)
    exported = agent.export(tmp_path / "policy", format="torch_export")
    loaded = [diffagents.load(path, verbose=0) for path in (agent.save(tmp_path / "a"), tmp_path / "folder", "step_6_steps")]
    returns = agent.evaluate(env, n_episodes=2).returns
    for other in (*loaded, agent.clone()):
        np.testing.assert_array_equal(other.predict(obs)[0], act)
        assert other.evaluate(env, n_episodes=2).returns == returns
        assert other.predict(obs)[0].dtype == env.action_space.dtype
    agent.learn_online(12, learning_starts=8)
    agent.load_replay_buffer(agent.save_replay_buffer(tmp_path / "buffer"))
    agent.learn_online(12, learning_starts=8)
    diffagents.load(agent.save(tmp_path / "b"), env=env, verbose=0).learn_online(8, learning_starts=4)
    assert exported.is_file()


@pytest.mark.parametrize(("observation", "action"), [("number", "float32"), ("float32", "number"), ("float32", "int64")])
@pytest.mark.parametrize("form", ["npz", "episodes"])
def test_files_and_episodes_of_such_spaces(observation: str, action: str, form: str, tmp_path: Path) -> None:
    """Numbers without an axis and integer actions are read where env= says that they are meant so."""
    env = world(observation, action)
    data = recorded(env)
    source: Any = [
        {
            **{name: value[start : start + 5] for name, value in data.items()},
            "observations": data["observations"][np.arange(start, start + 6) % 40],
        }
        for start in range(0, 40, 5)
    ]
    if form == "npz":
        np.savez(source := tmp_path / "data.npz", **data)
    read = diffagents.load_dataset(source, env=env)
    kept = np.arange(40) if form == "episodes" else np.flatnonzero(~data["truncations"])  # without next observations
    np.testing.assert_allclose(read.action.numpy(), data["actions"][kept].reshape(len(kept), -1), rtol=1e-6)
    np.testing.assert_allclose(read.obs.numpy(), data["observations"][kept].reshape(len(kept), -1), rtol=1e-6)
    with pytest.raises((TypeError, ValueError), match=r"integers suggest|for one dimension pass"):
        diffagents.load_dataset(source)
