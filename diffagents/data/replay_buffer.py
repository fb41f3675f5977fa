"""Replay: what an agent lives through online, as the learner sees it. Mixture: batches of it and of the offline data.

Both keep to the training device; a batch is a gather or two, and no size depends on the device.
"""

import json
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
from diffagents.types import Batch, Spec

REPLAY_FORMAT = 1
"""Number of the file layout of `Replay.save`; a file of another number is refused."""
_FIRST_ROWS = 4096


class Replay:
    """The last `capacity` transitions of one or several environments, rows as in `Sampler.matrix`; grows as it fills.

    Stored in the learner's units: normalised observations, actions in [-1, 1], transformed rewards; `done` is 1 at a true
    termination only. `running`: the actions, in the environment's units, since the last reset of a single environment:
    what brings it back to where it was when a run is resumed. n_added: transitions ever added.
    """

    def __init__(self, obs_dim: int, act_dim: int, capacity: int, device: torch.device | str) -> None:
        self.obs_dim, self.act_dim, self.capacity = obs_dim, act_dim, capacity
        n_rows, self.n_added, self.max_abs_reward = min(_FIRST_ROWS, capacity), 0, 0.0
        self._rows = torch.empty(n_rows, 2 * obs_dim + act_dim + 2, device=device)
        self._env = np.zeros(n_rows, np.int32)  # which of the environments
        self._ended = np.zeros(n_rows, np.uint8)  # 1: its episode ended here, by termination or time-out; 2: it was cut here
        self.running: list[np.ndarray] = []

    def __len__(self) -> int:
        return min(self.n_added, self.capacity)

    @property
    def device(self) -> torch.device:
        return self._rows.device

    @property
    def matrix(self) -> Tensor:
        """What there is, in no order that lasts: a view (n, 2S + A + 2)."""
        return self._rows[: len(self)]

    def add(self, obs: Tensor, act: Tensor, rew: Tensor, done: Tensor, next_obs: Tensor, ended: np.ndarray) -> None:
        """One transition of each of n environments: (n, S), (n, A), (n,), (n,), (n, S) on any device, ended (n,) bool."""
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

    def _grow(self, n: int) -> None:
        if n <= len(self._rows):
            return
        n = min(self.capacity, max(n, 2 * len(self._rows)))
        rows = torch.empty(n, self._rows.shape[1], device=self.device)
        rows[: len(self._rows)] = self._rows
        more = n - len(self._rows)
        self._env, self._ended = np.pad(self._env, (0, more)), np.pad(self._ended, (0, more))
        self._rows = rows

    def cut(self) -> None:
        """Nothing follows on what is here: the environments begin anew."""
        order, newest = self._order()
        last = order[newest]
        self._ended[last] = np.where(self._ended[last] == 1, 1, 2)
        self.running = []

    def last_next_obs(self) -> Tensor:
        """Where the row that was added last led to, (S,)."""
        return self._rows[(self.n_added - 1) % self.capacity, self.obs_dim + self.act_dim + 2 :]

    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows, environment after environment, the older first; and which of them is its environment's newest."""
        n = len(self)
        by_age = np.roll(np.arange(n), -(self.n_added % self.capacity) if self.n_added > n else 0)
        order = by_age[np.argsort(self._env[by_age], kind="stable")]
        return order, np.append(np.diff(self._env[order]) != 0, True)[:n]

    def episodes(self, whole: bool) -> Sampler | None:
        """A copy in episodes, one after the other; whole: only those of which all is here. None where there is no row."""
        order, newest = self._order()
        ended = (self._ended[order] > 0) | newest
        if whole:
            last = order[ended]  # of each episode
            complete = self._ended[last] == 1  # it ended by itself
            if self.n_added > len(order):  # the oldest one of each environment has lost its head
                complete &= np.append(False, np.diff(self._env[last]) == 0)
            kept = np.repeat(complete, np.diff(np.flatnonzero(ended), prepend=-1))
            order, ended = order[kept], ended[kept]
        if len(order) == 0:
            return None
        ends = torch.from_numpy(np.flatnonzero(ended) + 1)
        return Sampler(self._rows[torch.from_numpy(order).to(self.device)], self.obs_dim, self.act_dim, ends)

    # ---- files -----------------------------------------------------------------------------------------------------
    def save(self, path: str | PathLike[str], moment: dict[str, int]) -> Path:
        """Write one safetensors file (`.pkl`, which SB3's CheckpointCallback asks for, becomes `.safetensors`). Atomic.

        moment: counters that tell when this was, compared by `load`.
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
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, {"diffagents": json.dumps(header)})
        part.replace(path)
        return path

    @classmethod
    def load(cls, path: str | PathLike[str], spec: Spec, device: torch.device, moment: dict[str, int]) -> "Replay":
        """What `save` wrote. Raises FileNotFoundError; ArtifactError: damaged, of other spaces, of another moment."""
        path = file_of(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no replay buffer at {path}")
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("diffagents", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            found = header.get("format", REPLAY_FORMAT)
            if found != REPLAY_FORMAT:
                raise ArtifactError(f"{path} is a replay buffer of format {found}, this version reads {REPLAY_FORMAT}")
            obs_dim, act_dim, capacity = header["sizes"]
            rows, env, ended = tensors["rows"], tensors["env"].numpy(), tensors["ended"].numpy()
            n_added, n = int(header["n_added"]), min(int(header["n_added"]), int(capacity))
            if rows.shape != (n, 2 * obs_dim + act_dim + 2) or len(env) != n or len(ended) != n or rows.dtype != torch.float32:
                raise ValueError("its sizes disagree")
            if not bool(rows.isfinite().all()) or env.dtype != np.int32 or ended.dtype != np.uint8:
                raise ValueError("its rows are not what was written")
        except ArtifactError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} is not a replay buffer of ours ({short(error)})") from None
        if (obs_dim, act_dim) != (spec.obs_dim, spec.act_dim):
            raise ArtifactError(
                f"{path} holds observations of {obs_dim} and actions of {act_dim} numbers, the agent has {spec.obs_dim} and "
                f"{spec.act_dim}: it is another agent's"
            )
        if header.get("moment") != moment:
            raise ArtifactError(
                f"{path} was saved at {_words(header.get('moment'))}, the agent at {_words(moment)}: load the two that were "
                "saved together"
            )
        replay = cls(obs_dim, act_dim, int(capacity), device)
        replay._rows, replay._env, replay._ended = rows.to(device), env.copy(), ended.copy()
        replay.n_added, replay.max_abs_reward = n_added, float(header["max_abs_reward"])
        replay.running = list(tensors["running"].numpy()) if "running" in tensors else []
        return replay


def file_of(path: str | PathLike[str]) -> Path:
    """`path` with the suffix that such files have."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return path
    return path.with_suffix(".safetensors") if path.suffix == ".pkl" else path.with_name(path.name + ".safetensors")


