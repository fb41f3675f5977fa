"""Environments as people write them: arrays that are reused, rewards of shape (1,), observations with texts and switches."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize
from toy import RandomEnv

import diffagents
from diffagents import TD3BC, load_dataset
from diffagents.envs.make import scalar_reward
from diffagents.evaluation.evaluate import evaluate
from diffagents.training import callbacks

TINY: dict[str, Any] = {"seed": 0, "verbose": 0, "device": "cpu", "policy_kwargs": {"net_arch": [16]}, "batch_size": 8}
KINDS = {
    "direction": spaces.Discrete(4),
    "flags": spaces.MultiBinary(3),
    "mask": spaces.Box(0, 1, (2,), bool),
    "mission": spaces.Text(20),
}


class Counter(gymnasium.Env[Any, Any]):
    """Observes (which environment, episode, step) in one array, which it goes on writing into."""

    observation_space, action_space = spaces.Box(-1e3, 1e3, (3,)), spaces.Box(0, 4, (1,))

    def __init__(self, which: int, length: int) -> None:
        self.which, self.length, self.episode, self.seen = which, length, -1, np.zeros(3, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode += 1
        self.seen[:] = self.which, self.episode, 0
        return self.seen, {}

    def step(self, action: Any) -> Any:
        self.seen[2] += 1
        return self.seen, self.seen[2:].copy(), False, self.seen[2] == self.length, {}  # a reward of shape (1,)


class Parts(RandomEnv):
    """Observes a vector and something that no agent reads."""

    def __init__(self, name: str) -> None:
        super().__init__(spaces.Dict({name: KINDS[name], "observation": spaces.Box(-1, 1, (3,))}), spaces.Box(-1, 1, (2,)))

    def reward(self, action: Any) -> Any:
        return np.abs(action[:1])  # of shape (1,)


def parts_data() -> dict[str, Any]:
    rng, n = np.random.default_rng(0), 40
    return {
        "observations": {"observation": rng.uniform(-1, 1, (n, 3))},
        "actions": rng.uniform(-1, 1, (n, 2)),
        "rewards": rng.normal(size=n),
        "terminations": np.zeros(n, bool),
        "truncations": np.arange(n) % 5 == 4,
    }


@pytest.mark.parametrize("ours", [True, False])
def test_an_environment_may_reuse_its_array(ours: bool) -> None:
    """The last observation of an episode is where it led, although the reset has written into the same array."""
    env: Any = Counter(2, 4) if ours else DummyVecEnv([lambda i=i: Counter(i, (5, 1, 4)[i]) for i in range(3)])  # type: ignore[misc]
    agent = TD3BC(env=env, **TINY).learn_online(60, learning_starts=58)
    assert agent.replay_buffer is not None
    rows = agent.replay_buffer.matrix[: len(agent.replay_buffer)].numpy()
    obs, rew, done, next_obs = rows[:, :3], rows[:, 4], rows[:, 5], rows[:, 6:]
    scale = agent.obs_normalizer.std.numpy()
    np.testing.assert_allclose(next_obs[:, :2], obs[:, :2], atol=1e-5)  # the same episode
    np.testing.assert_allclose((next_obs[:, 2] - obs[:, 2]) * scale[2], 1.0, rtol=1e-4)
    assert len(rows) == 60 and not done.any() and len(set(rew.tolist())) == (4 if ours else 5)


def test_attributes_still_reach_the_environment() -> None:
    """Curricula set them by `VecEnv.set_attr`, in the VecEnv that the agent was given."""
    env = DummyVecEnv([lambda: Counter(0, 4)])
    agent = TD3BC(env=env, **TINY)
    env.set_attr("length", 2)
    assert env.get_attr("length") == [2] and env.envs[0].unwrapped.length == 2
    agent.learn_online(12, learning_starts=11)
    assert env.envs[0].unwrapped.episode >= 5


def test_a_reward_may_be_an_array_with_one_number() -> None:
    env = Parts("flags")
    agent = TD3BC(obs_keys=("observation",), **TINY).learn(parts_data(), 4)
    assert 0.0 <= agent.evaluate(env, n_episodes=2).returns[0] <= 5.0
    agent.learn_online(12, env=env, learning_starts=8)
    for bad in (np.ones(2), "1", None, np.array([]), [1.0, 2.0]):
        with pytest.raises(ValueError, match="it must be one number"):
            scalar_reward(bad)
    assert scalar_reward(np.array([[2]])) == scalar_reward(np.float64(2)) == 2.0


def test_observations_in_other_units_are_noticed() -> None:
    """An agent knows the units of its data; a normalising wrapper shows it others."""
    rng, n = np.random.default_rng(0), 200
    data = {
        "observations": rng.normal(size=(n, 3)),
        "actions": rng.uniform(-2, 2, (n, 1)),
        "rewards": rng.normal(size=n),
        "terminations": np.zeros(n, bool),
        "truncations": np.arange(n) % 50 == 49,
    }
    agent = TD3BC(env="Pendulum-v1", **TINY).learn(data, 4)
    inside = gymnasium.wrappers.NormalizeObservation(gymnasium.make("Pendulum-v1"))
    vector = gymnasium.wrappers.vector.NormalizeObservation(gymnasium.make_vec("Pendulum-v1", num_envs=2))
    for env in (inside, vector):
        with pytest.warns(
            UserWarning, match=r"inside a NormalizeObservation, .* it sees observations in other units than it knows"
        ):
            agent.evaluate(env, n_episodes=1)
    with pytest.warns(UserWarning, match="inside a NormalizeObservation"):
        agent.clone().learn_online(10, env=inside, learning_starts=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*inside a")
        TD3BC(env=inside, **TINY).learn_online(10, learning_starts=8)  # it learns in these units


def normalized(**settings: bool) -> VecNormalize:
    """Pendulum inside a VecNormalize, and that inside another wrapper."""
    return VecMonitor(VecNormalize(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")]), **settings))  # type: ignore[return-value]


def test_a_vec_normalize_is_refused_wherever_an_agent_would_act_in_it(tmp_path: Path) -> None:
    """It shows another scale than that of the data, which SB3's replay buffer records without it."""
    agent = TD3BC(env="Pendulum-v1", **TINY)
    agent.save(tmp_path / "agent.zip")
    calls: list[Callable[[Any], Any]] = [
        lambda env: TD3BC(env=env, **TINY),
        agent.set_env,
        lambda env: agent.learn_online(10, env=env),
        lambda env: TD3BC.load(tmp_path / "agent.zip", env=env),
    ]
    refused = "inside a VecNormalize.*pass the environment without it, env.venv"
    for call in calls:
        for settings in ({}, {"norm_obs": False}, {"norm_reward": False}):
            with pytest.raises(ValueError, match=refused):
                call(normalized(**settings))
        call(normalized(norm_obs=False, norm_reward=False))
    with pytest.raises(ValueError, match=refused):
        agent.evaluate(normalized(norm_reward=False), n_episodes=1)
    with pytest.raises(ValueError, match=refused):
        callbacks.make_callback([EvalCallback(normalized(), verbose=0)], False)
    agent.evaluate(normalized(norm_obs=False), n_episodes=1)  # it reports the original rewards
    callbacks.make_callback([EvalCallback(normalized(norm_obs=False), verbose=0)], False)
    evaluate(SAC("MlpPolicy", normalized(), buffer_size=10), normalized(), 1)  # SB3's models have learned inside theirs


