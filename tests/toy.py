"""A small dataset with real structure for tests that need any: one-step choices on a line."""

from typing import Any

import numpy as np


def line_data(n: int = 400, obs_dim: int = 3, act_dim: int = 2, seed: int = 0, horizon: int = 10) -> dict[str, Any]:
    """Random walks of `horizon` steps, actions in [-1, 1], reward highest at action = 0.5; every third episode terminates."""
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (n, act_dim)).astype(np.float32)
    end = np.arange(n) % horizon == horizon - 1
    dies = end & (np.arange(n) // horizon % 3 == 0)
    return {
        "observations": rng.normal(size=(n, obs_dim)).astype(np.float32),
        "actions": action,
        "rewards": (-((action - 0.5) ** 2).sum(-1)).astype(np.float32),
        "next_observations": rng.normal(size=(n, obs_dim)).astype(np.float32),
        "terminations": dies,
        "truncations": end & ~dies,
    }
