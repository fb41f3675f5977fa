"""The types that every module uses: `Batch` (transitions), `Spec` (the spaces of a policy) and `Metrics`; and spaces as JSON.

Shapes: B batch, S flat observation, A flat action. Actions lie in [-1, 1] wherever the name is `act` (inside the library), and
are in the environment's own units wherever it is `action` (outside).
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from torch import Tensor

Metrics = dict[str, Tensor]
"""Named scalar tensors, which stay on the device until they are logged."""


class Batch(NamedTuple):
    """A mini-batch of transitions, all float32 on the training device."""

    obs: Tensor  # (B, S)
    act: Tensor  # (B, A), scaled to [-1, 1]
    rew: Tensor  # (B,), after the reward transform
    next_obs: Tensor  # (B, S)
    done: Tensor  # (B,), 1 at a true termination, else 0; a time-out is not a termination
    extras: dict[str, Tensor] = {}  # noqa: RUF012  (B, ...) each, what a stage's `prepare` added to each transition


@dataclass(frozen=True)
class Spec:
    """The observations and actions of a policy, and their conversion to and from flat arrays.

    Args:
        observation_space: A Box, or a Dict whose keys in `obs_keys` are Boxes, of which the other keys are left out; vectors
            only, no images.
        action_space: A Box with finite bounds.
        obs_keys: The keys of a Dict observation that are concatenated, in order; None for a Box observation.

    Raises:
        ValueError: If a space is of a kind that the library cannot learn on.
        TypeError: If `obs_keys` is a string.
    """

    observation_space: spaces.Space[Any]
    action_space: spaces.Box
    obs_keys: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.action_space, spaces.Box):
            raise ValueError(
                f"action space {self.action_space} is not a Box: diffusion agents need continuous actions; "
                "wrap the environment, or choose an algorithm for discrete actions"
            )
        _check_dtype(self.action_space, "action space")
        low, high = self.action_space.low, self.action_space.high
        if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high)) and np.all(low < high)):
            raise ValueError(
                f"action space bounds must be finite with low < high, not [{low.min()}, {high.max()}]: "
                "wrap the environment with gymnasium.wrappers.RescaleAction, or leave env= out to take the bounds from the data"
            )
        with np.errstate(over="ignore"):
            if not np.all(np.isfinite(2.0 * (high - low))):  # `unscale_action` multiplies it by up to 2
                raise ValueError(
                    f"action space bounds [{low.min()}, {high.max()}] are too far apart for float32; rescale the actions, "
                    "e.g. with gymnasium.wrappers.RescaleAction"
                )
        width = high.astype(np.float64) - low.astype(np.float64)
        if np.any((width > 0) & (width < np.finfo(np.float32).tiny)):  # `scale_action` divides by it
            raise ValueError(
                f"action space bounds [{low.min()}, {high.max()}] are too close together for float32; rescale the actions, "
                "e.g. with gymnasium.wrappers.RescaleAction"
            )
        if isinstance(self.obs_keys, str):
            raise TypeError(f"obs_keys={self.obs_keys!r} is a string, not a tuple of keys; pass obs_keys=({self.obs_keys!r},)")
        if self.obs_keys is None:
            _check_box(self.observation_space, "observation space")
            return
        if not isinstance(self.observation_space, spaces.Dict):
            raise ValueError(f"obs_keys={self.obs_keys} needs a Dict observation space, not {self.observation_space}")
        if not self.obs_keys:
            raise ValueError(f"obs_keys is empty; choose at least one of {list(self.observation_space.spaces)}")
        for key in self.obs_keys:
            if key not in self.observation_space.spaces:
                raise ValueError(f"obs_keys names {key!r}, but the observation has {list(self.observation_space.spaces)}")
            _check_box(self.observation_space.spaces[key], f"observation {key!r}")
        if len(self.observation_space.spaces) > len(self.obs_keys):  # the others are not read, and may be of any kind
            parts = OrderedDict((key, self.observation_space.spaces[key]) for key in self.obs_keys)
            object.__setattr__(self, "observation_space", spaces.Dict(parts))

    @classmethod
    def from_spaces(
        cls,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        obs_keys: tuple[str, ...] | None = None,
    ) -> "Spec":
        """A Spec in which a Dict observation gets default keys.

        Args:
            observation_space: As in `Spec`.
            action_space: As in `Spec`.
            obs_keys: As in `Spec`. Default for a Dict: `observation`, `achieved_goal` (where that is a Box) and `desired_goal`
                if it has the first and the last, else all keys. The achieved goal is the position in a maze, which the
                observation of AntMaze in Gymnasium-Robotics does not contain, unlike that of D4RL.

        Returns:
            The Spec.

        Raises:
            ValueError: As `Spec`.
            TypeError: As `Spec`.
        """
        if isinstance(observation_space, spaces.Dict) and obs_keys is None:
            parts = observation_space.spaces
            obs_keys = tuple(parts)
            if {"observation", "desired_goal"} <= set(parts):
                achieved = ("achieved_goal",) if isinstance(parts.get("achieved_goal"), spaces.Box) else ()
                obs_keys = ("observation", *achieved, "desired_goal")
        if obs_keys is not None and not isinstance(obs_keys, str):  # a string is kept, so that Spec rejects it
            obs_keys = tuple(obs_keys)
        return cls(observation_space, action_space, obs_keys)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """Spaces and keys as strict JSON values.

        Raises:
            ValueError: If a space is neither a Box nor a Dict of them.
        """
        keys = list(self.obs_keys) if self.obs_keys is not None else None
        return {
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "obs_keys": keys,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Spec":
        """The inverse of `to_json`.

        Raises:
            ValueError: If `data` is malformed; the message names the place.
        """
        observation_space = space_from_json(data.get("observation_space"), "observation_space")
        keys = data.get("obs_keys")
        if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
            raise ValueError("obs_keys is not a list of names")
        action_space = space_from_json(data.get("action_space"), "action_space")
        return cls(observation_space, action_space, tuple(keys) if keys is not None else None)  # type: ignore[arg-type]

    @property
    def obs_dim(self) -> int:
        """S, the length of the flat observation."""
        return sum(int(np.prod(s.shape or ())) for s in self._leaves())

    @property
    def act_dim(self) -> int:
        """A, the length of the flat action."""
        return int(np.prod(self.action_space.shape))

    def _leaves(self) -> list[spaces.Space[Any]]:
        if self.obs_keys is None:
            return [self.observation_space]
        return [self.observation_space[key] for key in self.obs_keys]  # type: ignore[index]

    def flatten_obs(self, obs: Any) -> tuple[np.ndarray, bool]:
        """Flatten one observation or a batch.

        Args:
            obs: An array or tensor on the CPU; for a Dict observation a mapping of them. With or without a batch dimension.

        Returns:
            The flat observations, (B, S) float32 with B = 1 for a single one; and whether `obs` was a batch.

        Raises:
            ValueError: If shape, keys or values do not fit the observation space.
            TypeError: For Gymnasium's `(obs, info)` tuple.
        """
        if isinstance(obs, tuple):
            raise TypeError(
                "the observation is a tuple: in Gymnasium, env.reset() returns (obs, info) and env.step() five values; "
                "pass the observation alone, e.g. obs, info = env.reset()"
            )
        if self.obs_keys is None:
            if isinstance(obs, Mapping):
                raise ValueError(f"the observation is a dict, but the agent was built for {self.observation_space}")
            return _flat(obs, self.observation_space.shape or (), "observation")
        if not isinstance(obs, Mapping):
            raise ValueError(f"the observation must be a dict with the keys {list(self.obs_keys)}, not {type(obs).__name__}")
        missing = [key for key in self.obs_keys if key not in obs]
        if missing:
            raise ValueError(f"the observation lacks the keys {missing}; it has {list(obs)}")
        parts = [
            _flat(obs[key], leaf.shape or (), f"observation {key!r}")
            for key, leaf in zip(self.obs_keys, self._leaves(), strict=True)
        ]
        sizes = {part.shape[0] for part, _ in parts}
        if len(sizes) > 1 or len({batched for _, batched in parts}) > 1:
            raise ValueError(f"the observation's keys disagree on the batch size: {sorted(sizes)}")
        return np.concatenate([part for part, _ in parts], axis=1), parts[0][1]

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """Scale actions from the environment's units, (B, *shape), to [-1, 1], (B, A) float32."""
        low, high = self._bounds()
        flat = np.asarray(action, np.float32).reshape(-1, self.act_dim)
        if np.all(low == -1) and np.all(high == 1):
            return flat
        return (2.0 * (flat - low) / (high - low) - 1.0).astype(np.float32)

    def unscale_action(self, act: np.ndarray) -> np.ndarray:
        """Scale actions from [-1, 1], (B, A), to the environment's units, (B, *shape), clipped; integers are rounded."""
        low, high = self._bounds()
        action = low + (np.clip(act, -1.0, 1.0) + 1.0) * 0.5 * (high - low)
        return in_dtype(np.clip(action, low, high).reshape(-1, *self.action_space.shape), self.action_space.dtype)

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.action_space.low.reshape(-1), self.action_space.high.reshape(-1)
        if low.dtype.kind != "f":  # differences of small integers would wrap around
            kind = np.result_type(low.dtype, np.float32)
            low, high = low.astype(kind), high.astype(kind)
        return low, high


