"""Arrays, episodes and replay buffers in memory -> Transitions.

One rule for the next observation. Where it is recorded (T+1 observations per episode, or `next_observations`) every row
is kept. Where it is not, it is the next row of the same episode, and the last row of an episode is dropped unless it
terminated (then the next observation is masked anyway). Terminations mask the bootstrap, truncations never do; at a row
with both flags the episode terminated.
"""

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from diffagents.data import validation as check
from diffagents.data.transitions import Transitions
from diffagents.types import Spec

D4RL_NAMES = {"terminals": "terminations", "timeouts": "truncations"}
"""D4RL's name of an array -> ours."""
Keys = tuple[str, ...] | None


def from_arrays(
    data: Mapping[str, Any],
    keys: Keys,
    limit: int | None,
    info: Mapping[str, Any],
    spec: Spec | None = None,
    breaks: np.ndarray | None = None,
    cut: np.ndarray | None = None,
) -> Transitions:
    """Flat arrays with one row per step; `limit` is the environment's time limit, if known.

    Without `spec`, spaces come from the arrays. `breaks` are the last rows of episodes that go on elsewhere, `cut` are
    rows of episodes whose start is lost.
    """
    named = _named(data, "the dataset")
    from_data = spec is None
    spec = spec or _guess_spec(named["observations"], named["actions"], keys)
    shapes = check.obs_shapes(spec)
    action = check.actions("actions", named["actions"], spec.action_space.shape)
    obs = _observations("observations", named["observations"], shapes)
    rew = np.array(check.column("rewards", named["rewards"]), np.float32)
    terminated = check.flags("terminations", named["terminations"])
    lengths = {"observations": len(obs), "actions": len(action), "rewards": len(rew), "terminations": len(terminated)}
    truncated = next_obs = None
    if "truncations" in named:
        truncated = check.flags("truncations", named["truncations"])
        lengths["truncations"] = len(truncated)
    if "next_observations" in named:
        next_obs = _observations("next_observations", named["next_observations"], shapes)
        lengths["next_observations"] = len(next_obs)
    n = check.equal_lengths(lengths)
    if truncated is None:
        truncated = _infer_truncations(terminated, named.get("episode_ends"), obs, next_obs, limit)
    flagged = terminated | truncated
    ends = flagged.copy()
    ends[-1] = True
    if breaks is not None:
        ends[breaks] = True
    unknown = np.zeros(n, bool)
    if next_obs is None:
        unknown = ends
        next_obs = np.empty_like(obs)
        next_obs[:-1] = obs[1:]
        next_obs[ends] = obs[ends]
    last = np.flatnonzero(ends)
    whole = flagged[last]
    if cut is not None:
        whole[np.searchsorted(last, cut)] = False
    action = np.array(action.reshape(n, -1), np.float32)
    rows = _Rows(obs, action, rew, next_obs, terminated, unknown)
    return _assemble(rows, last + 1, whole, spec, info, from_data)


def from_episodes(
    episodes: Iterable[Mapping[str, Any]], n_steps: int, keys: Keys, spec: Spec | None, info: Mapping[str, Any]
) -> Transitions:
    """Episodes with T+1 observations and T of the rest, written into arrays of `n_steps` rows; `truncations` optional.

    An episode with T observations (an old recording fault) follows the rule for unknown next observations and warns.
    """
    from_data = spec is None
    obs: np.ndarray = np.empty(0)
    next_obs = action = rew = obs
    terminated, unknown = np.zeros(n_steps, bool), np.zeros(n_steps, bool)
    ends: list[int] = []
    whole: list[bool] = []
    row = 0
    for i, episode in enumerate(episodes):
        named = _named(episode, f"episode {i}")
        if spec is None:
            spec = _guess_spec(named["observations"], named["actions"], keys)
        if i == 0:
            obs, next_obs = (np.empty((n_steps, spec.obs_dim), np.float32) for _ in range(2))
            action = np.empty((n_steps, spec.act_dim), np.float32)
            rew = np.empty(n_steps, np.float32)
        act = check.actions(f"episode {i} actions", named["actions"], spec.action_space.shape)
        seen = _observations(f"episode {i} observations", named["observations"], check.obs_shapes(spec))
        reward = check.column(f"episode {i} rewards", named["rewards"])
        over = check.flags(f"episode {i} terminations", named["terminations"])
        lengths = {"actions": len(act), "rewards": len(reward), "terminations": len(over)}
        truncated = np.zeros(len(over), bool)
        if "truncations" in named:
            truncated = check.flags(f"episode {i} truncations", named["truncations"])
            lengths["truncations"] = len(truncated)
        n = check.equal_lengths(lengths, f"the arrays of episode {i}")
        if "next_observations" in named:
            raise ValueError(
                f"episode {i} has next_observations, which belong to flat arrays: an episode of {n} actions has {n + 1} "
                "observations instead; leave them out, or pass flat arrays"
            )
        early = np.flatnonzero((over | truncated)[:-1])
        if early.size:
            what = "terminations" if over[early[0]] else "truncations"
            raise ValueError(
                f"episode {i} goes on after step {early[0]} of {n}, where {what} is true: an episode ends there; "
                "cut it after that step, or pass flat arrays"
            )
        if len(seen) not in (n, n + 1):
            raise ValueError(
                f"episode {i} has {len(seen)} observations for {n} actions, expected {n + 1}: "
                "the observation after the last action belongs to the episode"
            )
        if row + n > n_steps:
            raise ValueError(f"{info['id']} has more than the {n_steps} steps of its metadata.json; make it anew")
        part = slice(row, row + n)
        obs[part], action[part], rew[part], terminated[part] = seen[:n], act.reshape(n, -1), reward, over
        next_obs[row : row + n - 1], next_obs[row + n - 1] = seen[1:n], seen[-1]
        unknown[row + n - 1] = len(seen) == n
        row += n
        ends.append(row)
        whole.append(bool(over[-1] or truncated[-1]))
    if spec is None or row == 0:
        raise ValueError(f"{info['id']} is empty (no episode): nothing to learn from; check the id or the filter")
    if unknown.any():
        check.warn(
            f"{info['id']}: {int(unknown.sum())} of {len(ends)} episodes lack their last observation; "
            "their last transition is dropped unless it terminated"
        )
    rows = _Rows(*(array[:row] for array in (obs, action, rew, next_obs, terminated, unknown)))
    return _assemble(rows, np.asarray(ends), np.asarray(whole), spec, info, from_data)


