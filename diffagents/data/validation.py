"""What a dataset must satisfy; every error states in one line where the problem is and how to fix it.

Modules import this one as `check`. From the bottom up: single arrays, the arrays of a dataset or an episode together, values,
and the comparison of a dataset with an environment.

Shapes: N steps of the data, S flat observation, A flat action.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from diffagents.errors import one_line, printable
from diffagents.types import Spec

OTHER_NAMES = {
    "terminated": "terminations",  # Gymnasium's `step`
    "truncated": "truncations",
    "terminals": "terminations",  # D4RL
    "timeouts": "truncations",
}
"""The name of an array elsewhere -> ours."""

ACTION_TOLERANCE = 1e-4
"""Overshoot of the action bounds, as a share of their width, that counts as rounding and is clipped silently."""

Shapes = dict[str | None, tuple[int, ...]]
"""Observation key -> shape of one observation; the key None stands for an observation that is not a dict."""


# ---- texts of strangers ------------------------------------------------------------------------------------------------


def name_of(value: object) -> str:
    """A name from a stranger's file, for a message or `Transitions.info`: at most 200 printable characters, in one line."""
    return printable(" ".join(str(value)[:200].split()))


def listed(names: Iterable[object]) -> str:
    """Some names for a message, at most 20 of them, or "nothing"."""
    shown = [name_of(name) for name in itertools.islice(names, 21)]
    return ", ".join([*shown[:20], *["..."] * (len(shown) > 20)]) or "nothing"


# ---- one array ---------------------------------------------------------------------------------------------------------


