"""The behaviour policies of the recipes: published networks as arrays, and planners for mazes.

Each is a callable, observation -> action in the environment's units (not yet clipped), with a seeded generator of its own. The
arrays are in `policies/`; the README there says who trained them.
"""

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Cell = tuple[int, int]  # (row, column) of a maze


class Portable:
    """A policy whose actions are rounded to four decimals, so that the same seed gives the same data on other processors.

    The last bits of a matrix product or an exponential depend on the instructions that a processor has, and in a chaotic
    system such as a walking robot they decide where it is a second later.
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def reset(self) -> None:
        """Reset the policy, if it has something to reset, before every episode."""
        if hasattr(self.policy, "reset"):
            self.policy.reset()

    def __call__(self, obs: Any) -> np.ndarray:
        """The policy's action, rounded."""
        return np.round(self.policy(obs), 4)


class Network:
    """A multilayer perceptron with Gaussian noise of its own, as its authors trained it; one observation at a time."""

    def __init__(self, path: Path, rng: np.random.Generator) -> None:
        with np.load(path) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
        n = sum(name[0] == "W" and name[1:].isdigit() for name in arrays)
        # In double precision, so that processors differ by much less than `Portable` rounds away.
        self.weights = [np.ascontiguousarray(arrays[f"W{i}"], np.float64) for i in range(n)]  # (out, in) each
        self.biases = [np.asarray(arrays[f"b{i}"], np.float64) for i in range(n)]
        self.arrays, self.rng, self.n_inputs = arrays, rng, self.weights[0].shape[1]
        self.relu, self.squash = str(arrays["act"]) == "relu", bool(arrays["squash"])

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """A noisy action for one observation."""
        return self.act(obs, noisy=True)

    def act(self, obs: np.ndarray, noisy: bool) -> np.ndarray:
        """Compute an action.

        Args:
            obs: One observation, (n_inputs,).
            noisy: Whether to add the policy's own noise.

        Returns:
            The action, (A,).

        Raises:
            ValueError: If the policy has no noise of its own.
        """
        arrays, x = self.arrays, obs
        if "mean" in arrays:  # the observation normaliser that it was trained with
            x = np.clip((x - arrays["mean"]) / arrays["std"], -float(arrays["clip"]), float(arrays["clip"]))
        x = x.astype(np.float64)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = weight @ x + bias
            x = np.maximum(x, 0) if self.relu else np.tanh(x)
        action = self.weights[-1] @ x + self.biases[-1]
        if noisy and "Ws" in arrays:  # the spread is a second head of the network
            spread = np.exp(np.clip(arrays["Ws"] @ x + arrays["bs"], -20, 2))
            action = action + spread * self.rng.standard_normal(action.shape)
        elif noisy and "log_std" in arrays:
            action = action + np.exp(arrays["log_std"]) * self.rng.standard_normal(action.shape)
        elif noisy:
            raise ValueError("this policy has no noise of its own")
        return np.tanh(action) if self.squash else action


class Snapshots:
    """One of several policies, drawn for every episode, like the snapshots of a training run ("medium-replay")."""

    def __init__(self, policies: Sequence[Network], rng: np.random.Generator) -> None:
        self.policies, self.rng = policies, rng

    def reset(self) -> None:
        """Draw the policy of the next episode."""
        self.policy = self.policies[self.rng.integers(len(self.policies))]

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """A noisy action of the policy of this episode."""
        return self.policy(obs)


