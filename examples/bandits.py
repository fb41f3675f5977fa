"""Toy tasks with two-dimensional actions and a single state: data, rewards, an environment and measures of samples.

Six mixtures within about +-4 (Lu et al. 2023, arXiv:2304.12824, also in BDPO and SRPO's figures) and the noisy circle of
DiffCPS (arXiv:2310.05333). An episode is one action: the observation is always 0, every step terminates. The reward of a
point, its energy e, is in the units of the task, not scaled to [-1, 1]. The best policy at a temperature, p(a) exp(beta e),
is known: `resample` draws from it.

  agent = SRPO("MlpPolicy", Bandit("moons")).learn(dataset("moons", 10_000))
"""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch

Points = tuple[np.ndarray, np.ndarray]
Task = Callable[[int, np.random.Generator, bool], Points]
CIRCLE_STD = 0.05  # DiffCPS prints N(0, .05); taken as the standard deviation
N_CLEAN = 4096  # points that represent the curves of a task without noise


def points(name: str, n: int, seed: int = 0) -> Points:
    """Draw points of a task. The rare ones beyond the action bounds are clipped.

    Args:
        name: A key of TASKS.
        n: Number of points.
        seed: Seed of the points.

    Returns:
        Points (n, 2) and their rewards (n,), float32, in random order.

    Raises:
        ValueError: For an unknown name.
    """
    rng = np.random.default_rng(seed)
    xy, reward = _task(name)(n, rng, True)
    order = rng.permutation(n)
    return np.clip(xy, -bound(name), bound(name)).astype(np.float32)[order], reward.astype(np.float32)[order]


def bound(name: str) -> float:
    """Actions and data lie in [-bound, bound] in both dimensions."""
    return 1.25 if name == "circle" else 4.5