def numeric(name: str, value: Any) -> np.ndarray:
    """Convert to an array of real numbers.

    Args:
        name: What to call the array in messages.
        value: An array, a tensor on any device, or nested lists.

    Returns:
        The array, which may share memory with `value`.

    Raises:
        TypeError: For objects, strings or complex numbers.
        ValueError: For ragged rows.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is not an array ({one_line(error)}); every row must have the same shape") from None
    if array.dtype.kind not in "biuf":
        remedy = "take the real part" if array.dtype.kind == "c" else "convert it to float32 numbers"
        raise TypeError(f"{name} has dtype {name_of(array.dtype)}, which is not a real number; {remedy}")
    return array


def column(name: str, value: Any) -> np.ndarray:
    """One number per step: (N,), or (N, 1), which is squeezed.

    Raises:
        ValueError: For any other shape; and as `numeric`.
    """
    array = numeric(name, value)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected (N,): one number per step")
    return array


def flags(name: str, value: Any) -> np.ndarray:
    """A column of 0 and 1 as bool, (N,).

    Raises:
        ValueError: At the first other value; and as `column`.
    """
    array = column(name, value)
    if array.dtype == bool:
        return array
    wrong = np.flatnonzero((array != 0) & (array != 1))
    if wrong.size:
        raise ValueError(f"{name} is {array[wrong[0]]:g} at row {wrong[0]}; only 0 (no) and 1 (yes) are allowed")
    return array.astype(bool)


def rows(name: str, value: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """One vector per step: (N, *shape), or (N, ...) of at least two dimensions if `shape` is None.

    Raises:
        ValueError: For another shape, with both shapes; and as `numeric`.
    """
    array = numeric(name, value)
    if shape is None and array.ndim < 2:
        raise ValueError(f"{name} has shape {array.shape}, expected (N, D); for one dimension pass array[:, None]")
    if shape is not None and array.shape[1:] != shape:
        raise ValueError(
            f"{name} has shape {array.shape}, but the space needs (N, {', '.join(map(str, shape))}): "
            "the data or env= belong to another task, or an axis is missing"
        )
    return array


def actions(name: str, value: Any, space: spaces.Box | None) -> np.ndarray:
    """Continuous actions: as `rows`, and of a floating-point dtype.

    Args:
        name: What to call the array in messages.
        value: The actions.
        space: Their space, which is known to be one of integers if its dtype is; None: not known.

    Raises:
        TypeError: For integers, which suggest discrete actions, unless they are those of the space; and as `numeric`.
        ValueError: As `rows`.
    """
    array = numeric(name, value)
    shape = space.shape if space is not None else None
    if array.dtype.kind != "f" and not (space is not None and space.dtype.kind in "iu" and array.dtype.kind in "iu"):
        raise TypeError(
            f"{name} has dtype {array.dtype}: integers suggest discrete actions, but all agents here need continuous actions; "
            "if they are continuous, convert them with .astype('float32')"
        )
    return rows(name, array, shape)


def obs_shapes(spec: Spec) -> Shapes:
    """The shapes of the observations of `spec`, key by key, in order."""
    if spec.obs_keys is None:
        return {None: spec.observation_space.shape or ()}
    assert isinstance(spec.observation_space, spaces.Dict)  # Spec has checked it
    return {key: spec.observation_space[key].shape or () for key in spec.obs_keys}


def has_numbers_or_integers(spec: Spec) -> bool:
    """Whether an observation or an action is a single number, of shape (), or actions are integers."""
    return () in obs_shapes(spec).values() or spec.action_space.shape == () or spec.action_space.dtype.kind in "iu"


def observations(name: str, value: Any, shapes: Shapes) -> np.ndarray:
    """Flatten observations.

    Args:
        name: What to call the array in messages.
        value: An array (N, *shape), or a dict of such arrays.
        shapes: The shapes of the parts, from `obs_shapes`.

    Returns:
        A new array, (N, S) float32, with the parts in the order of `shapes`.

    Raises:
        ValueError: If keys, shapes or lengths do not fit; and as `numeric`.
    """
    if None in shapes:
        if isinstance(value, Mapping):
            raise ValueError(f"{name} is a dict with {list(value)}, but the space is a single Box; pass one of its arrays")
        return np.array(_flat(rows(name, value, shapes[None])), np.float32)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is one array, but the space is a Dict; pass a dict with the keys {list(shapes)}")
    missing = [key for key in shapes if key not in value]
    if missing:
        raise ValueError(f"{name} lacks the keys {missing}; it has {list(value)}; choose among these with obs_keys=")
    parts = {key: rows(f"{name}/{name_of(key)}", value[key], shape) for key, shape in shapes.items()}
    lengths = {key: len(part) for key, part in parts.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the parts of {name} disagree in length {lengths}; every part needs one row per step")
    return np.concatenate([_flat(part) for part in parts.values()], axis=1, dtype=np.float32)


def rounding(value: Any, shapes: Shapes) -> list[str]:
    """A warning if float32 rounds away what observations in double precision differ by.

    Args:
        value: Observations that `observations` has accepted.
        shapes: The shapes of the parts that are read, from `obs_shapes`.

    Returns:
        At most one warning, about the first such dimension.
    """
    for key in shapes:
        array = numeric("observations", value if key is None else value[key])
        if array.dtype.itemsize < 4 or array.dtype == np.float32 or array.dtype.kind not in "iuf" or len(array) < 2:
            continue
        sample = _flat(array[:: max(1, len(array) // 10_000)]).astype(np.float64)
        high = np.abs(sample).max(axis=0, initial=0.0)
        step = np.spacing(np.where(high < 3e38, high, 0.0).astype(np.float32)).astype(np.float64)
        lost = np.flatnonzero((step > 1e-3 * sample.std(axis=0)) & (np.ptp(sample, axis=0) > 0))
        if lost.size:
            i = int(lost[0])
            name = f"observation {key!r} " if key else "observation "
            return [
                f"{name}dimension {i} reaches {high[i]:.4g}, where float32, in which data are stored, has steps of "
                f"{step[i]:.2g}, but a standard deviation of {sample[:, i].std():.2g} only: subtract a constant, such as the "
                "mean, first"
            ]
    return []


def _flat(array: np.ndarray) -> np.ndarray:
    """(N, ...) -> (N, product of the rest)."""
    return array.reshape(len(array), math.prod(array.shape[1:]))  # not -1: the array may be empty


# ---- the arrays of a dataset or an episode -----------------------------------------------------------------------------


class Columns(NamedTuple):
    """The arrays of a dataset or an episode, checked one by one and against each other."""

    obs: np.ndarray  # (N, S) float32; of an episode (N + 1, S), or (N, S) if the last one was not recorded
    action: np.ndarray  # (N, *shape)
    rew: np.ndarray  # (N,)
    terminated: np.ndarray  # (N,) bool
    truncated: np.ndarray | None  # (N,) bool; None if there are none
    next_obs: np.ndarray | None  # (N, S) float32; None if there are none


def our_names(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arrays of `data` that are not None, with the names of D4RL and Gymnasium replaced by ours.

    Args:
        data: Arrays by name.
        where: What to call `data` in messages.

    Returns:
        At least `observations`, `actions`, `rewards` and `terminations`.

    Raises:
        ValueError: If one of these is missing, or the meaning of an array is ambiguous.
    """
    if "masks" in data and "terminals" in data:
        raise ValueError(
            f"{where} has 'masks' next to 'terminals' (OGBench), and other flags of ends: leave those out, or pass "
            "terminations=1 - masks and truncations=terminals instead"
        )
    if "dones" in data and "terminations" not in {OTHER_NAMES.get(key, key) for key in data}:
        raise ValueError(f"{where} has 'dones', which may be time-outs; pass terminations and truncations instead")
    named: dict[str, Any] = {}
    given: dict[str, str] = {}  # our name -> the name in `data`
    for key, value in data.items():
        if value is None:
            continue
        ours = OTHER_NAMES.get(key, key)
        if ours in named:
            one, other = (flags(f"{where}: {name}", data[name]) for name in (given[ours], key))
            if not np.array_equal(one, other):
                raise ValueError(
                    f"{where} has {key!r} next to {given[ours]!r}, two names of the same thing, and they differ; leave one out"
                )
        named[ours], given[ours] = value, key
    missing = [key for key in ("observations", "actions", "rewards", "terminations") if key not in named]
    if missing == ["terminations"]:
        raise ValueError(
            f"{where} has no terminations (D4RL: terminals), which the TD targets need; pass zeros if there are none"
        )
    if missing:
        imitation = "; BC and DiffusionBC do not read rewards: for these pass zeros" if missing == ["rewards"] else ""
        raise ValueError(f"{where} lacks {', '.join(missing)}; it has {listed(data)}{imitation}")
    if "next_observations" not in named and (close := [key for key in data if key.startswith("next_ob")]):
        warn(f"{where}: {close[0]!r} is not read; the observations after the actions are called 'next_observations'")
    return named


