"""Normalised scores on the scale of D4RL: 0 is its random policy, 100 its expert."""

from collections.abc import Sequence

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
(Farama Foundation, Apache-2.0). They belong to D4RL's mujoco-py environments, whose dynamics and observations differ from
Gymnasium's: use the scale to read returns, not to compare with published tables.
PointMaze has no entry: its reward and the end of its episodes are not those of D4RL's maze2d."""


def d4rl_score(env_id: str | None, returns: Sequence[float]) -> float | None:
    """Mean of the normalised scores 100 (return - random) / (expert - random).

    An AntMaze episode counts 1 if its return is positive, else 0: in D4RL an episode ended at the goal, while in
    Gymnasium-Robotics it may continue and collect more. Ids with another reward (`...Dense`, `...Sparse`) have no reference.

    Args:
        env_id: Id of the environment.
        returns: Raw, undiscounted returns of episodes.

    Returns:
        The mean score, or None if `D4RL_REFERENCE` has no entry for the environment.
    """
    scores = normalized_scores(env_id, returns)
    return None if scores is None else float(scores.mean())


def d4rl_score_of_mean(env_id: str | None, mean_return: float) -> float | None:
    """`d4rl_score` if only the mean of the returns is known.

    Args:
        env_id: Id of the environment.
        mean_return: Mean of raw, undiscounted returns; for AntMaze each of them must have been 0 or 1.

    Returns:
        The score, or None if there is no reference.
    """
    name = reference_name(env_id)
    return None if name is None else float(_normalize(name, np.asarray(mean_return, np.float64)))


def normalized_scores(env_id: str | None, returns: Sequence[float]) -> np.ndarray | None:
    """The score of each of n returns, (n,) float64, as `d4rl_score` averages them; None if there is no reference."""
    name = reference_name(env_id)
    if name is None:
        return None
    values = np.asarray(returns, np.float64)
    if name == "AntMaze":
        values = (values > 0).astype(np.float64)
    return _normalize(name, values)


def reference_name(env_id: str | None) -> str | None:
    """The key of `D4RL_REFERENCE` for an environment id, or None."""
    name = (env_id or "").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    base, dash, version = name.rpartition("-v")
    name = base if dash and version.isdigit() else name
    if name.startswith("AntMaze") and not name.endswith("Dense"):
        return "AntMaze"
    return name if name in D4RL_REFERENCE else None


def _normalize(name: str, returns: np.ndarray) -> np.ndarray:
    """Put returns on the scale of a reference."""
    low, high = D4RL_REFERENCE[name]
    return np.asarray(100.0 * (returns - low) / (high - low))
