"""OGBench's datasets (Park et al. 2024, arXiv:2410.20092), whose flags mean other things than D4RL's.

Their `terminals` mark where a trajectory ends, for whatever reason; `masks` are 0 where a task is solved, and only there does
the value of the next state not count. Data of one task have `rewards` and `masks` for every row; the files themselves have
neither, because they serve several tasks. There are three layouts (ogbench/utils.py, version 1.2), all of which are read here:

- with `next_observations`, one row per transition;
- compact, with `valids`, which are 0 at the last observation of a trajectory, a row that is no transition;
- as the files are: `terminals` are 1 at the last observation, and that row is no transition.
"""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffagents.data import validation as check

MARKS = ("masks", "valids", "qpos", "qvel", "button_states")
"""Arrays of which OGBench's data have at least one, next to `terminals`."""


def is_ogbench(names: Any) -> bool:
    """Whether arrays of these names are OGBench's: `terminals` without time-outs, next to `masks`, `valids` or a state.

    Args:
        names: A collection of names.
    """
    others = (set(check.OTHER_NAMES) | set(check.OTHER_NAMES.values()) | {"episode_ends"}) - {"terminals"}
    if "terminals" not in names or any(name in names for name in others):
        return False
    return "masks" in names or "valids" in names or ("rewards" not in names and any(mark in names for mark in MARKS))


def made() -> dict[str, str]:
    """What to record about the origin of the data: the version of OGBench, on which rewards depend, if it is installed.

    Before version 1.2 rewards belonged to the state in the data, and to the next state in the environment.
    """
    try:
        return {"layout": "OGBench", "ogbench": importlib.metadata.version("ogbench")}
    except importlib.metadata.PackageNotFoundError:
        return {"layout": "OGBench"}


def episodes_of(data: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Cut OGBench's arrays into episodes for `arrays.from_episodes`.

    A trajectory ends at its last row, as at a time-out, and wherever its mask is 0: what follows begins a new episode.

    Args:
        data: Arrays by name, with one row per step.
        where: What to call the data in messages.

    Returns:
        Episodes of T steps with T + 1 observations.

    Raises:
        ValueError: If there are no rewards or masks, or arrays differ in length.
    """
    missing = [name for name in ("observations", "actions") if name not in data]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it has {check.listed(data)}")
    absent = [name for name in ("rewards", "masks") if name not in data]
    if absent:
        raise ValueError(
            f"{where} has the layout of OGBench, without {' and '.join(absent)}, which belong to a task: pass the dict that "
            "ogbench.make_env_and_datasets returns for one (...-singletask-v0); to imitate only, add rewards 0 and masks 1"
        )
    obs, action = check.rows("observations", data["observations"], None), check.numeric("actions", data["actions"])
    rew, solved = check.column("rewards", data["rewards"]), ~check.flags("masks", data["masks"])
    stops = check.flags("terminals", data["terminals"])
    next_obs = data.get("next_observations")
    columns = {"observations": obs, "actions": action, "rewards": rew, "masks": solved, "terminals": stops}
    if next_obs is not None:
        columns["next_observations"] = next_obs = check.rows("next_observations", next_obs, obs.shape[1:])
    elif "valids" in data:
        columns["valids"] = check.flags("valids", data["valids"])
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"the arrays of {where} disagree in length ({listed}); every array needs one row per step")
    if len(rew) == 0:
        raise ValueError(f"{where} is empty (0 steps), so there is nothing to learn from")
    if next_obs is None:
        is_step = columns.get("valids", ~stops)
        if not is_step.any():
            raise ValueError(f"{where} is empty (0 steps): each of its rows is the last observation of a trajectory")
        if is_step[-1]:
            raise ValueError(f"{where} ends within a trajectory: its last row must be the last observation of one")
        stops = np.append(~is_step[1:], True)[is_step]
        next_obs = np.roll(obs, -1, axis=0)[is_step]
        obs, action, rew, solved = (array[is_step] for array in (obs, action, rew, solved))
    episodes: list[dict[str, Any]] = []
    start = 0
    for end in np.union1d(np.flatnonzero(stops | solved) + 1, len(rew)):
        last = np.arange(start, end) == end - 1
        episodes.append(
            {
                "observations": np.concatenate([obs[start:end], next_obs[end - 1 : end]]),
                "actions": action[start:end],
                "rewards": rew[start:end],
                "terminations": last & solved[end - 1],
                "truncations": last & stops[end - 1] & ~solved[end - 1],
            }
        )
        start = end
    return episodes
