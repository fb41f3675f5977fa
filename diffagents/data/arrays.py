"""From arrays, episodes and replay buffers in memory to Transitions.

There is one rule for the next observation. Where it is recorded (T + 1 observations per episode, or `next_observations`), every
row is kept. Where it is not, it is the next row of the same episode, and the last row of an episode is dropped unless it
terminated (then the next observation is masked anyway). Terminations mask the bootstrap, truncations never do; at a row with
both flags the episode terminated. Recorded next observations are compared with the rows that follow, see `_follow_next_obs`.

Shapes: N steps, E episodes, T steps of one episode, S flat observation, A flat action.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from diffagents.data import validation as check
from diffagents.data.transitions import Transitions
from diffagents.types import Spec

_ROWS_AT_ONCE = 65_536  # small enough for temporaries to stay in the cache

Keys = tuple[str, ...] | None
"""The parts of a Dict observation, in order; None: not chosen, or the observation is not a Dict."""


def from_arrays(
    data: Mapping[str, Any],
    keys: Keys,
    limit: int | None,
    info: Mapping[str, Any],
    spec: Spec | None = None,
    breaks: np.ndarray | None = None,
    cut: np.ndarray | None = None,
) -> Transitions:
    """Build Transitions from flat arrays with one row per step.

    Args:
        data: Arrays by name, ours or D4RL's; see `load_dataset`.
        keys: Observation keys of a Dict, if `spec` is None.
        limit: The environment's time limit, if known; the last resort to find the ends of episodes.
        info: `id` and `kind` of the dataset, and more for `Transitions.info`.
        spec: The spaces. None: they are taken from the arrays.
        breaks: Last rows of episodes that were not finished, (K,) int64.
        cut: Rows in episodes whose beginning is lost, (K,) int64.

    Returns:
        The data.

    Raises:
        TypeError: If an array is not of real numbers, or actions are integers.
        ValueError: If arrays are missing, do not fit, or contain NaN or infinity.
    """
    named = check.our_names(data, "the dataset")
    bounds_from_data = spec is None
    spec = spec or _guess_spec(named["observations"], named["actions"], keys)
    columns = check.dataset_columns(named, spec)
    obs, terminated, next_obs = columns.obs, columns.terminated, columns.next_obs
    n = len(obs)
    if columns.truncated is not None:
        truncated = columns.truncated
    else:
        truncated = _infer_truncations(terminated, named.get("episode_ends"), obs, next_obs, limit)
    flagged = terminated | truncated
    ends = flagged.copy()
    ends[-1] = True
    if breaks is not None:
        ends[breaks] = True
    action, rew = np.array(columns.action.reshape(n, -1), np.float32), np.array(columns.rew, np.float32)  # copies
    extra = np.zeros(n, bool)
    notes = check.rounding(named["observations"], check.obs_shapes(spec))
    if next_obs is None:
        unknown = ends
        next_obs = np.empty_like(obs)
        next_obs[:-1] = obs[1:]
        next_obs[ends] = obs[ends]
    else:
        next_obs = _masked_next_obs(obs, next_obs, terminated)
        resumes = breaks is not None  # SB3 resets the environment when learn() is called again
        unknown, extra, found = _follow_next_obs(obs, rew, next_obs, terminated, truncated, ends, resumes)
        notes = found + notes
    keep = ~extra
    last = np.flatnonzero(ends[keep])
    whole = flagged[keep][last]
    if cut is not None:
        whole[np.searchsorted(last, (np.cumsum(keep) - 1)[cut])] = False
    rows = _Rows(*(array if keep.all() else array[keep] for array in (obs, action, rew, next_obs, terminated, unknown)))
    return _assemble(rows, last + 1, whole, spec, info, bounds_from_data, notes)


def from_episodes(
    episodes: Iterable[Mapping[str, Any]], n_steps: int, keys: Keys, spec: Spec | None, info: Mapping[str, Any]
) -> Transitions:
    """Build Transitions from episodes with T + 1 observations and T actions, rewards and flags each.

    An episode with T observations (a fault of old recordings) follows the rule for unknown next observations, with a warning.

    Args:
        episodes: Mappings from names to arrays; `truncations` may be missing.
        n_steps: Sum of all T, for which memory is reserved.
        keys: Observation keys of a Dict, if `spec` is None.
        spec: The spaces. None: they are taken from the first episode.
        info: `id` and `kind` of the dataset, and more for `Transitions.info`.

    Returns:
        The data.

    Raises:
        TypeError: As `from_arrays`.
        ValueError: As `from_arrays`; and if an episode continues after its end, or there is none.
    """
    bounds_from_data = spec is None
    obs: np.ndarray = np.empty(0)
    next_obs = action = rew = obs
    terminated, unknown = np.zeros(n_steps, bool), np.zeros(n_steps, bool)
    ends: list[int] = []
    whole: list[bool] = []
    row, notes = 0, []
    for i, episode in enumerate(episodes):
        named = check.our_names(episode, f"episode {i}")
        spec = spec or _guess_spec(named["observations"], named["actions"], keys)
        if i == 0:
            obs, next_obs = (np.empty((n_steps, spec.obs_dim), np.float32) for _ in range(2))
            action = np.empty((n_steps, spec.act_dim), np.float32)
            rew = np.empty(n_steps, np.float32)
        columns = check.episode_columns(named, spec, i)
        if i == 0:
            notes = check.rounding(named["observations"], check.obs_shapes(spec))
        n = len(columns.action)
        if row + n > n_steps:
            raise ValueError(f"{info['id']} has more steps than the {n_steps} of its metadata.json; make the dataset again")
        part = slice(row, row + n)
        obs[part], action[part], rew[part] = columns.obs[:n], columns.action.reshape(n, -1), columns.rew
        terminated[part] = columns.terminated
        next_obs[row : row + n - 1], next_obs[row + n - 1] = columns.obs[1:n], columns.obs[-1]
        unknown[row + n - 1] = len(columns.obs) == n
        row += n
        ends.append(row)
        whole.append(bool(columns.terminated[-1] or (columns.truncated is not None and columns.truncated[-1])))
    if spec is None or row == 0:
        raise ValueError(f"{info['id']} is empty (no episode), so there is nothing to learn from; check the id or the filter")
    if unknown.any():
        check.warn(
            f"{info['id']}: {int(unknown.sum())} of {len(ends)} episodes lack their last observation; "
            "their last transition is dropped unless it terminated"
        )
    rows = _Rows(*(array[:row] for array in (obs, action, rew, next_obs, terminated, unknown)))
    return _assemble(rows, np.asarray(ends), np.asarray(whole), spec, info, bounds_from_data, notes)


def from_replay_buffer(buffer: Any, keys: Keys, env_spec: EnvSpec | None) -> Transitions:
    """Build Transitions from an SB3 replay buffer: its rows in the order of time, one environment after the other.

    Args:
        buffer: A `ReplayBuffer` or `DictReplayBuffer`. Its actions must be scaled to [-1, 1], as SB3's off-policy algorithms
            store them; they are scaled back to the units of its action space.
        keys: Observation keys of a Dict; None: the default of `Spec.from_spaces`.
        env_spec: Spec of the environment, whose time limit tells time-outs from terminations if the buffer does not.

    Returns:
        The data.

    Raises:
        ValueError: If actions are not scaled, time-outs cannot be told from terminations, or the data are bad.
    """
    n_envs, capacity = buffer.n_envs, buffer.buffer_size
    first, n = (buffer.pos, capacity) if buffer.full else (0, buffer.pos)
    shared = buffer.optimize_memory_usage
    if shared and buffer.full:  # the oldest observation has been overwritten by the newest next observation
        first, n = first + 1, n - 1
    order = (first + np.arange(n)) % capacity

    def unroll(array: Any) -> Any:
        if isinstance(array, Mapping):
            return {key: unroll(value) for key, value in array.items()}
        return array[order].swapaxes(0, 1).reshape(n_envs * n, *array.shape[2:])

    spec = Spec.from_spaces(buffer.observation_space, buffer.action_space, keys)
    low, high = spec.action_space.low, spec.action_space.high
    action = unroll(buffer.actions).reshape(-1, *low.shape)
    if n and np.abs(action).max() > 1 + check.ACTION_TOLERANCE:
        raise ValueError(
            f"the replay buffer contains an action of {np.abs(action).max():.4g}, but SB3 stores actions scaled to [-1, 1]; "
            "if yours are in the environment's units, pass a dict of arrays instead"
        )
    done = unroll(buffer.dones).astype(bool)
    starts = np.arange(n_envs) * n
    cut = starts if buffer.full and n else None
    last = starts + n - 1
    if buffer.handle_timeout_termination:
        timeout = unroll(buffer.timeouts).astype(bool)
    elif env_spec is not None:
        timeout = _timeouts_by_length(done, last, env_spec.max_episode_steps, cut)
    else:
        raise ValueError(
            "the replay buffer was made with handle_timeout_termination=False, so its dones mix terminations and "
            "time-outs; pass env=, whose time limit tells them apart"
        )
    data = {
        "observations": unroll(buffer.observations),
        "actions": low + 0.5 * (action + 1.0) * (high - low),
        "rewards": unroll(buffer.rewards),
        "terminations": done & ~timeout,
        "truncations": done & timeout,
    }
    if not shared:
        data["next_observations"] = unroll(buffer.next_observations)
    info = {"id": "replay_buffer", "kind": "replay_buffer"}
    return from_arrays(data, keys, None, info, spec, breaks=last, cut=cut)


class _Rows(NamedTuple):
    """All steps of a dataset, in episodes one after the other."""

    obs: np.ndarray  # (N, S)
    action: np.ndarray  # (N, A)
    rew: np.ndarray  # (N,)
    next_obs: np.ndarray  # (N, S)
    terminated: np.ndarray  # (N,) bool
    unknown: np.ndarray  # (N,) bool, True where next_obs is unknown and contains some other observation


def _assemble(
    rows: _Rows,
    ends: np.ndarray,
    whole: np.ndarray,
    spec: Spec,
    info: Mapping[str, Any],
    bounds_from_data: bool,
    notes: Sequence[str] = (),
) -> Transitions:
    """Check the values, drop the rows whose next observation is needed but unknown, and describe the result.

    `ends` (E,) are one past the last row of each episode; `whole` (E,) is False for episodes that were cut.
    `notes` are warnings.
    """
    obs, action, rew, next_obs, terminated, unknown = rows
    lengths = np.diff(ends, prepend=0)
    arrays = {"observations": obs, "actions": action, "rewards": rew, "next_observations": next_obs}
    check.finite(arrays, lengths)
    if bounds_from_data:
        spec = dataclasses.replace(spec, action_space=_bounds_of(action, spec.action_space))
    returns = np.add.reduceat(rew.astype(np.float64), ends - lengths)
    worst = int(np.abs(returns).argmax())
    if abs(returns[worst]) > np.finfo(np.float32).max:
        raise ValueError(
            f"{info['id']}: the rewards of episode {worst} add up to {returns[worst]:.3g}, more than float32 can hold: divide "
            "all rewards by a constant"
        )
    # Where no end is flagged at all, cut episodes cannot be told from whole ones.
    whole = whole.copy() if whole.any() else np.ones_like(whole)
    if len(ends) > 1 and not terminated[-1] and lengths[-1] < lengths.max():
        whole[-1] = False  # most likely cut by the end of the recording, which collectors flag as a truncation
    keep = ~unknown | terminated
    if not keep.any():
        raise ValueError(
            f"{info['id']}: every episode is a single truncated step, so its next observation is needed; pass next_observations"
        )
    if not keep.all():
        ends = np.cumsum(np.add.reduceat(keep.astype(np.int64), ends - lengths))
        obs, action, rew, next_obs, terminated = (array[keep] for array in rows[:5])
    data = Transitions(
        obs=torch.from_numpy(obs),
        action=torch.from_numpy(action),
        rew=torch.from_numpy(rew),
        next_obs=torch.from_numpy(next_obs),
        done=torch.from_numpy(terminated.astype(np.float32)),
        episode_ends=torch.from_numpy(ends.astype(np.int64)),
        episode_returns=torch.from_numpy(returns.astype(np.float32)),
        episode_lengths=torch.from_numpy(lengths.astype(np.int64)),
        episode_whole=torch.from_numpy(whole),
        spec=spec,
    )
    judged = returns[whole] if whole.any() else returns
    facts = {
        "n_steps": int(lengths.sum()),
        "n_episodes": len(ends),
        "mean_return": float(judged.mean()),
        "std_return": float(judged.std()),
        "obs_keys": list(spec.obs_keys) if spec.obs_keys is not None else None,
        "bounds_from_data": bounds_from_data,
        "sha256": data.fingerprint(),
        "warnings": [*notes, *check.advise(data.obs, data.rew, data.done, data.episode_lengths)],
    }
    data.info = {"env_spec": None, "ref_min_score": None, "ref_max_score": None, **info, **facts}
    return data


def _guess_spec(observations: Any, actions: Any, keys: Keys) -> Spec:
    """Spaces from the arrays alone; the action bounds are provisional until the actions are known to be finite."""

    def box(name: str, value: Any) -> spaces.Box:
        array = check.rows(name, value, None)
        if array.dtype == np.uint8 and array.ndim > 2:  # Spec recognises images by this dtype and rejects them
            return spaces.Box(0, 255, array.shape[1:], np.uint8)
        return spaces.Box(-np.inf, np.inf, array.shape[1:], np.float32)

    space: spaces.Space[Any]
    if isinstance(observations, Mapping):
        # pairs, because gymnasium sorts the keys of a plain dict; parts that are not chosen may have any form
        read = observations if keys is None or not set(keys) <= set(observations) else {key: observations[key] for key in keys}
        space = spaces.Dict(OrderedDict((key, box(f"observations/{check.name_of(key)}", value)) for key, value in read.items()))
    else:
        space = box("observations", observations)
    shape = check.actions("actions", actions, None).shape[1:]
    return Spec.from_spaces(space, spaces.Box(-1.0, 1.0, shape, np.float32), keys)


def _bounds_of(action: np.ndarray, space: spaces.Box) -> spaces.Box:
    """The bounds of the actions (N, A), in the shape of `space`."""
    low, high = action.min(axis=0), action.max(axis=0)
    constant = low == high  # the bounds of a Box must differ; any width will do
    low, high = np.where(constant, low - 1, low), np.where(constant, high + 1, high)
    return spaces.Box(low.reshape(space.shape), high.reshape(space.shape), dtype=np.float32)


def _masked_next_obs(obs: np.ndarray, next_obs: np.ndarray, terminated: np.ndarray) -> np.ndarray:
    """The next observations (N, S), made finite where the episode terminated: there they are not used, and may not be known."""
    last = np.flatnonzero(terminated)
    missing = last[~np.isfinite(next_obs[last]).all(axis=1)]
    next_obs[missing] = obs[missing]
    return next_obs


def _follows(obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
    """Whether the next row begins at a row's next observation, for all rows but the last, (N - 1,) bool."""
    same = np.ones(len(obs) - 1, bool)
    for start in range(0, len(same), _ROWS_AT_ONCE):
        end = min(start + _ROWS_AT_ONCE, len(same))
        # Few numbers differ, and finding these is quicker than a reduction of every row.
        different = (next_obs[start:end] != obs[start + 1 : end + 1]).ravel().nonzero()[0]
        same[start + different // obs.shape[1]] = False
    return same


def _follow_next_obs(
    obs: np.ndarray,
    rew: np.ndarray,
    next_obs: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    ends: np.ndarray,
    resumes: bool,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Compare the next observations (N, S) with the rows that follow, and add the ends that no flag marks to `ends` (N,) bool.

    An episode ends where the next row does not begin at the next observation. At a flagged end it must not begin there. If it
    nearly always does, then either the recording is shifted, and the next observation of a time-out belongs to another episode;
    or there are rows from the last observation of an episode to the first of the next, as vector environments make them at a
    reset. Such rows have no reward. Where both may be true, both are treated. `resumes`: ends without a flag are no surprise.

    Returns:
        Which next observations are wrong, (N,) bool; which rows are no transitions, (N,) bool; and warnings.
    """
    n = len(obs)
    unknown, extra, notes = np.zeros(n, bool), np.zeros(n, bool), []
    follows = _follows(obs, next_obs)
    broken = np.flatnonzero(~follows & ~ends[:-1])
    # What is not finite is refused later.
    broken = broken[np.isfinite(next_obs[broken]).all(axis=1) & np.isfinite(obs[broken + 1]).all(axis=1)]
    ends[broken] = True
    if broken.size and not resumes:
        notes.append(
            f"{broken.size} rows lead to other observations than the next row has, and no flag ends an episode there (first "
            f"row {broken[0]}): it ends there as at a time-out; if the observations differ by rounding or noise only, leave "
            "next_observations out"
        )
    flagged = (terminated | truncated)[:-1]
    stops = np.flatnonzero(flagged)
    moved = stops[(obs[stops + 1] != obs[stops]).any(axis=1)]
    if moved.size < 2 or follows[moved].mean() < 0.9:
        return unknown, extra, notes
    after = np.flatnonzero(flagged & follows) + 1
    others = np.ones(n, bool)
    others[after] = False
    resets = not rew[after].any()
    certain = (rew[others] == 0).mean() ** len(after) < 0.01 if others.any() else False
    if resets:
        extra[after] = True
        notes.append(
            f"{len(after)} rows lead from the last observation of an episode to the first of the next one "
            f"(first row {after[0]}), as vector environments record them at a reset: they are left out"
        )
    if not (resets and certain) and truncated.any():
        unknown = truncated & np.append(follows, True)
        notes.append(
            f"the next_observations of {int(unknown.sum())} time-outs are the observations of the row after them "
            f"(first row {int(np.argmax(unknown))}), where another episode begins: these rows are left out, because where they "
            "led was not recorded"
        )
    return unknown, extra, notes


def _infer_truncations(
    terminated: np.ndarray, episode_ends: Any, obs: np.ndarray, next_obs: np.ndarray | None, limit: int | None
) -> np.ndarray:
    """The truncations of a dataset that has none, (N,) bool, from the first source available.

    These are `episode_ends`, breaks in the next observations, and the time limit.
    """
    n = len(terminated)
    truncated = np.zeros(n, bool)
    if episode_ends is not None:
        stops = check.column("episode_ends", episode_ends).astype(np.int64)
        if len(stops) == 0 or stops[-1] != n or (np.diff(stops, prepend=0) <= 0).any():
            raise ValueError(
                f"episode_ends must rise strictly up to the number of steps, {n}; pass one past the last row of each episode"
            )
        truncated[stops - 1] = True
    elif next_obs is not None:
        truncated[:-1] = ~_follows(obs, next_obs)
    elif limit is not None:
        start = 0
        for stop in (*(np.flatnonzero(terminated) + 1), n):
            truncated[start + limit - 1 : stop : limit] = True
            start = int(stop)
    else:
        raise ValueError(
            "the dataset has no truncations (D4RL: timeouts), so the ends of episodes are unknown; "
            "pass zeros if there are none, or next_observations, or env= with a time limit"
        )
    return truncated & ~terminated


def _timeouts_by_length(done: np.ndarray, last: np.ndarray, limit: int | None, cut: np.ndarray | None) -> np.ndarray:
    """Which dones are time-outs, because their episode has the length of the time limit: (N,) bool."""
    timeout = np.zeros(len(done), bool)
    if limit is None or len(done) == 0:
        return timeout
    ends = np.union1d(np.flatnonzero(done), last)
    timeout[ends[np.diff(ends, prepend=-1) == limit]] = True
    if cut is not None:  # Their length is unknown: to bootstrap at a termination errs less than to mask at a time-out.
        timeout[ends[np.searchsorted(ends, cut)]] = True
    return timeout & done