def dataset(name: str, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """`points` as one-step episodes, in arrays that `load_dataset` reads (with env=Bandit(name) for the bounds)."""
    xy, reward = points(name, n, seed)
    zeros = np.zeros((n, 1), np.float32)
    ends = np.ones(n, bool)
    return {"observations": zeros, "actions": xy, "rewards": reward, "terminations": ends, "truncations": ~ends}


def energy(name: str, xy: np.ndarray) -> np.ndarray:
    """The rewards of arbitrary actions, (n, 2) -> (n,).

    swissroll and checkerboard have closed forms. circle: 1 within 4 standard deviations of the circle, else 0. All others:
    the reward of the nearest point of the task without noise (a centre, ring, arm or moon), at any distance.
    """
    if name == "swissroll":
        return _swissroll_energy(xy)
    if name == "checkerboard":
        return _checkerboard_energy(xy)
    if name == "circle":
        return (np.abs(np.linalg.norm(xy, axis=-1) - 1.0) <= 4.0 * CIRCLE_STD).astype(float)
    clean, reward = _task(name)(N_CLEAN, np.random.default_rng(0), False)
    return reward[_pairwise(xy, clean).argmin(1).numpy()]


class Bandit(gym.Env[np.ndarray, np.ndarray]):
    """One state, one action, one reward, `energy`. Observation Box(-1, 1, (1,)), always 0; action Box(+-bound, (2,))."""

    def __init__(self, name: str) -> None:
        _task(name)
        self.name = name
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = gym.spaces.Box(-bound(name), bound(name), (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = energy(self.name, np.asarray(action)[None]).item()
        return np.zeros(1, np.float32), reward, True, False, {}


# ---- the optimum, and distances of samples from it --------------------------------------------------------------------


def resample(xy: np.ndarray, reward: np.ndarray, beta: float, n: int, seed: int = 0) -> np.ndarray:
    """Draw n of the points (m, 2) with replacement by softmax(beta reward): the best policy at temperature 1 / beta."""
    weight = np.exp(beta * (reward - reward.max()).astype(np.float64))
    return xy[np.random.default_rng(seed).choice(len(xy), n, p=weight / weight.sum())]


def measure(xy: np.ndarray, data: np.ndarray, near: float = 0.05, n_bins: int = 72, bandwidth: float = 0.1) -> dict[str, float]:
    """Compare actions with the data, in the units of the task.

    Args:
        xy: Actions, (n, 2).
        data: Data points, (m, 2).
        near: Distance below which an action counts as near (1e-8 in DiffCPS, which continuous samples never reach).
        n_bins: Number of angles around the origin.
        bandwidth: Standard deviation of the Gaussian kernels.

    Returns:
        distance: mean distance to the nearest data point. jaccard: share of near actions. coverage: share of the angles of
        the data that have a near action. log_density: mean log kernel density of the data.
    """
    apart = _pairwise(xy, data)
    nearest = apart.min(1).values.numpy()
    kernel = torch.logsumexp(-0.5 * (apart / bandwidth).square(), 1) - np.log(len(data) * 2 * np.pi * bandwidth**2)
    hit, there = (set(_angle_bins(points, n_bins)) for points in (xy[nearest < near], data))
    return {
        "distance": float(nearest.mean()),
        "jaccard": float((nearest < near).mean()),
        "coverage": len(hit & there) / len(there),
        "log_density": float(kernel.mean()),
    }


def _angle_bins(xy: np.ndarray, n_bins: int) -> np.ndarray:
    return np.floor((np.arctan2(xy[:, 1], xy[:, 0]) / (2 * np.pi) % 1.0) * n_bins).astype(int) % n_bins


def _pairwise(a: np.ndarray, b: np.ndarray) -> torch.Tensor:
    """Distances (n, m); not by a matrix product, whose float32 error exceeds the width of a line."""
    first, second = (torch.from_numpy(np.asarray(x, np.float32)) for x in (a, b))
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


# ---- the tasks: (n, generator, noise?) -> points and energies ------------------------------------------------------------


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"no toy task {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name]


def _gaussians(n: int, rng: np.random.Generator, noise: bool) -> Points:
    """Eight Gaussians at radius 4 / 1.414, counter-clockwise from the top; component k has reward k / 7."""
    k = rng.integers(8, size=n)
    angle = np.pi / 2 + k * np.pi / 4
    centre = 4.0 * np.stack([np.cos(angle), np.sin(angle)], -1)
    return (centre + noise * rng.normal(0, 0.5, (n, 2))) / 1.414, k / 7


def _swissroll(n: int, rng: np.random.Generator, noise: bool) -> Points:
    t = 1.5 * np.pi * (1.0 + 2.0 * rng.random(n))
    xy = (np.stack([t * np.cos(t), t * np.sin(t)], -1) + noise * rng.normal(0, 1, (n, 2))) / 5
    return xy, _swissroll_energy(xy)


def _swissroll_energy(xy: np.ndarray) -> np.ndarray:
    return np.square(xy).sum(-1) / 9.0  # may exceed 1 at the rim


def _checkerboard(n: int, rng: np.random.Generator, noise: bool) -> Points:
    """Uniform on the eight black squares, each 2 wide."""
    x = rng.uniform(-2, 2, n)
    y = rng.random(n) - 2.0 * rng.integers(2, size=n) + np.floor(x) % 2
    xy = 2.0 * np.stack([x, y], -1)
    return xy, _checkerboard_energy(xy)


def _checkerboard_energy(xy: np.ndarray) -> np.ndarray:
    x = xy[..., 0]
    return (((x > 0) & (x <= 2)) | (x <= -2)).astype(float)


def _spirals(n: int, rng: np.random.Generator, noise: bool) -> Points:
    """Two arms, the second one rotated by half a turn; the energy decreases outwards from 1 in the middle."""
    angle = np.sqrt(rng.random(n)) * 3.0 * np.pi
    shift = rng.uniform(0, 0.5, (n, 2)) if noise else 0.25
    arm = np.stack([-np.cos(angle), np.sin(angle)], -1) * angle[:, None] + shift
    arm = np.where(rng.random(n)[:, None] < 0.5, arm, -arm)
    return arm / 3.0 + noise * rng.normal(0, 0.1, (n, 2)), np.clip(1.0 - angle / 10.0, 0.0, 1.0)


def _rings(n: int, rng: np.random.Generator, noise: bool) -> Points:
    """Radii 3, 2.25, 1.5, .75 with as many points each, at even angles."""
    ring = np.arange(n) % 4
    radius, value = np.array([3.0, 2.25, 1.5, 0.75])[ring], np.array([0.667, 0.333, 1.0, 0.0])[ring]
    angle = 2 * np.pi * (np.arange(n) // 4) / max(1, -(-n // 4))
    xy = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return xy + noise * rng.normal(0, 0.08, (n, 2)), value


def _moons(n: int, rng: np.random.Generator, noise: bool) -> Points:
    """Two interleaving half circles; the lower one has reward 1."""
    lower = np.arange(n) % 2
    angle = np.pi * rng.random(n)
    x = np.where(lower, 1.0 - np.cos(angle), np.cos(angle))
    y = np.where(lower, 0.5 - np.sin(angle), np.sin(angle))
    xy = np.stack([x, y], -1) + noise * rng.normal(0, 0.1, (n, 2))
    return 2.0 * xy + np.array([-1.0, -0.2]), lower.astype(float)


def _circle(n: int, rng: np.random.Generator, noise: bool) -> Points:
    angle = 2 * np.pi * rng.random(n)
    return np.stack([np.cos(angle), np.sin(angle)], -1) + noise * rng.normal(0, CIRCLE_STD, (n, 2)), np.ones(n)


TASKS: dict[str, Task] = {
    "8gaussians": _gaussians,
    "swissroll": _swissroll,
    "checkerboard": _checkerboard,
    "2spirals": _spirals,
    "rings": _rings,
    "moons": _moons,
    "circle": _circle,
}