def in_dtype(action: np.ndarray, dtype: Any) -> np.ndarray:
    """Actions in the dtype of a space: rounded to the nearest integers for integers."""
    return (np.rint(action) if np.dtype(dtype).kind in "iu" else action).astype(dtype, copy=False)


_BOX_DTYPES = {"float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint32", "uint16", "uint8"}
_MAX_SPACE_SIZE = 1_000_000  # numbers in all Boxes together of a space that is read from a file, which may be hostile


def space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """A Box, or a Dict of them, as strict JSON values.

    Bounds are exact: a list, or one number where all are equal; infinity is "inf" or "-inf".

    Raises:
        ValueError: For other spaces.
    """
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {key: space_to_json(item) for key, item in space.spaces.items()}}
    if not isinstance(space, spaces.Box) or str(space.dtype) not in _BOX_DTYPES:
        raise ValueError(f"the space {space} cannot be stored; only a Box of numbers or a Dict of such Boxes can")
    low, high = (_bound(b.flat[0] if b.size and (b == b.flat[0]).all() else b) for b in (space.low, space.high))
    return {"type": "Box", "low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}


def _bound(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_bound(item) for item in value]
    number = value.item()
    return number if math.isfinite(number) else str(number)


def space_from_json(data: Any, where: str = "space") -> spaces.Space[Any]:
    """The inverse of `space_to_json`, with the keys of a Dict in the same order.

    Args:
        data: What `space_to_json` returned, perhaps from an untrusted file.
        where: Name of the place, for messages.

    Returns:
        The space.

    Raises:
        ValueError: If `data` is malformed; the message begins with the place.
    """
    try:
        _check_size(data, where)
        return _space_from_json(data, where)
    except Exception as error:  # of many types, from numpy and gymnasium too
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where} is not a Box or Dict of Boxes ({ascii(str(error))[1:-1][:80]})") from None


