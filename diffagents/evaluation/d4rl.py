"""Normalised scores on the scale of D4RL."""

from collections.abc import Sequence
from typing import Any

import numpy as np

D4RL_REFERENCE: dict[str, tuple[float, float]] = {
    "Hopper": (-20.272305, 3234.3),
    "HalfCheetah": (-280.178953, 12135.0),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
    "AntMaze": (0.0, 1.0),  # every size; see `d4rl_score`
    "AdroitHandPen": (96.262799, 3076.8331017826877),
    "AdroitHandDoor": (-56.512833, 2880.5693087298737),
    "AdroitHandHammer": (-274.856578, 12794.134825156867),
    "AdroitHandRelocate": (-6.425911, 4233.877797728884),
    "FrankaKitchen": (0.0, 4.0),
}
"""Return of a random and of an expert policy, by environment name without version: the figures of D4RL's `infos.py`
(Farama Foundation, Apache-2.0). They belong to D4RL's mujoco-py environments, whose dynamics and observations differ
from Gymnasium's: a familiar scale to read returns on, not a number to set beside published tables.
PointMaze has none here: its reward and its end of episode are not those of D4RL's maze2d."""


def d4rl_score(env_id: str | None, returns: Sequence[float]) -> float | None:
    """Mean of 100 (return - random) / (expert - random) with `D4RL_REFERENCE`, or None where there is no reference.

    `returns` are raw, undiscounted episode returns. An AntMaze episode counts 1 if its return is positive, else 0:
    D4RL's episode ended at the goal, Gymnasium-Robotics' may go on and collect more. Other reward kinds (`...Dense`,
    `...Sparse` ids) have no reference.
    """
    scores = _scores(env_id, returns)
    return None if scores is None else float(scores.mean())


def d4rl_score_of_mean(env_id: str | None, mean_return: float) -> float | None:
    """`d4rl_score` where only the mean of the returns is at hand; of AntMaze right where each is 0 or 1, as by its rules."""
    name = _reference_name(env_id)
    return None if name is None else float(_scaled(name, np.float64(mean_return)))


def _reference_name(env_id: str | None) -> str | None:
    name = (env_id or "").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    base, dash, version = name.rpartition("-v")
    name = base if dash and version.isdigit() else name
    if name.startswith("AntMaze") and not name.endswith("Dense"):
        return "AntMaze"
    return name if name in D4RL_REFERENCE else None


def _scores(env_id: str | None, returns: Sequence[float]) -> np.ndarray | None:
    name = _reference_name(env_id)
    if name is None:
        return None
    values = np.asarray(returns, np.float64)
    if name == "AntMaze":
        values = (values > 0).astype(np.float64)
    return _scaled(name, values)


def _scaled(name: str, values: Any) -> Any:
    low, high = D4RL_REFERENCE[name]
    return 100.0 * (values - low) / (high - low)
