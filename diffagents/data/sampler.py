"""`Sampler`: a dataset as the learner sees it, on the training device, from which batches are drawn.

Shapes: N transitions, n transitions of a batch, E episodes, S flat observation, A flat action.
"""

import copy

import torch
from torch import Tensor

from diffagents.types import Batch


class Sampler:
    """Transitions in the learner's units as one matrix, so that a batch takes one gather.

    Args:
        matrix: (N, 2S + A + 2) float32, with the columns obs (S) | act in [-1, 1] (A) | rew | done | next_obs (S).
        obs_dim: S.
        act_dim: A.
        episode_ends: One past the last row of each episode, (E,) int64. Default: all is one episode.

    Attributes:
        tables: Tensors (N, ...) whose rows are added to each transition as `Batch.extras`; set by `with_extras`.
        max_abs_reward: The largest absolute reward.
    """

    def __init__(self, matrix: Tensor, obs_dim: int, act_dim: int, episode_ends: Tensor | None = None) -> None:
        self.matrix = matrix
        self.obs_dim = obs_dim
        self.act_dim = act_dim
        self.episode_ends = torch.tensor([len(matrix)]) if episode_ends is None else episode_ends.cpu()
        self.tables: dict[str, Tensor] = {}
        self.max_abs_reward = float(matrix[:, obs_dim + act_dim].abs().max())

    def __len__(self) -> int:
        return self.matrix.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the matrix; the generator passed to `sample` must be on it too."""
        return self.matrix.device

    @property
    def obs(self) -> Tensor:
        """All normalised observations, (N, S), a view."""
        return self.matrix[:, : self.obs_dim]

    @property
    def next_obs(self) -> Tensor:
        """All normalised next observations, (N, S), a view."""
        return self.matrix[:, self.obs_dim + self.act_dim + 2 :]

    def all(self) -> Batch:
        """All transitions in order, as views."""
        return batch_of(self.matrix, self.obs_dim, self.act_dim, self.tables)

    def with_extras(self, **tables: Tensor) -> "Sampler":
        """The same transitions with extra columns; the matrix is shared.

        Args:
            **tables: Tensors (N, ...) on the sampler's device, by their name in `Batch.extras`. They replace tables of the
                same name.

        Returns:
            The new sampler.
        """
        other = copy.copy(self)
        other.tables = {**self.tables, **tables}
        return other

    def head(self, n: int) -> "Sampler":
        """The first n transitions, without tables; an episode that continues beyond them is cut."""
        ends = torch.unique(self.episode_ends.clamp(max=n))
        return Sampler(self.matrix[:n], self.obs_dim, self.act_dim, ends)

    def sample(self, n: int, generator: torch.Generator) -> Batch:
        """Draw n transitions uniformly with replacement; the fields are views of one new (n, 2S + A + 2) tensor."""
        return self.gather(self.rows(n, generator))

    def rows(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n row numbers uniformly with replacement, (n,) int64."""
        return torch.randint(len(self), (n,), generator=generator, device=self.device)

    def gather(self, index: Tensor) -> Batch:
        """The transitions in the rows `index`, (n,) int64 on the sampler's device."""
        extras = {name: table.index_select(0, index) for name, table in self.tables.items()}
        return batch_of(self.matrix.index_select(0, index), self.obs_dim, self.act_dim, extras)


def batch_of(matrix: Tensor, obs_dim: int, act_dim: int, extras: dict[str, Tensor]) -> Batch:
    """Split rows of a sampler's matrix into a Batch of views.

    Args:
        matrix: (n, 2S + A + 2), with the columns of `Sampler`.
        obs_dim: S.
        act_dim: A.
        extras: `Batch.extras`, (n, ...) each.

    Returns:
        The batch.
    """
    rew = obs_dim + act_dim
    return Batch(
        obs=matrix[:, :obs_dim],
        act=matrix[:, obs_dim:rew],
        rew=matrix[:, rew],
        done=matrix[:, rew + 1],
        next_obs=matrix[:, rew + 2 :],
        extras=extras,
    )
