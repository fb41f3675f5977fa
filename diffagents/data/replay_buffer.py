"""Online experience for the learner: `Replay`, a buffer of transitions, and `Mixture`, batches of it and of offline data.

Both live on the training device; a batch takes one or two gathers.

Shapes: n transitions, S flat observation, A flat action.
"""

import json
import math
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffagents.data.sampler import Sampler, batch_of
from diffagents.errors import ArtifactError, short
from diffagents.files import hidden, replacing
from diffagents.types import Batch, Spec

REPLAY_FORMAT = 1
"""Number of the file layout of `Replay.save`; files with another number are rejected."""
_FIRST_ROWS = 4096
_MAX_COUNT = 1 << 62  # numpy calculates with the counts of a buffer


class Replay:
    """The last `capacity` transitions of one or several environments; its memory grows as it fills.

    Transitions are stored in the learner's units: normalised observations, actions in [-1, 1], transformed rewards; `done` is
    1 at a true termination only.

    Args:
        obs_dim: S.
        act_dim: A.
        capacity: The most transitions that are kept.
        device: The training device.

    Attributes:
        n_added: Number of transitions ever added.
        max_abs_reward: The largest absolute reward ever added.
        running: The actions, in the environment's units, since the last reset of a single environment. When a run is resumed
            they bring the environment back to its state.
    """

    def __init__(self, obs_dim: int, act_dim: int, capacity: int, device: torch.device | str) -> None:
        self.obs_dim, self.act_dim, self.capacity = obs_dim, act_dim, capacity
        n_rows, self.n_added, self.max_abs_reward = min(_FIRST_ROWS, capacity), 0, 0.0
        self._rows = torch.empty(n_rows, 2 * obs_dim + act_dim + 2, device=device)
        self._env = np.zeros(n_rows, np.int32)  # which of the environments
        self._ended = np.zeros(n_rows, np.uint8)  # 1: its episode ended, by termination or time-out; 2: it was cut
        self.running: list[np.ndarray] = []

    def __len__(self) -> int:
        return min(self.n_added, self.capacity)

    def size(self) -> int:
        """Number of transitions stored now. Callbacks of SB3 call it."""
        return len(self)

    @property
    def device(self) -> torch.device:
        """The training device."""
        return self._rows.device

    @property
    def matrix(self) -> Tensor:
        """The transitions stored now, (n, 2S + A + 2) with the columns of `Sampler.matrix`: a view, in no lasting order."""
        return self._rows[: len(self)]

    def add(self, obs: Tensor, act: Tensor, rew: Tensor, done: Tensor, next_obs: Tensor, ended: np.ndarray) -> None:
        """Add one transition of each of n environments. Tensors may be on any device.

        Args:
            obs: (n, S).
            act: (n, A) in [-1, 1].
            rew: (n,).
            done: (n,), 1 at a true termination.
            next_obs: (n, S).
            ended: (n,) bool, whether the episode ended, by termination or time-out.
        """
        rows = torch.cat([obs, act, rew[:, None], done[:, None], next_obs], dim=1)
        self.max_abs_reward = max(self.max_abs_reward, float(rew.abs().max()))
        self._grow(min(self.n_added + len(rows), self.capacity))
        places = (self.n_added + np.arange(len(rows))) % self.capacity
        if len(rows) == 1:
            self._rows[int(places[0])].copy_(rows[0])
        else:
            self._rows[torch.from_numpy(places)] = rows.to(self.device)
        self._env[places], self._ended[places] = np.arange(len(rows)), ended
        self.n_added += len(rows)

    def cut(self) -> None:
        """Mark all running episodes as cut, because the environments are about to be reset."""
        order, newest = self._order()
        last = order[newest]
        self._ended[last] = np.where(self._ended[last] == 1, 1, 2)
        self.running = []

    def last_next_obs(self) -> Tensor:
        """The next observation of the transition that was added last, (S,)."""
        return self._rows[(self.n_added - 1) % self.capacity, self.obs_dim + self.act_dim + 2 :]

    def episodes(self, whole: bool) -> Sampler | None:
        """Copy the buffer in episodes, one after the other.

        Args:
            whole: Whether to keep only episodes that ended by themselves and are still here from their first step.

        Returns:
            A sampler of the copy; None if there is no transition in it.
        """
        order, newest = self._order()
        ended = (self._ended[order] > 0) | newest
        if whole:
            last = order[ended]  # the last row of each episode
            complete = self._ended[last] == 1  # the episode ended by itself
            if self.n_added > len(order):  # the oldest episode of each environment has lost its beginning
                complete &= np.append(False, np.diff(self._env[last]) == 0)
            kept = np.repeat(complete, np.diff(np.flatnonzero(ended), prepend=-1))
            order, ended = order[kept], ended[kept]
        if len(order) == 0:
            return None
        ends = torch.from_numpy(np.flatnonzero(ended) + 1)
        return Sampler(self._rows[torch.from_numpy(order).to(self.device)], self.obs_dim, self.act_dim, ends)

    def save(self, path: str | PathLike[str], moment: dict[str, int], keep: dict[str, int] | None = None) -> Path:
        """Write one safetensors file. The write is atomic.

        Args:
            path: The file; its suffix becomes `.safetensors` (see `file_of`). Missing folders are made.
            moment: Counters of the agent, by which `load` recognises that agent and buffer were saved together.
            keep: Counters of the agent that is on the disk. A buffer of that moment is moved to `previous_of(path)`, where
                `load` finds it, instead of being overwritten.

        Returns:
            The file.

        Raises:
            OSError: The file cannot be written; an older one is unchanged.
        """
        path = file_of(path)
        n = len(self)
        header = {
            "format": REPLAY_FORMAT,
            "sizes": [self.obs_dim, self.act_dim, self.capacity],
            "n_added": self.n_added,
            "max_abs_reward": self.max_abs_reward,
            "moment": moment,
        }
        tensors = {
            "rows": self.matrix.cpu().contiguous(),
            "env": torch.from_numpy(self._env[:n].copy()),
            "ended": torch.from_numpy(self._ended[:n].copy()),
        }
        if self.running:
            tensors["running"] = torch.from_numpy(np.stack(self.running))
        with replacing(path, "the replay buffer") as part:
            save_file(tensors, part, {"diffagents": json.dumps(header)})
            if keep is not None and keep.items() <= moment_of(path).items():
                os.replace(os.path.realpath(path), previous_of(path))
        return path

    @classmethod
    def load(cls, path: str | PathLike[str], spec: Spec, device: torch.device, moment: dict[str, int]) -> "Replay":
        """Read a file that `save` wrote.

        Args:
            path: The file, with or without its suffix.
            spec: The agent's spaces.
            device: The training device.
            moment: Counters of the agent.

        Returns:
            The buffer.

        Raises:
            FileNotFoundError: If there is no such file.
            ArtifactError: If the file is damaged, or was saved with other spaces or at another moment.
        """
        named = Path(path).expanduser()
        path = file_of(path)
        if named.suffix == ".pkl" and named.is_file() and not path.is_file():
            raise ArtifactError(
                f"{named} is a pickle, as SB3 saves replay buffers, which can run code when it is opened: if you trust it, "
                f"pass stable_baselines3.common.save_util.load_from_pkl({str(named)!r}) as dataset= of learn or learn_online"
            )
        if moment_of(path) != moment:  # perhaps the agent was not saved any more after this buffer's successor
            path = next((other for other in (previous_of(path), _once_previous_of(path)) if moment_of(other) == moment), path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no replay buffer at {path}; pass the path that save_replay_buffer was called with"
            )
        try:
            replay, theirs = cls._read(path, spec, device)
        except ArtifactError:
            raise
        except (SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{path} is not a replay buffer of diffagents, or it is damaged ({short(error)})") from None
        if theirs != moment:
            raise ArtifactError(
                f"{path} was saved at {_words(theirs)}, but the agent at {_words(moment)}; "
                "load the two that were saved together"
            )
        return replay

    @classmethod
    def _read(cls, path: Path, spec: Spec, device: torch.device) -> tuple["Replay", Any]:
        """The buffer in a file, checked, and its moment. Raises exceptions of many types if the file is damaged."""
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("diffagents", "{}"))
            names = set(file.keys())
            rows, env, ended = (file.get_tensor(name) for name in ("rows", "env", "ended"))
            running = file.get_tensor("running") if "running" in names else torch.empty(0, *spec.action_space.shape)
        number = header.get("format", REPLAY_FORMAT)
        if number != REPLAY_FORMAT:
            raise ArtifactError(
                f"{path} is a replay buffer of format {short(number)}, but this version reads {REPLAY_FORMAT}; use the "
                "version of diffagents that saved it"
            )
        obs_dim, act_dim, capacity = (_count(size) for size in header["sizes"])
        n_added, max_abs_reward = _count(header["n_added"]), header["max_abs_reward"]
        n, width = min(n_added, capacity), 2 * obs_dim + act_dim + 2
        if type(max_abs_reward) not in (int, float) or not 0 <= max_abs_reward < math.inf or capacity == 0:
            raise ValueError("its numbers are impossible")
        if (rows.shape, env.shape, ended.shape) != ((n, width), (n,), (n,)):
            raise ValueError("its sizes disagree")
        if (rows.dtype, env.dtype, ended.dtype) != (torch.float32, torch.int32, torch.uint8):
            raise ValueError("its numbers are of other types")
        if not bool(rows.isfinite().all()) or bool((env < 0).any()) or bool((ended > 2).any()):
            raise ValueError("its rows are damaged")
        if (obs_dim, act_dim) != (spec.obs_dim, spec.act_dim):
            raise ArtifactError(
                f"{path} contains observations of {obs_dim} and actions of {act_dim} numbers, but this agent has "
                f"{spec.obs_dim} and {spec.act_dim}: it is another agent's buffer; load the one that was saved with this agent"
            )
        if running.shape != (len(running), *spec.action_space.shape) or len(running) > n_added:
            raise ValueError("its running actions have another shape")
        if not bool(running.isfinite().all()):
            raise ValueError("its running actions are damaged")
        replay = cls(obs_dim, act_dim, capacity, device)
        replay._rows, replay._env, replay._ended = rows.to(device), env.numpy().copy(), ended.numpy().copy()
        replay.n_added, replay.max_abs_reward = n_added, float(max_abs_reward)
        replay.running = list(running.numpy())
        return replay, header.get("moment")

    def _grow(self, n: int) -> None:
        if n <= len(self._rows):
            return
        n = min(self.capacity, max(n, 2 * len(self._rows)))
        rows = torch.empty(n, self._rows.shape[1], device=self.device)
        rows[: len(self._rows)] = self._rows
        more = n - len(self._rows)
        self._env, self._ended = np.pad(self._env, (0, more)), np.pad(self._ended, (0, more))
        self._rows = rows

    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers by environment, oldest first; and which of them is the newest of its environment, (n,) bool."""
        n = len(self)
        by_age = np.roll(np.arange(n), -(self.n_added % self.capacity) if self.n_added > n else 0)
        order = by_age[np.argsort(self._env[by_age], kind="stable")]
        return order, np.append(np.diff(self._env[order]) != 0, True)[:n]


class Mixture:
    """Batches that mix offline data with online experience.

    If one side is missing or empty, the other provides the whole batch. Tables have the same names on both sides; for a
    `Replay`, which has no tables, their values are minus infinity.

    Args:
        offline: The offline data, or None.
        online: The online experience, or None.
        ratio: Share of offline data in a batch, in [0, 1]; "uniform" draws uniformly from both together.
    """

    def __init__(self, offline: Sampler | None, online: "Replay | Sampler | None", ratio: float | str) -> None:
        self.offline, self.online, self.ratio = offline, online, ratio

    @property
    def device(self) -> torch.device:
        """The training device."""
        side = self.offline if self.offline is not None else self.online
        assert side is not None
        return side.device

    @property
    def max_abs_reward(self) -> float:
        """The largest absolute reward on either side."""
        return max(side.max_abs_reward for side in (self.offline, self.online) if side is not None)

    def counts(self, n: int) -> tuple[int, int]:
        """How many of n transitions are offline data and how many online, unless `ratio` leaves it to chance."""
        if self.offline is None or self.online is None or len(self.online) == 0:
            return (0, n) if self.offline is None else (n, 0)
        n_offline = round(n * float(self.ratio))
        return n_offline, n - n_offline

    def sample(self, n: int, generator: torch.Generator) -> Batch:
        """Draw n transitions with replacement, the offline ones first ("uniform": in random order)."""
        offline, online = self.offline, self.online
        if self.ratio == "uniform" and offline is not None and online is not None and len(online) > 0:
            split = len(offline)
            index = torch.randint(split + len(online), (n,), generator=generator, device=self.device)
            old, new = index.clamp(max=split - 1), (index - split).clamp(min=0)
            is_old = index < split
            matrix = torch.where(is_old[:, None], offline.matrix.index_select(0, old), online.matrix.index_select(0, new))
            extras = {name: torch.where(is_old, _row(offline, name, old), _row(online, name, new)) for name in offline.tables}
            return batch_of(matrix, offline.obs_dim, offline.act_dim, extras)
        drawn = [
            (side, torch.randint(len(side), (count,), generator=generator, device=self.device))
            for side, count in zip((offline, online), self.counts(n), strict=True)
            if side is not None and count > 0
        ]
        matrix = torch.cat([side.matrix.index_select(0, index) for side, index in drawn])
        named = offline if offline is not None else online
        names = named.tables if isinstance(named, Sampler) else {}
        extras = {name: torch.cat([_row(side, name, index) for side, index in drawn]) for name in names}
        return batch_of(matrix, drawn[0][0].obs_dim, drawn[0][0].act_dim, extras)

    def in_episodes(self, whole: bool) -> "Mixture":
        """The same with a copy of the buffer in episodes, to which tables can be added (see `Replay.episodes`)."""
        online = self.online.episodes(whole) if isinstance(self.online, Replay) else self.online
        return Mixture(self.offline, online, self.ratio)

    def with_best_episodes(self, share: float) -> "Mixture | None":
        """The offline data and the best of the finished episodes, for algorithms that clone.

        Args:
            share: The share of the finished episodes that is kept, in (0, 1], by return; at least one episode.

        Returns:
            The new mixture; None if there are neither offline data nor finished episodes.
        """
        mixture = self.in_episodes(whole=True)
        if isinstance(own := mixture.online, Sampler):
            lengths = torch.diff(own.episode_ends, prepend=torch.zeros(1, dtype=torch.int64)).tolist()
            returns = torch.stack([rewards.sum() for rewards in torch.split(own.all().rew, lengths)])
            best = returns.topk(max(1, round(share * len(lengths)))).indices.tolist()
            episodes = torch.split(own.matrix, lengths)
            rows = torch.cat([episodes[i] for i in sorted(best)])
            mixture = Mixture(mixture.offline, Sampler(rows, own.obs_dim, own.act_dim), mixture.ratio)
        return mixture if mixture.sides else None

    @property
    def sides(self) -> list[Sampler]:
        """The sides that are in episodes, offline data first."""
        return [side for side in (self.offline, self.online) if isinstance(side, Sampler)]

    def with_extras(self, **tables: Sequence[Tensor]) -> "Mixture":
        """The same with extra columns on its `sides`.

        Args:
            **tables: For each name one tensor (N,) per side, in the order of `sides`.

        Returns:
            The new mixture.
        """
        tabled = iter(
            [side.with_extras(**{name: table[i] for name, table in tables.items()}) for i, side in enumerate(self.sides)]
        )
        old = next(tabled) if self.offline is not None else None
        return Mixture(old, next(tabled, None), self.ratio)


def previous_of(path: Path) -> Path:
    """Where the buffer lies that belongs to the agent on the disk, while a newer one is at `path`.

    It is beside the file that a link leads to, and has a name that no user chooses.
    """
    return hidden(Path(os.path.realpath(path)), "previous.safetensors")


def _once_previous_of(path: Path) -> Path:
    """Where earlier versions kept it. It is only read, because it may be a user's own file."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def moment_of(path: Path) -> dict[str, Any]:
    """The counters that are stored with a buffer; empty if there is none, or it is damaged."""
    if not path.is_file():  # opening a pipe never ends
        return {}
    try:
        with safe_open(path, "pt") as file:
            moment = json.loads((file.metadata() or {})["diffagents"])["moment"]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return moment if isinstance(moment, dict) else {}


def file_of(path: str | PathLike[str]) -> Path:
    """The file of a replay buffer: `path` with the suffix `.safetensors`, also for the `.pkl` of SB3's CheckpointCallback."""
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        return path
    return path.with_suffix(".safetensors") if path.suffix == ".pkl" else path.with_name(path.name + ".safetensors")


def _row(side: "Replay | Sampler", name: str, index: Tensor) -> Tensor:
    """The rows `index` of a table. A `Replay` has no tables: minus infinity, because its targets have no lower bound."""
    if isinstance(side, Sampler):
        return side.tables[name].index_select(0, index)
    return torch.full(index.shape, -torch.inf, device=index.device)


def _words(moment: Any) -> str:
    """Counters for a message."""
    if not isinstance(moment, dict):
        return "an unknown moment"
    counts = [(name, n if type(n) is int and abs(n) <= _MAX_COUNT else short(n)) for name, n in list(moment.items())[:4]]
    return ", ".join(f"{short(name)} {n}" for name, n in counts)


def _count(value: Any) -> int:
    """A whole number of a file, from 0. Raises ValueError for anything else."""
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise ValueError(f"{short(value)} is not a count")
    return value