def dataset_columns(named: Mapping[str, Any], spec: Spec) -> Columns:
    """Check the arrays of a flat dataset.

    Args:
        named: The result of `our_names`.
        spec: The spaces that the arrays must fit.

    Returns:
        The arrays, N rows each, N at least 1.

    Raises:
        TypeError: As `numeric` and `actions`.
        ValueError: If an array does not fit the spaces or the arrays differ in length.
    """
    columns = _columns(named, spec, "")
    next_obs = None
    if "next_observations" in named:
        next_obs = observations("next_observations", named["next_observations"], obs_shapes(spec))
    columns = columns._replace(next_obs=next_obs)
    names = ("observations", "actions", "rewards", "terminations", "truncations", "next_observations")
    _equal_lengths({name: len(array) for name, array in zip(names, columns, strict=True) if array is not None})
    return columns


def episode_columns(named: Mapping[str, Any], spec: Spec, i: int) -> Columns:
    """Check the arrays of one episode.

    Args:
        named: The result of `our_names`.
        spec: The spaces that the arrays must fit.
        i: Index of the episode, for messages.

    Returns:
        The arrays of N steps, N at least 1, with N + 1 observations, or N if the last one is missing.

    Raises:
        TypeError: As `numeric` and `actions`.
        ValueError: If an array does not fit the spaces, the lengths do not fit, or the episode continues after its end.
    """
    columns = _columns(named, spec, f"episode {i} ")
    names = ("actions", "rewards", "terminations", "truncations")
    lengths = {name: len(array) for name, array in zip(names, columns[1:5], strict=True) if array is not None}
    n = _equal_lengths(lengths, f"the arrays of episode {i}")
    if "next_observations" in named:
        columns = columns._replace(obs=_with_last(columns.obs, named["next_observations"], n, spec, i))
    ends = columns.terminated if columns.truncated is None else columns.terminated | columns.truncated
    early = np.flatnonzero(ends[:-1])
    if early.size:
        what = "terminations" if columns.terminated[early[0]] else "truncations"
        raise ValueError(
            f"episode {i} continues after step {early[0]} of {n}, where {what} is true: an episode ends there; "
            "cut it after that step, or pass flat arrays"
        )
    if len(columns.obs) not in (n, n + 1):
        raise ValueError(
            f"episode {i} has {len(columns.obs)} observations for {n} actions, expected {n + 1}: "
            "the observation after the last action belongs to the episode"
        )
    return columns


