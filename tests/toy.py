"""A small dataset with real structure for tests that need any: one-step choices on a line."""

from typing import Any

import gymnasium
import numpy as np


def line_data(n: int = 400, obs_dim: int = 3, act_dim: int = 2, seed: int = 0, horizon: int = 10) -> dict[str, Any]:
    """Random episodes of `horizon` steps; the reward is highest at action = 0.5, and every third episode terminates."""
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (n, act_dim)).astype(np.float32)
    end = np.arange(n) % horizon == horizon - 1
    dies = end & (np.arange(n) // horizon % 3 == 0)
    obs, next_obs = rng.normal(size=(2, n, obs_dim)).astype(np.float32)
    next_obs[:-1] = np.where(end[:-1, None], next_obs[:-1], obs[1:])
    return {
        "observations": obs,
        "actions": action,
        "rewards": (-((action - 0.5) ** 2).sum(-1)).astype(np.float32),
        "next_observations": next_obs,
        "terminations": dies,
        "truncations": end & ~dies,
    }


class RandomEnv(gymnasium.Env[Any, Any]):
    """Episodes of five steps with random observations; the reward is a number or an array, whatever `reward` returns."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reward(self, action: Any) -> Any:
        return float(np.sum(action))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), (action, self.action_space)
        self.t += 1
        return self.observation_space.sample(), self.reward(action), False, self.t == 5, {}
