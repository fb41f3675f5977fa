"""What a dataset must satisfy. Every refusal is one line that names the place and the cure."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from torch import Tensor

from diffagents.envs.make import difference_of_specs
from diffagents.errors import one_line
from diffagents.types import Spec

ACTION_TOLERANCE = 1e-4
"""Overshoot of the action bounds, as a share of their width, that counts as rounding and is clipped without a word."""

Shapes = dict[str | None, tuple[int, ...]]
"""Observation key -> shape of one observation; the key None stands for an observation that is no dict."""


def obs_shapes(spec: Spec) -> Shapes:
    """What the observations of `spec` look like, key by key, in order."""
    if spec.obs_keys is None:
        return {None: spec.observation_space.shape or ()}
    assert isinstance(spec.observation_space, spaces.Dict)  # Spec has checked it
    return {key: spec.observation_space[key].shape or () for key in spec.obs_keys}


def fits(data: Spec, env: Spec, bounds_from_data: bool) -> None:
    """Raises ValueError where data of the spec `data` cannot come from `env`: shapes, or bounds unless they are guessed."""
    cure = "pass the environment that the data come from, or leave env= out"
    have, want = obs_shapes(data), obs_shapes(env)
    if have != want:
        raise ValueError(f"observations are {_show(have)} in the data, but {_show(want)} in env; {cure}")
    own, new = data.action_space, env.action_space
    if own.shape != new.shape:
        raise ValueError(f"actions have shape {own.shape} in the data, but {new.shape} in env; {cure}")
    if not bounds_from_data and not (np.allclose(own.low, new.low) and np.allclose(own.high, new.high)):
        raise ValueError(
            f"action bounds are [{own.low.min():g}, {own.high.max():g}] in the data, "
            f"but [{new.low.min():g}, {new.high.max():g}] in env; {cure}"
        )


def another_env(name: str, stored: str, given: EnvSpec) -> str | None:
    """A line about where the environment `given` is another than the one in the JSON `stored`; None where it is not."""
    difference = difference_of_specs(stored, vars(given))
    if difference is None:
        return None
    cure = "the stored one is kept for evaluation; pass env= there for another"
    return f"{name}: env= is not the environment stored with the dataset ({difference}); {cure}"


def _show(shapes: Shapes) -> str:
    return str(shapes[None]) if None in shapes else str(dict(shapes))


def numeric(name: str, value: Any) -> np.ndarray:
    """`value` as an array of real numbers. Raises TypeError for objects, strings or complex, ValueError if ragged."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is no array ({one_line(error)}); give every row the same shape") from None
    if array.dtype.kind not in "biuf":
        cure = "take the real part" if array.dtype.kind == "c" else "convert it to float32 numbers"
        raise TypeError(f"{name} has dtype {array.dtype}, which is not a real number; {cure}")
    return array


def column(name: str, value: Any) -> np.ndarray:
    """One number per step: (N,), or (N, 1) squeezed. Raises ValueError for any other shape."""
    array = numeric(name, value)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected (N,): one number per step")
    return array


def flags(name: str, value: Any) -> np.ndarray:
    """A column of 0/1 as bool (N,). Raises ValueError at the first other value."""
    array = column(name, value)
    if array.dtype == bool:
        return array
    wrong = np.flatnonzero((array != 0) & (array != 1))
    if wrong.size:
        raise ValueError(f"{name} is {array[wrong[0]]:g} at row {wrong[0]}; only 0 (no) and 1 (yes) are allowed")
    return array.astype(bool)