def _columns(named: Mapping[str, Any], spec: Spec, prefix: str) -> Columns:
    """Check each array but `next_observations`; `prefix` goes before its name in messages."""
    action = actions(f"{prefix}actions", named["actions"], spec.action_space)
    obs = observations(f"{prefix}observations", named["observations"], obs_shapes(spec))
    rew = column(f"{prefix}rewards", named["rewards"])
    terminated = flags(f"{prefix}terminations", named["terminations"])
    truncated = flags(f"{prefix}truncations", named["truncations"]) if "truncations" in named else None
    return Columns(obs, action, rew, terminated, truncated, None)


def _equal_lengths(lengths: Mapping[str, int], where: str = "the arrays") -> int:
    """The common length. Raises ValueError with each array's length if they differ, or if it is 0."""
    n = lengths["actions"]
    wrong = [name for name, length in lengths.items() if length != n]
    if wrong:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        remedy = "every array needs one row per step"
        if wrong == ["observations"] and lengths["observations"] == n + 1:
            remedy = "with one more observation than actions this is one episode: pass a list of such dicts, [episode]"
        raise ValueError(f"{where} disagree in length ({listed}); {remedy}")
    if n == 0:
        raise ValueError(
            f"{where} are empty (0 steps), so there is nothing to learn from; check the path, the key or the filter"
        )
    return n


# ---- values ------------------------------------------------------------------------------------------------------------


def finite(columns: Mapping[str, np.ndarray], lengths: np.ndarray) -> None:
    """Check that all numbers are finite.

    Args:
        columns: Arrays by name, (N,) or (N, D).
        lengths: Steps of each episode, (E,), whose sum is N.

    Raises:
        ValueError: At the first NaN or infinity, with the array, the row and the number of bad rows.
    """
    for name, array in columns.items():
        good = np.isfinite(array)
        if good.all():
            continue
        bad = np.flatnonzero(~(good if good.ndim == 1 else good.all(axis=1)))
        raise ValueError(
            f"{name} contains NaN or infinity in {bad.size} of {len(array)} rows, first at "
            f"{_place(int(bad[0]), np.cumsum(lengths), lengths)}; drop those episodes, or repair the recording"
        )


def within_bounds(action: Tensor, spec: Spec, ends: Tensor, lengths: Tensor, clip: bool) -> Tensor:
    """Clip actions to the bounds of their space.

    Args:
        action: (N, A), in the environment's units.
        spec: Contains the action space.
        ends: One past the last row of each episode, (E,).
        lengths: Steps of each episode as recorded, (E,).
        clip: Whether to clip actions that lie further outside than rounding explains.

    Returns:
        (N, A); `action` itself if nothing had to be clipped.

    Raises:
        ValueError: If such actions exist and `clip` is false.
    """
    low = torch.as_tensor(spec.action_space.low.reshape(-1), dtype=action.dtype)
    high = torch.as_tensor(spec.action_space.high.reshape(-1), dtype=action.dtype)
    if bool((action.amin(0) >= low).all() and (action.amax(0) <= high).all()):
        return action
    outside = torch.maximum(action - high, low - action) > ACTION_TOLERANCE * (high - low)
    n_bad = int(outside.any(1).sum())
    if n_bad and not clip:
        row, dim = (int(i) for i in outside.nonzero()[0])
        value, bounds = float(action[row, dim]), f"[{float(low[dim]):.6g}, {float(high[dim]):.6g}]"
        raise ValueError(
            f"actions lie outside the action space in {n_bad} of {len(action)} rows, first at "
            f"{_place(row, ends.numpy(), lengths.numpy())}: dimension {dim} is {value:.6g}, outside {bounds}; "
            "clip them with load_dataset(..., clip_actions=True), or leave env= out if these are the wrong bounds"
        )
    return action.clamp(low, high)