class Waypoints:
    """A path through a maze by breadth-first search over free cells, followed from centre to centre and finally to the goal."""

    near = 0.15
    """Distance to a centre, in units of the maze, at which the next centre becomes the target."""

    def __init__(self, maze: Any) -> None:
        self.maze = maze  # of Gymnasium-Robotics
        self.wall = np.array([[cell == 1 for cell in row] for row in maze.maze_map])
        self.reset()

    def reset(self) -> None:
        """Forget the path, before every episode."""
        self.path: list[Cell] | None = None
        self.leg = 0

    def _cell(self, place: np.ndarray) -> Cell:
        row, column = (int(i) for i in self.maze.cell_xy_to_rowcol(place))
        return row, column

    def _way(self, start: Cell, end: Cell) -> list[Cell]:
        """The cells after `start` up to `end` on a shortest path."""
        after: dict[Cell, Cell | None] = {end: None}
        queue = collections.deque([end])
        while queue and queue[0] != start:
            row, column = queue.popleft()
            for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                cell = (row + down, column + right)
                inside = 0 <= cell[0] < self.wall.shape[0] and 0 <= cell[1] < self.wall.shape[1]
                if inside and not self.wall[cell] and cell not in after:
                    after[cell] = (row, column)
                    queue.append(cell)
        path, cell_after = [], after.get(start)
        while cell_after is not None:
            path.append(cell_after)
            cell_after = after[cell_after]
        return path

    def target(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The point (2,) to move towards."""
        goal, here = obs["desired_goal"], obs["achieved_goal"]
        if self.path is None:
            self.path = self._way(self._cell(here), self._cell(goal))
        while self.leg < len(self.path) - 1 and np.linalg.norm(self._centre(self.path[self.leg]) - here) < self.near:
            self.leg += 1
        return goal if self.leg >= len(self.path) - 1 else self._centre(self.path[self.leg])

    def _centre(self, cell: Cell) -> np.ndarray:
        return self.maze.cell_rowcol_to_xy(np.array(cell))

    def __call__(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The force (2,) on the ball of PointMaze, by PD control."""
        return 10.0 * (self.target(obs) - obs["achieved_goal"]) - obs["observation"][2:4]


class AntWaypoints(Waypoints):
    """AntMaze: the same path, followed by a policy that only learnt to run along +x, without its noise.

    No training is needed, by symmetry. The dynamics are invariant under rotations about z: the torso as the policy observes it
    is rotated by minus the direction, so that the policy runs in that direction. The Ant also looks the same from four sides:
    its legs are relabelled so that the remaining yaw, as the policy observes it, is within 45 degrees.
    """

    near = 1.0

    def __init__(self, maze: Any, runner: Network) -> None:
        super().__init__(maze)
        self.runner = runner

    def __call__(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Torques (8,) for an AntMaze observation."""
        ahead = self.target(obs) - obs["achieved_goal"]
        seen, k = seen_along(obs["observation"][:27], np.arctan2(ahead[1], ahead[0]))
        contact_forces = np.zeros(self.runner.n_inputs - 27)  # always zero in the versions of Ant in which it was trained
        return relabelled(np.clip(self.runner.act(np.concatenate([seen, contact_forces]), noisy=False), -1, 1), k)


_ANKLE = np.array([-1, 1, -1, 1])  # sign between the ankle of leg i and that of leg i + 1
_ACTUATOR_LEGS = (3, 0, 1, 2)  # the pairs (hip, ankle) of an action are of the legs 4, 1, 2, 3
_ANKLE_SIGNS = np.array([[np.prod([_ANKLE[(i + j) % 4] for j in range(k)], dtype=int) for i in range(4)] for k in range(4)])


def seen_along(obs: np.ndarray, direction: float) -> tuple[np.ndarray, int]:
    """Transform an Ant observation as if `direction` were +x and leg k the first.

    Args:
        obs: (27,): height, quaternion (4,), joint angles (8,), linear and angular velocity (3,) each, joint velocities (8,).
        direction: In radians.

    Returns:
        The transformed observation (27,), and k.
    """
    turned = _times(_turn(-direction), obs[1:5])
    k = int(np.round(-_yaw(turned) / (np.pi / 2))) % 4
    quaternion = _times(turned, _turn(np.pi / 2 * k))
    quaternion = quaternion if quaternion[0] >= 0 else -quaternion
    legs, signs = [(i + k) % 4 for i in range(4)], np.stack([np.ones(4), _ANKLE_SIGNS[k]], 1)
    angles, speeds = obs[5:13].reshape(4, 2), obs[19:27].reshape(4, 2)
    velocity, spin = _turned(-direction, obs[13:16]), _turned(-np.pi / 2 * k, obs[16:19])
    parts = [obs[:1], quaternion, (angles[legs] * signs).ravel(), velocity, spin, (speeds[legs] * signs).ravel()]
    return np.concatenate(parts), k


def relabelled(action: np.ndarray, k: int) -> np.ndarray:
    """Torques (8,) for the legs as numbered by `seen_along` -> torques for the actual legs."""
    of_leg, real = np.zeros((4, 2)), np.zeros((4, 2))
    for n, leg in enumerate(_ACTUATOR_LEGS):
        of_leg[leg] = action[2 * n : 2 * n + 2]
    for i in range(4):
        real[(i + k) % 4] = of_leg[i] * np.array([1, _ANKLE_SIGNS[k][i]])
    return np.concatenate([real[leg] for leg in _ACTUATOR_LEGS])


def _times(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The product of two quaternions (w, x, y, z)."""
    w, x, y, z = p
    W, X, Y, Z = q
    return np.array(
        [
            w * W - x * X - y * Y - z * Z,
            w * X + x * W + y * Z - z * Y,
            w * Y - x * Z + y * W + z * X,
            w * Z + x * Y - y * X + z * W,
        ]
    )


def _turn(angle: float) -> np.ndarray:
    """The quaternion of a rotation about z."""
    return np.array([np.cos(angle / 2), 0, 0, np.sin(angle / 2)])


def _yaw(q: np.ndarray) -> float:
    """The rotation about z, in radians."""
    return np.arctan2(2 * (q[0] * q[3] + q[1] * q[2]), 1 - 2 * (q[2] ** 2 + q[3] ** 2))


def _turned(angle: float, v: np.ndarray) -> np.ndarray:
    """A vector (3,) rotated about z."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([c * v[0] - s * v[1], s * v[0] + c * v[1], v[2]])