def rows(name: str, value: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """One vector per step: (N, *shape), or any (N, ...) where `shape` is None. Raises ValueError with both shapes."""
    array = numeric(name, value)
    if shape is None and array.ndim < 2:
        raise ValueError(f"{name} has shape {array.shape}, expected (N, D); for one dimension pass array[:, None]")
    if shape is not None and array.shape[1:] != shape:
        raise ValueError(
            f"{name} has shape {array.shape}, but the space needs (N, {', '.join(map(str, shape))}): "
            "the data or env= belong to another task, or an axis is missing"
        )
    return array


def actions(name: str, value: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """As `rows`, for continuous actions. Raises TypeError for integers, which are what discrete actions look like."""
    array = numeric(name, value)
    if array.dtype.kind != "f":
        raise TypeError(
            f"{name} has dtype {array.dtype}: integer actions look discrete, diffusion agents need continuous ones; "
            "if they are continuous, convert with .astype('float32')"
        )
    return rows(name, array, shape)


def equal_lengths(lengths: Mapping[str, int], where: str = "the arrays") -> int:
    """The common length. Raises ValueError listing each array's own where they disagree, or where it is 0."""
    n = lengths["actions"]
    wrong = [name for name, length in lengths.items() if length != n]
    if wrong:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        cure = "every array needs one row per step"
        if wrong == ["observations"] and lengths["observations"] == n + 1:
            cure = "with one observation more than actions this is one episode: pass a list of such dicts, [episode]"
        raise ValueError(f"{where} disagree in length ({listed}); {cure}")
    if n == 0:
        raise ValueError(f"{where} are empty (0 steps): nothing to learn from; check the path, the key or the filter")
    return n


def place(row: int, ends: np.ndarray, lengths: np.ndarray) -> str:
    """Where `row` lies in the data as given, although rows may have been dropped at the ends of episodes."""
    episode = int(np.searchsorted(ends, row, side="right"))
    step = row - (int(ends[episode - 1]) if episode else 0)
    return f"row {int(lengths[:episode].sum()) + step} (episode {episode}, step {step})"


def finite(columns: Mapping[str, np.ndarray], lengths: np.ndarray) -> None:
    """Raises ValueError at the first NaN or infinity, naming the array, the row and how many rows are bad."""
    for name, array in columns.items():
        good = np.isfinite(array)
        if good.all():
            continue
        bad = np.flatnonzero(~(good if good.ndim == 1 else good.all(axis=1)))
        at = place(int(bad[0]), np.cumsum(lengths), lengths)
        raise ValueError(
            f"{name} holds NaN or infinity in {bad.size} of {len(array)} rows, first at {at}; "
            "drop those episodes, or repair the recording"
        )


def within_bounds(action: Tensor, spec: Spec, ends: Tensor, lengths: Tensor, clip: bool) -> Tensor:
    """`action` (N, A) clipped to the space's bounds; the same tensor if nothing had to be clipped.

    Raises ValueError where it lies further outside than rounding explains, unless `clip`.
    """
    low = torch.as_tensor(spec.action_space.low.reshape(-1), dtype=action.dtype)
    high = torch.as_tensor(spec.action_space.high.reshape(-1), dtype=action.dtype)
    if bool((action.amin(0) >= low).all() and (action.amax(0) <= high).all()):
        return action
    outside = torch.maximum(action - high, low - action) > ACTION_TOLERANCE * (high - low)
    n_bad = int(outside.any(1).sum())
    if n_bad and not clip:
        row, dim = (int(i) for i in outside.nonzero()[0])
        at = place(row, ends.numpy(), lengths.numpy())
        value, bounds = float(action[row, dim]), f"[{float(low[dim]):.6g}, {float(high[dim]):.6g}]"
        raise ValueError(
            f"actions leave the action space in {n_bad} of {len(action)} rows, first at {at}: "
            f"dimension {dim} is {value:.6g}, outside {bounds}; pass clip_actions=True to clip them, "
            "or leave env= out if these are the wrong bounds"
        )
    return action.clamp(low, high)


def advise(obs: Tensor, rew: Tensor, done: Tensor, n_episodes: int) -> list[str]:
    """Warnings about data that can be learnt from, but probably not as hoped; one line each."""
    found = []
    if bool(rew.min() == rew.max()) and not bool(done.any()):
        found.append(f"the reward is always {float(rew[0]):g} and no episode terminates: only cloning can learn here")
    if n_episodes == 1:
        found.append("the data hold one episode: if there are more, their ends are missing (see truncations)")
    std = obs[:: max(1, len(obs) // 10_000)].std(dim=0, correction=0)  # a sample: only the order of magnitude matters
    if float(std.max()) > 50.0:
        where = f"observation dimension {int(std.argmax())} has a std of {float(std.max()):.3g}"
        found.append(f"{where}: consider normalize_obs=True")
    return found


def warn(message: str) -> None:
    """One line to the user, as a UserWarning."""
    warnings.warn(message, UserWarning, stacklevel=3)