def _words(moment: Any) -> str:
    return ", ".join(f"{name} {n}" for name, n in moment.items()) if isinstance(moment, dict) else "an unknown moment"


class Mixture:
    """Batches of which a share `ratio` is offline data and the rest from `online`; "uniform": over both together.

    Either side may be missing or empty: then the other gives all. Tables beside the rows have the same names on both; a buffer
    counts as minus infinity.
    """

    def __init__(self, offline: Sampler | None, online: "Replay | Sampler | None", ratio: float | str) -> None:
        self.offline, self.online, self.ratio = offline, online, ratio

    @property
    def device(self) -> torch.device:
        side = self.offline if self.offline is not None else self.online
        assert side is not None
        return side.device

    @property
    def max_abs_reward(self) -> float:
        return max(side.max_abs_reward for side in (self.offline, self.online) if side is not None)

    def counts(self, n: int) -> tuple[int, int]:
        """How many of n transitions are offline data, and how many online, where it is not left to chance."""
        if self.offline is None or self.online is None or len(self.online) == 0:
            return (0, n) if self.offline is None else (n, 0)
        n_offline = round(n * float(self.ratio))
        return n_offline, n - n_offline

    def sample(self, n: int, generator: torch.Generator) -> Batch:
        """n transitions with replacement, the offline ones first ("uniform": in random order)."""
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
        """The same with a copy of the buffer in episodes, on which tables can be put (`Replay.episodes`)."""
        online = self.online.episodes(whole) if isinstance(self.online, Replay) else self.online
        return Mixture(self.offline, online, self.ratio)

    @property
    def sides(self) -> list[Sampler]:
        """What there is of the two, old data first, where both are in episodes."""
        return [side for side in (self.offline, self.online) if isinstance(side, Sampler)]

    def with_extras(self, **tables: Sequence[Tensor]) -> "Mixture":
        """The same with tables beside its `sides`: for each name as many tables (N,), in their order."""
        tabled = iter(
            [side.with_extras(**{name: table[i] for name, table in tables.items()}) for i, side in enumerate(self.sides)]
        )
        old = next(tabled) if self.offline is not None else None
        return Mixture(old, next(tabled, None), self.ratio)


def _row(side: "Replay | Sampler", name: str, index: Tensor) -> Tensor:
    """The table's rows at `index`; a buffer has none: no target has a floor there."""
    if isinstance(side, Sampler):
        return side.tables[name].index_select(0, index)
    return torch.full(index.shape, -torch.inf, device=index.device)