def test_a_vec_normalize_that_is_switched_on_later_is_refused_by_learn_online() -> None:
    env = VecNormalize(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")]), norm_obs=False, norm_reward=False)
    agent = TD3BC(env=env, **TINY)
    env.norm_reward = True
    with pytest.raises(ValueError, match="inside a VecNormalize"):
        agent.learn_online(10)


def test_the_buffer_of_a_model_inside_a_vec_normalize_has_the_original_units() -> None:
    env = VecNormalize(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")]))
    model = SAC("MlpPolicy", env, buffer_size=300, learning_starts=1000, seed=0).learn(250)
    data = load_dataset(model.replay_buffer)
    assert (data.obs[:, :2].square().sum(1) - 1).abs().max() < 1e-5  # cosine and sine


@pytest.mark.parametrize("name", KINDS)
def test_parts_of_an_observation_that_are_not_read_may_be_anything(name: str, tmp_path: Path) -> None:
    env = Parts(name)
    agent = TD3BC(env=env, obs_keys=("observation",), **TINY).learn(parts_data(), 5)
    returns = agent.evaluate(env, n_episodes=2).returns
    agent.save_pretrained(tmp_path / "folder")
    for path in (agent.save(tmp_path / "a"), tmp_path / "folder"):
        loaded = diffagents.load(path, verbose=0)
        assert list(loaded.observation_space) == ["observation"]
        assert loaded.evaluate(env, n_episodes=2).returns == returns
    agent.clone().learn_online(12, env=env, learning_starts=8)
