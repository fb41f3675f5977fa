"""Transitions: a dataset as it is, on the CPU. Sampler: the same, as the learner sees it, on the training device.

`from_arrays` and `from_episodes` make the first, by one rule for the next observation. Where it is recorded (T+1 observations
per episode, or `next_observations`) every row is kept. Where it is not, it is the next row of the same episode, and the last
row of an episode is dropped unless it terminated (then the next observation is masked anyway). Terminations mask the
bootstrap, truncations never do; at a row with both flags the episode terminated.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffagents import dataset_checks as check
from diffagents.artifact import space_from_json, space_to_json
from diffagents.normalize import ObsNormalizer, RewardTransform, fit_reward_transform
from diffagents.types import Batch, Spec

FILE_FORMAT = 1
"""Number of the file layout of `Transitions.save`; a file of another number is refused."""
D4RL_NAMES = {"terminals": "terminations", "timeouts": "truncations"}
"""D4RL's name of an array -> ours."""
_COLUMNS = ("obs", "action", "rew", "next_obs", "done", "episode_ends", "episode_returns", "episode_lengths", "episode_whole")
_ROWS_AT_ONCE = 65_536  # small enough that temporaries do not matter beside the matrix, large enough to be quick


@dataclass
class Transitions:
    """N transitions of E episodes in the environment's units, with raw rewards; all tensors on the CPU.

    Some episodes have lost their last row (its next observation is unknown), so `episode_ends` counts the rows that are here,
    while `episode_lengths` and `episode_returns` describe the episodes as recorded.
    """

    obs: Tensor  # (N, S) float32
    action: Tensor  # (N, A) float32, environment units
    rew: Tensor  # (N,) float32
    next_obs: Tensor  # (N, S) float32; arbitrary but finite where done is 1
    done: Tensor  # (N,) float32, 1 at a true termination
    episode_ends: Tensor  # (E,) int64, one past the episode's last row here; equal neighbours: no row was left
    episode_returns: Tensor  # (E,) float32, undiscounted
    episode_lengths: Tensor  # (E,) int64
    episode_whole: Tensor  # (E,) bool, False where recording began or stopped in mid-episode
    spec: Spec
    info: dict[str, Any] = field(default_factory=dict)  # JSON values; keys listed at `datasets.load_dataset`

    def __len__(self) -> int:
        return len(self.rew)

    def fit_reward_transform(self, name: str) -> RewardTransform:
        """The reward transform `name` fitted on these data; returns of cut episodes are left out if any is whole.

        An episode that the end of the recording cut short returns little, which would widen the range of returns.
        """
        whole = self.episode_returns[self.episode_whole]
        returns = whole if len(whole) > 1 else self.episode_returns
        return fit_reward_transform(name, self.rew, returns, terminal_rewards=self.rew[self.done == 1])

    def sampler(
        self, device: torch.device | str, reward_transform: RewardTransform | None = None, obs_normalizer: ObsNormalizer | None = None
    ) -> "Sampler":
        """A copy of the data on `device` in the learner's units; None stands for raw rewards and raw observations."""
        transform = reward_transform or RewardTransform()
        normalizer = ObsNormalizer(self.spec.obs_dim)
        if obs_normalizer is not None:
            normalizer.load_state_dict(obs_normalizer.state_dict())
        matrix = torch.empty(len(self), 2 * self.spec.obs_dim + self.spec.act_dim + 2, device=device)
        for start in range(0, len(self), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            columns = (
                normalizer(self.obs[part]),
                torch.from_numpy(self.spec.scale_action(self.action[part].numpy())),
                transform(self.rew[part])[:, None],
                self.done[part, None],
                normalizer(self.next_obs[part]),
            )
            matrix[part] = torch.cat(columns, dim=1).to(device)
        return Sampler(matrix, self.spec.obs_dim, self.spec.act_dim)

    def save(self, path: str | PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
        """Write one safetensors file; `extra` (JSON values) is kept beside the data. Not atomic."""
        obs_space, act_space = space_to_json(self.spec.observation_space), space_to_json(self.spec.action_space)
        header = {
            "format": FILE_FORMAT, "observation_space": obs_space, "action_space": act_space, "obs_keys": self.spec.obs_keys,
            "info": self.info, "extra": dict(extra or {}),
        }  # fmt: skip
        save_file({name: getattr(self, name).contiguous() for name in _COLUMNS}, path, {"diffagents": json.dumps(header)})

    @classmethod
    def load(cls, path: str | PathLike[str], extra: Mapping[str, Any] | None = None) -> "Transitions":
        """Read what `save` wrote. Raises ValueError for another format, or where `extra` is not what was saved."""
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("diffagents", "{}"))
            if header.get("format") != FILE_FORMAT:
                raise ValueError(f"{path} has transitions format {header.get('format')}, expected {FILE_FORMAT}; save it again")
            if extra is not None and header["extra"] != dict(extra):
                raise ValueError(f"{path} was made from other data")
            columns = {name: file.get_tensor(name) for name in _COLUMNS}
        keys = header["obs_keys"]
        space, action_space = space_from_json(header["observation_space"]), space_from_json(header["action_space"])
        return cls(**columns, spec=Spec.from_spaces(space, action_space, keys), info=header["info"])

    def fingerprint(self) -> str:
        """sha256 hex of shapes, of exact sums and of up to 4096 rows: cheap, and the same on every machine."""
        digest = hashlib.sha256()
        for name in ("obs", "action", "rew", "next_obs", "done", "episode_ends"):
            tensor = getattr(self, name).contiguous()
            # Bits summed as integers: a float sum depends on its order, hence on the number of threads.
            total = int(tensor.view(torch.int32).sum(dtype=torch.int64))
            digest.update(f"{name} {tuple(tensor.shape)} {total} ".encode())
            digest.update(tensor[:: max(1, len(tensor) // 4096)].contiguous().numpy().tobytes())
        return digest.hexdigest()


class Sampler:
    """Transitions in the learner's units as one float32 matrix (N, 2S + A + 2) on one device.

    Columns: obs (S) | act in [-1, 1] (A) | rew | done | next_obs (S). One matrix makes a batch one gather.
    """

    def __init__(self, matrix: Tensor, obs_dim: int, act_dim: int) -> None:
        self.matrix = matrix
        self.obs_dim = obs_dim
        self.act_dim = act_dim
        self.max_abs_reward = float(matrix[:, obs_dim + act_dim].abs().max())  # asked once, before training

    def __len__(self) -> int:
        return self.matrix.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the matrix lives; the generator given to `sample` must live there too."""
        return self.matrix.device

    @property
    def obs(self) -> Tensor:
        """All normalised observations, a view (N, S)."""
        return self.matrix[:, : self.obs_dim]

    @property
    def rew(self) -> Tensor:
        """All transformed rewards, a view (N,)."""
        return self.matrix[:, self.obs_dim + self.act_dim]

    def sample(self, n: int, generator: torch.Generator) -> Batch:
        """n transitions drawn uniformly with replacement; the fields are views of one fresh (n, 2S + A + 2) tensor."""
        index = torch.randint(len(self), (n,), generator=generator, device=self.device)
        return self.gather(index)

    def gather(self, index: Tensor) -> Batch:
        """The transitions at `index` (n,) int64, on the sampler's device."""
        rows = self.matrix.index_select(0, index)
        rew = self.obs_dim + self.act_dim
        return Batch(
            obs=rows[:, : self.obs_dim],
            act=rows[:, self.obs_dim : rew],
            rew=rows[:, rew],
            done=rows[:, rew + 1],
            next_obs=rows[:, rew + 2 :],
        )


def obs_shapes(spec: Spec) -> dict[str | None, tuple[int, ...]]:
    if spec.obs_keys is None:
        return {None: spec.observation_space.shape or ()}
    assert isinstance(spec.observation_space, spaces.Dict)  # Spec has checked it
    return {key: spec.observation_space[key].shape or () for key in spec.obs_keys}


def _observations(name: str, value: Any, shapes: Mapping[str | None, tuple[int, ...]]) -> np.ndarray:
    """An array or a dict of arrays -> a new float32 array (N, S), its parts in the order of `shapes`."""
    if None in shapes:
        if isinstance(value, Mapping):
            raise ValueError(f"{name} is a dict with {list(value)}, expected one array of shape (N, {shapes[None]})")
        array = check.rows(name, value, shapes[None])
        return np.array(array.reshape(len(array), -1), np.float32)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dict with the keys {list(shapes)}, not one array; the space is a Dict")
    missing = [key for key in shapes if key not in value]
    if missing:
        raise ValueError(f"{name} lacks the keys {missing}; it has {list(value)}: choose with obs_keys=")
    parts = [check.rows(f"{name}/{key}", value[key], shape) for key, shape in shapes.items()]
    lengths = {f"{name}/{key}": len(part) for key, part in zip(shapes, parts, strict=True)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the parts of {name} disagree in length {lengths}; every part needs one row per step")
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1, dtype=np.float32)


def _guess_spec(observations: Any, actions: Any, keys: tuple[str, ...] | None) -> Spec:
    """Spaces from the arrays alone; the action bounds are a stand-in until the data are known to be finite."""

    def box(name: str, value: Any) -> spaces.Box:
        array = check.rows(name, value, None)
        if array.dtype == np.uint8:  # Spec refuses images by this dtype
            return spaces.Box(0, 255, array.shape[1:], np.uint8)
        return spaces.Box(-np.inf, np.inf, array.shape[1:], np.float32)

    space: spaces.Space[Any]
    if isinstance(observations, Mapping):
        space = spaces.Dict({key: box(f"observations/{key}", value) for key, value in observations.items()})
    else:
        space = box("observations", observations)
    shape = check.actions("actions", actions, None).shape[1:]
    return Spec.from_spaces(space, spaces.Box(-1.0, 1.0, shape, np.float32), keys)


def _bounds_of(action: np.ndarray, space: spaces.Box) -> spaces.Box:
    low, high = action.min(axis=0), action.max(axis=0)
    constant = low == high  # any width would do; bounds must differ
    return spaces.Box(
        np.where(constant, low - 1, low).reshape(space.shape), np.where(constant, high + 1, high).reshape(space.shape), dtype=np.float32
    )


def _named(data: Mapping[str, Any], where: str, required: Sequence[str]) -> dict[str, Any]:
    named = {D4RL_NAMES.get(key, key): value for key, value in data.items()}
    if "terminations" not in named and "dones" in named:
        raise ValueError(f"{where} has 'dones', which mixes terminations and time-outs; give terminations and truncations instead")
    if "masks" in named and "terminals" in data:
        raise ValueError(f"{where} has 'masks' (OGBench): there terminals mean any end; pass terminations=1 - masks, truncations=terminals")
    missing = [key for key in required if key not in named]
    if missing == ["terminations"]:
        raise ValueError(f"{where} has no terminations (D4RL: terminals), so the bootstrap cannot be masked; pass zeros if there are none")
    if missing:
        raise ValueError(f"{where} lacks {missing}; it has {list(data)}")
    return named


def from_arrays(
    data: Mapping[str, Any], keys: tuple[str, ...] | None, limit: int | None, info: dict[str, Any],
    spec: Spec | None = None, breaks: np.ndarray | None = None, cut: np.ndarray | None = None,
) -> Transitions:  # fmt: skip
    """Flat arrays with one row per step. `breaks` are last rows of unfinished episodes, `cut` rows whose episode lacks its start."""
    named = _named(data, "the dataset", ("observations", "actions", "rewards", "terminations"))
    from_data = spec is None
    spec = spec or _guess_spec(named["observations"], named["actions"], keys)
    shapes = obs_shapes(spec)
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
    ends = terminated | truncated
    flagged = ends.copy()
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
    return _assemble(obs, action, rew, next_obs, terminated, unknown, last + 1, whole, spec, info, from_data)


def _infer_truncations(
    terminated: np.ndarray, episode_ends: Any, obs: np.ndarray, next_obs: np.ndarray | None, limit: int | None
) -> np.ndarray:
    n = len(terminated)
    truncated = np.zeros(n, bool)
    if episode_ends is not None:
        stops = check.column("episode_ends", episode_ends).astype(np.int64)
        if len(stops) == 0 or stops[-1] != n or (np.diff(stops, prepend=0) <= 0).any():
            raise ValueError(f"episode_ends must rise from above 0 to {n}, the number of steps; give one past each episode's last row")
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


def from_episodes(
    episodes: Iterable[Mapping[str, Any]], n_steps: int, keys: tuple[str, ...] | None, spec: Spec | None, info: dict[str, Any]
) -> Transitions:
    """Episodes with T+1 observations and T of the rest, written into arrays of `n_steps` rows."""
    from_data = spec is None
    obs = next_obs = action = rew = np.empty(0, np.float32)
    terminated, unknown = np.zeros(n_steps, bool), np.zeros(n_steps, bool)
    ends: list[int] = []
    whole: list[bool] = []
    row = 0
    for i, episode in enumerate(episodes):
        named = _named(episode, f"episode {i}", ("observations", "actions", "rewards", "terminations"))
        if i == 0:
            spec = spec or _guess_spec(named["observations"], named["actions"], keys)
            obs, next_obs = (np.empty((n_steps, spec.obs_dim), np.float32) for _ in range(2))
            action, rew = np.empty((n_steps, spec.act_dim), np.float32), np.empty(n_steps, np.float32)
        assert spec is not None
        act = check.actions(f"episode {i} actions", named["actions"], spec.action_space.shape)
        seen = _observations(f"episode {i} observations", named["observations"], obs_shapes(spec))
        reward = check.column(f"episode {i} rewards", named["rewards"])
        flag = check.flags(f"episode {i} terminations", named["terminations"])
        lengths = {"actions": len(act), "rewards": len(reward), "terminations": len(flag)}
        ended = len(flag) > 0 and bool(flag[-1])
        if named.get("truncations") is not None:
            truncation = check.flags(f"episode {i} truncations", named["truncations"])
            lengths["truncations"] = len(truncation)
            ended = ended or (len(truncation) > 0 and bool(truncation[-1]))
        n = check.equal_lengths(lengths, f"the arrays of episode {i}")
        if len(seen) not in (n, n + 1):
            raise ValueError(f"episode {i} has {len(seen)} observations for {n} actions, expected {n + 1}; keep the last observation")
        if row + n > n_steps:
            raise ValueError(f"{info['id']}: episode {i} goes beyond the {n_steps} steps of metadata.json; make or download the set again")
        part = slice(row, row + n)
        obs[part], action[part], rew[part], terminated[part] = seen[:n], act.reshape(n, -1), reward, flag
        next_obs[row : row + n - 1], next_obs[row + n - 1] = seen[1:n], seen[-1]
        unknown[row + n - 1] = len(seen) == n
        row += n
        ends.append(row)
        whole.append(ended)
    if spec is None or row == 0:
        raise ValueError(f"{info['id']}: the dataset is empty (no episode): nothing to learn from; check the id or the filter")
    n_short = int(unknown.sum())
    if n_short:
        warn(f"{info['id']}: {n_short} episodes lack their last observation; their last transition is dropped unless it terminated")
    return _assemble(
        obs[:row], action[:row], rew[:row], next_obs[:row], terminated[:row], unknown[:row],
        np.asarray(ends), np.asarray(whole), spec, info, from_data,
    )  # fmt: skip


def _assemble(
    obs: np.ndarray, action: np.ndarray, rew: np.ndarray, next_obs: np.ndarray, terminated: np.ndarray, unknown: np.ndarray,
    ends: np.ndarray, whole: np.ndarray, spec: Spec, info: dict[str, Any], bounds_from_data: bool,
) -> Transitions:  # fmt: skip
    """Check the values, drop the rows whose next observation is `unknown` and needed, and describe the result."""
    lengths = np.diff(ends, prepend=0)
    check.finite({"observations": obs, "actions": action, "rewards": rew, "next_observations": next_obs}, lengths)
    if bounds_from_data:
        spec = dataclasses.replace(spec, action_space=_bounds_of(action, spec.action_space))
    returns = np.add.reduceat(rew.astype(np.float64), ends - lengths)
    whole = whole.copy() if whole.any() else np.ones_like(whole)  # recorded without end flags: then nothing speaks against them
    if len(ends) > 1 and not terminated[-1] and lengths[-1] < lengths.max():
        whole[-1] = False  # the recording most likely stopped here, and collectors flag that as a truncation
    keep = ~unknown | terminated
    if not keep.all():
        ends = np.cumsum(np.add.reduceat(keep.astype(np.int64), ends - lengths))
        obs, action, rew, next_obs, terminated = (array[keep] for array in (obs, action, rew, next_obs, terminated))
    if len(obs) == 0:
        raise ValueError(f"{info['id']}: no transition is left, every episode is one truncated step; give next_observations")
    data = Transitions(
        *(torch.from_numpy(array) for array in (obs, action, rew, next_obs, terminated.astype(np.float32))),
        episode_ends=torch.from_numpy(ends.astype(np.int64)),
        episode_returns=torch.from_numpy(returns.astype(np.float32)),
        episode_lengths=torch.from_numpy(lengths.astype(np.int64)),
        episode_whole=torch.from_numpy(whole),
        spec=spec,
    )
    judged = returns[whole] if whole.any() else returns
    data.info = {"env_spec": None, "ref_min_score": None, "ref_max_score": None} | info | {
        "n_steps": int(lengths.sum()),
        "n_episodes": len(ends),
        "mean_return": float(judged.mean()),
        "std_return": float(judged.std()),
        "obs_keys": list(spec.obs_keys) if spec.obs_keys is not None else None,
        "bounds_from_data": bounds_from_data,
        "sha256": data.fingerprint(),
        "warnings": check.advise(data.obs, data.rew, data.done, len(ends)),
    }  # fmt: skip
    return data