def from_replay_buffer(buffer: Any, keys: Keys, env_spec: EnvSpec | None) -> Transitions:
    """An SB3 `ReplayBuffer`: its rows in the order of time, one environment after the other.

    Actions are stored scaled to [-1, 1] (SB3's OffPolicyAlgorithm does so) and are brought back to the space's units.
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
            f"the replay buffer holds an action of {np.abs(action).max():.4g}: SB3 stores actions scaled to [-1, 1]; "
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
            "the replay buffer was made with handle_timeout_termination=False: its dones mix terminations and "
            "time-outs, which the time limit of env= can tell apart; pass env="
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


def _timeouts_by_length(done: np.ndarray, last: np.ndarray, limit: int | None, cut: np.ndarray | None) -> np.ndarray:
    timeout = np.zeros(len(done), bool)
    if limit is None or len(done) == 0:
        return timeout
    ends = np.union1d(np.flatnonzero(done), last)
    timeout[ends[np.diff(ends, prepend=-1) == limit]] = True
    if cut is not None:  # length unknown: bootstrapping at an end errs less than masking at a time-out
        timeout[ends[np.searchsorted(ends, cut)]] = True
    return timeout & done


def _named(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arrays under our names. Raises ValueError where one is missing or its meaning is ambiguous."""
    if "masks" in data and "terminals" in data:
        raise ValueError(
            f"{where} has 'masks' beside 'terminals' (OGBench), where terminals mean any end; "
            "pass terminations=1 - masks and truncations=terminals instead"
        )
    if "dones" in data and not {"terminations", "terminals"} & set(data):
        raise ValueError(f"{where} has 'dones', which may be time-outs; pass terminations and truncations instead")
    for theirs, ours in D4RL_NAMES.items():
        if data.get(theirs) is None or data.get(ours) is None:
            continue
        one, other = (check.flags(f"{where}: {key}", data[key]) for key in (theirs, ours))
        if not np.array_equal(one, other):
            raise ValueError(f"{where} has {theirs!r} beside {ours!r}, two names of one thing, and they differ; leave one out")
    named = {D4RL_NAMES.get(key, key): value for key, value in data.items() if value is not None}
    missing = [key for key in ("observations", "actions", "rewards", "terminations") if key not in named]
    if missing == ["terminations"]:
        raise ValueError(
            f"{where} has no terminations (D4RL: terminals), which mask the bootstrap; pass zeros if there are none"
        )
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it has {', '.join(map(str, data)) or 'nothing'}")
    return named


