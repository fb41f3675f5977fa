"""Batches of transitions, drawn uniformly with replacement on the training device."""

import copy

import torch
from torch import Tensor

from diffagents.types import Batch


class Sampler:
    """Transitions in the learner's units as one float32 matrix (N, 2S + A + 2) on one device.

    Columns: obs (S) | act in [-1, 1] (A) | rew | done | next_obs (S). One matrix makes a batch one gather.
    `episode_ends` (E,) int64, on the CPU: one past the last row of each episode. `tables`: tensors (N, ...) whose rows
    come along with each transition, as `Batch.extras`.
    """

    def __init__(self, matrix: Tensor, obs_dim: int, act_dim: int, episode_ends: Tensor | None = None) -> None:
        self.matrix = matrix
        self.obs_dim = obs_dim
        self.act_dim = act_dim
        self.episode_ends = torch.tensor([len(matrix)]) if episode_ends is None else episode_ends.cpu()
        self.tables: dict[str, Tensor] = {}
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
    def next_obs(self) -> Tensor:
        """All normalised next observations, a view (N, S)."""
        return self.matrix[:, self.obs_dim + self.act_dim + 2 :]

    def all(self) -> Batch:
        """Every transition in order, views."""
        return batch_of(self.matrix, self.obs_dim, self.act_dim, self.tables)

    def with_extras(self, **tables: Tensor) -> "Sampler":
        """The same transitions with a row of each table (N, ...) beside each; the matrix is shared."""
        other = copy.copy(self)
        other.tables = {**self.tables, **tables}
        return other

    def head(self, n: int) -> "Sampler":
        """The first n transitions; an episode that goes on is cut there."""
        ends = torch.unique(self.episode_ends.clamp(max=n))
        return Sampler(self.matrix[:n], self.obs_dim, self.act_dim, ends)

    def sample(self, n: int, generator: torch.Generator) -> Batch:
        """n transitions drawn uniformly with replacement; the fields are views of one fresh (n, 2S + A + 2) tensor."""
        return self.gather(self.rows(n, generator))

    def rows(self, n: int, generator: torch.Generator) -> Tensor:
        """Where n transitions drawn uniformly with replacement are, (n,) int64."""
        return torch.randint(len(self), (n,), generator=generator, device=self.device)

    def gather(self, index: Tensor) -> Batch:
        """The transitions at `index` (n,) int64, on the sampler's device."""
        extras = {name: table.index_select(0, index) for name, table in self.tables.items()}
        return batch_of(self.matrix.index_select(0, index), self.obs_dim, self.act_dim, extras)


def batch_of(matrix: Tensor, obs_dim: int, act_dim: int, extras: dict[str, Tensor]) -> Batch:
    """Rows of such a matrix as a Batch of views."""
    rew = obs_dim + act_dim
    return Batch(
        obs=matrix[:, :obs_dim],
        act=matrix[:, obs_dim:rew],
        rew=matrix[:, rew],
        done=matrix[:, rew + 1],
        next_obs=matrix[:, rew + 2 :],
        extras=extras,
    )