def advise(obs: Tensor, rew: Tensor, done: Tensor, lengths: Tensor) -> list[str]:
    """Warnings about valid but suspicious data.

    Args:
        obs: (N, S).
        rew: (N,).
        done: (N,).
        lengths: Steps of each episode as recorded, (E,).

    Returns:
        The warnings, one line each.
    """
    advice, n_episodes = [], len(lengths)
    if bool(rew.min() == rew.max()) and not bool(done.any()):
        advice.append(f"the reward is always {float(rew[0]):g} and no episode terminates: only behaviour cloning is meaningful")
    # The last episode may have been stopped by the end of the recording.
    n_terminated, usual = int(done.sum()), int(lengths[0])
    if n_terminated >= 5 and n_terminated >= n_episodes - 1 and usual > 1 and bool((lengths[: n_episodes - 1] == usual).all()):
        advice.append(
            f"{n_terminated} episodes terminate, all after exactly {usual} steps: if that is a time limit, pass these flags as "
            "truncations, and zeros as terminations"
        )
    if n_episodes == 1:
        advice.append("the data contain one episode: if there are more, their ends are missing (see truncations)")
    std = obs[:: max(1, len(obs) // 10_000)].std(dim=0, correction=0)  # a sample: only the order of magnitude matters
    if float(std.max()) > 50.0:
        where = f"observation dimension {int(std.argmax())} has a std of {float(std.max()):.3g}"
        advice.append(f"{where}: consider normalize_obs=True")
    return advice


def _with_last(obs: np.ndarray, next_observations: Any, n: int, spec: Spec, i: int) -> np.ndarray:
    """The n + 1 observations of episode i, of which n are in `obs`, from its n next observations."""
    next_obs = observations("next_observations", next_observations, obs_shapes(spec))
    if len(next_obs) != n or len(obs) not in (n, n + 1):
        raise ValueError(
            f"episode {i} has {len(obs)} observations and {len(next_obs)} next_observations for {n} actions: pass {n} of each, "
            f"or {n + 1} observations alone"
        )
    wrong = np.flatnonzero((next_obs[: len(obs) - 1] != obs[1:]).any(axis=1))
    if wrong.size:
        raise ValueError(
            f"episode {i}: the next observation of step {wrong[0]} is not the observation of step {wrong[0] + 1}; "
            "end the episode there, or leave next_observations out"
        )
    return np.concatenate([obs[:n], next_obs[-1:]])


def _place(row: int, ends: np.ndarray, lengths: np.ndarray) -> str:
    """Position of `row` in the user's data, accounting for rows dropped at the ends of episodes."""
    episode = int(np.searchsorted(ends, row, side="right"))
    step = row - (int(ends[episode - 1]) if episode else 0)
    return f"row {int(lengths[:episode].sum()) + step} (episode {episode}, step {step})"


# ---- a dataset and an environment --------------------------------------------------------------------------------------


def fits(data: Spec, env: Spec, bounds_from_data: bool) -> None:
    """Check that a dataset can come from an environment.

    Args:
        data: The dataset's spaces.
        env: The environment's spaces.
        bounds_from_data: Whether the dataset's action bounds are only those of its actions, and so need not agree.

    Raises:
        ValueError: If the shapes or the action bounds differ.
    """
    remedy = "pass the environment that the data come from, or leave env= out"
    have, want = obs_shapes(data), obs_shapes(env)
    if have != want:
        raise ValueError(f"observations are {_show(have)} in the data, but {_show(want)} in env; {remedy}")
    own, new = data.action_space, env.action_space
    if own.shape != new.shape:
        raise ValueError(f"actions have shape {own.shape} in the data, but {new.shape} in env; {remedy}")
    if not bounds_from_data and not (np.allclose(own.low, new.low) and np.allclose(own.high, new.high)):
        raise ValueError(
            f"action bounds are [{own.low.min():g}, {own.high.max():g}] in the data, "
            f"but [{new.low.min():g}, {new.high.max():g}] in env; {remedy}"
        )


def _show(shapes: Shapes) -> str:
    """The shapes for a message."""
    return str(shapes[None]) if None in shapes else str(dict(shapes))


# ---- warnings ----------------------------------------------------------------------------------------------------------


def warn(message: str) -> None:
    """Issue a UserWarning at the line that called the caller of this function."""
    warnings.warn(printable(message), UserWarning, stacklevel=3)