def _observations(name: str, value: Any, shapes: check.Shapes) -> np.ndarray:
    """An array or a dict of arrays -> a new float32 array (N, S), its parts in the order of `shapes`."""
    if None in shapes:
        if isinstance(value, Mapping):
            raise ValueError(f"{name} is a dict with {list(value)}, but the space is one Box; pass one of its arrays")
        array = check.rows(name, value, shapes[None])
        return np.array(_flat(array), np.float32)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is one array, but the space is a Dict; pass a dict with the keys {list(shapes)}")
    missing = [key for key in shapes if key not in value]
    if missing:
        raise ValueError(f"{name} lacks the keys {missing}, it has {list(value)}; choose with obs_keys=")
    parts = {key: check.rows(f"{name}/{key}", value[key], shape) for key, shape in shapes.items()}
    lengths = {key: len(part) for key, part in parts.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the parts of {name} disagree in length {lengths}; every part needs one row per step")
    return np.concatenate([_flat(part) for part in parts.values()], axis=1, dtype=np.float32)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), math.prod(array.shape[1:]))  # not -1: the array may be empty


def _guess_spec(observations: Any, actions: Any, keys: Keys) -> Spec:
    """Spaces from the arrays alone; the action bounds are a stand-in until the data are known to be finite."""

    def box(name: str, value: Any) -> spaces.Box:
        array = check.rows(name, value, None)
        if array.dtype == np.uint8:  # Spec refuses images by this dtype
            return spaces.Box(0, 255, array.shape[1:], np.uint8)
        return spaces.Box(-np.inf, np.inf, array.shape[1:], np.float32)

    space: spaces.Space[Any]
    if isinstance(observations, Mapping):
        # pairs, because gymnasium sorts the keys of a plain dict
        space = spaces.Dict(OrderedDict((key, box(f"observations/{key}", value)) for key, value in observations.items()))
    else:
        space = box("observations", observations)
    shape = check.actions("actions", actions, None).shape[1:]
    return Spec.from_spaces(space, spaces.Box(-1.0, 1.0, shape, np.float32), keys)


def _bounds_of(action: np.ndarray, space: spaces.Box) -> spaces.Box:
    low, high = action.min(axis=0), action.max(axis=0)
    constant = low == high  # bounds must differ; any width does
    low, high = np.where(constant, low - 1, low), np.where(constant, high + 1, high)
    return spaces.Box(low.reshape(space.shape), high.reshape(space.shape), dtype=np.float32)


def _infer_truncations(
    terminated: np.ndarray, episode_ends: Any, obs: np.ndarray, next_obs: np.ndarray | None, limit: int | None
) -> np.ndarray:
    n = len(terminated)
    truncated = np.zeros(n, bool)
    if episode_ends is not None:
        stops = check.column("episode_ends", episode_ends).astype(np.int64)
        if len(stops) == 0 or stops[-1] != n or (np.diff(stops, prepend=0) <= 0).any():
            raise ValueError(f"episode_ends must rise to the number of steps, {n}; give one past each last row")
        truncated[stops - 1] = True
    elif next_obs is not None:
        truncated[:-1] = (next_obs[:-1] != obs[1:]).any(axis=1)
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


class _Rows(NamedTuple):
    obs: np.ndarray  # (N, S)
    action: np.ndarray  # (N, A)
    rew: np.ndarray  # (N,)
    next_obs: np.ndarray  # (N, S)
    terminated: np.ndarray  # (N,) bool
    unknown: np.ndarray  # (N,) bool, True where next_obs is a stand-in


def _assemble(
    rows: _Rows, ends: np.ndarray, whole: np.ndarray, spec: Spec, info: Mapping[str, Any], bounds_from_data: bool
) -> Transitions:
    """Check the values, drop the rows whose next observation is unknown and needed, and describe the result."""
    obs, action, rew, next_obs, terminated, unknown = rows
    lengths = np.diff(ends, prepend=0)
    arrays = {"observations": obs, "actions": action, "rewards": rew, "next_observations": next_obs}
    check.finite(arrays, lengths)
    if bounds_from_data:
        spec = dataclasses.replace(spec, action_space=_bounds_of(action, spec.action_space))
    returns = np.add.reduceat(rew.astype(np.float64), ends - lengths)
    whole = whole.copy() if whole.any() else np.ones_like(whole)  # no end is ever flagged: nothing tells cut from whole
    if len(ends) > 1 and not terminated[-1] and lengths[-1] < lengths.max():
        whole[-1] = False  # most likely cut by the end of the recording, which collectors flag as a truncation
    keep = ~unknown | terminated
    if not keep.any():
        raise ValueError(f"{info['id']}: every episode is a single truncated step; give next_observations")
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
    found = {
        "n_steps": int(lengths.sum()),
        "n_episodes": len(ends),
        "mean_return": float(judged.mean()),
        "std_return": float(judged.std()),
        "obs_keys": list(spec.obs_keys) if spec.obs_keys is not None else None,
        "bounds_from_data": bounds_from_data,
        "sha256": data.fingerprint(),
        "warnings": check.advise(data.obs, data.rew, data.done, len(ends)),
    }
    data.info = {"env_spec": None, "ref_min_score": None, "ref_max_score": None, **info, **found}
    return data