def _check_size(data: Any, where: str) -> None:
    """Raises ValueError, with the place, for the smallest part of a stored space that is too large."""
    if isinstance(data, dict) and data.get("type") == "Dict" and isinstance(data.get("spaces"), dict):
        for key, part in data["spaces"].items():
            if _size(part) > _MAX_SPACE_SIZE:
                _check_size(part, f"{where}[{key[:40]!a}]")
    if _size(data) > _MAX_SPACE_SIZE:
        raise ValueError(f"{where} is not a Box or Dict of Boxes (too large)")


def _size(data: Any) -> int:
    """How many numbers the bounds of a stored space have; an empty or malformed Box counts as one."""
    try:
        if data["type"] == "Dict":
            return sum(map(_size, data["spaces"].values()))
        return math.prod(max(n, 1) for n in data["shape"])
    except Exception:  # what is malformed is refused at its place, later
        return 1


def _space_from_json(data: Any, where: str) -> spaces.Space[Any]:
    """`space_from_json` of a space that is not too large; errors of any type."""
    kind = data["type"]
    if kind == "Dict":
        # pairs, because gymnasium sorts the keys of a plain dict
        return spaces.Dict(OrderedDict((k, space_from_json(v, f"{where}[{k[:40]!a}]")) for k, v in data["spaces"].items()))
    shape, dtype = tuple(data["shape"]), data["dtype"]
    if kind != "Box" or dtype not in _BOX_DTYPES:
        raise ValueError("unknown type or dtype")
    low, high = (
        np.array(data[key], dtype) if isinstance(data[key], list) else np.full(shape, data[key], dtype)
        for key in ("low", "high")
    )
    return spaces.Box(low, high, shape, np.dtype(dtype).type)


def _check_dtype(space: spaces.Box, name: str) -> None:
    if str(space.dtype) not in _BOX_DTYPES:
        raise ValueError(
            f"{name} {space} is a Box of {space.dtype}, which cannot be stored; wrap the environment to make it float32"
        )


def _check_box(space: spaces.Space[Any], name: str) -> None:
    if not isinstance(space, spaces.Box):
        raise ValueError(f"{name} {space} is not a Box; choose other obs_keys, or wrap the environment (FlattenObservation)")
    _check_dtype(space, name)
    if len(space.shape) > 2 or (space.dtype == np.uint8 and len(space.shape) == 2):
        raise ValueError(f"{name} {space} looks like an image, but only vectors are supported; encode it as a vector first")


def _flat(value: Any, shape: tuple[int, ...], name: str) -> tuple[np.ndarray, bool]:
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} is a tensor that requires grad; call .detach() on it first")
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise ValueError(f"{name} is a tensor on {value.device}; call .cpu() on it first")
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a list of tensors that require grad
        raise ValueError(f"{name} cannot be read as float32 numbers: {' '.join(str(error).split())}") from None
    batched = array.ndim == len(shape) + 1
    if array.shape[1 if batched else 0 :] != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape} or a batch {('B', *shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} contains NaN or infinity: {array.reshape(-1)[~np.isfinite(array.reshape(-1))][:3]}")
    n_rows = array.shape[0] if batched else 1
    return array.reshape(n_rows, math.prod(shape)), batched  # not -1: the batch may be empty
