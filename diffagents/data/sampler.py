"""`Sampler`: a dataset as the learner sees it, on the training device, from which batches are drawn.

Shapes: N transitions, n transitions of a batch, E episodes, S flat observation, A flat action.
"""

import copy

import torch
from torch import Tensor

from diffagents.functional import returns_to_go
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
        cumulative: Probability of drawing a row or an earlier one, (N,) float64; None: all rows are equally probable. Set by
            `prefer_returns`.
        max_abs_reward: The largest absolute reward.
    """

    def __init__(self, matrix: Tensor, obs_dim: int, act_dim: int, episode_ends: Tensor | None = None) -> None:
        self.matrix = matrix
        self.obs_dim = obs_dim
        self.act_dim = act_dim
        self.episode_ends = torch.tensor([len(matrix)]) if episode_ends is None else episode_ends.cpu()
        self.tables: dict[str, Tensor] = {}
        self.cumulative: Tensor | None = None
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

    def prefer_returns(self, temperature: float) -> "Sampler":
        """The same transitions, drawn with probabilities that grow with the return of their episode (see `rows`).

        Each transition of an episode with return R is drawn in proportion to exp(z / temperature), where z is R scaled to
        [0, 1] over the episodes. If all episodes have the same return, nothing changes.
        Source: return-weighted sampling (Hong et al., ICLR 2023, arXiv:2306.13085), where the temperature is 0.1.

        Args:
            temperature: Positive; small prefers the best episodes.

        Returns:
            The new sampler; the matrix is shared.
        """
        ends = self.episode_ends.to(self.device)
        episode = torch.searchsorted(ends, torch.arange(len(self), device=self.device), right=True)
        rewards = self.matrix[:, self.obs_dim + self.act_dim].double()
        returns = torch.zeros(len(ends), dtype=torch.float64, device=self.device).index_add_(0, episode, rewards)
        returns = returns[episode]  # of each row's episode; episodes without rows do not count
        low, high = returns.min(), returns.max()
        other = copy.copy(self)
        if bool(high > low):
            cumulative = torch.exp((returns - high) / ((high - low) * temperature)).cumsum(0)
            other.cumulative = cumulative / cumulative[-1]
        return other

    def with_returns(self, gamma: float) -> "Sampler":
        """The same transitions with their discounted returns-to-go, (N,), in `Batch.extras["returns"]`."""
        rew, done = self.matrix[:, self.obs_dim + self.act_dim :].T[:2]
        return self.with_extras(returns=returns_to_go(rew, done, self.episode_ends, gamma))

    def head(self, n: int) -> "Sampler":
        """The first n transitions, without tables; an episode that continues beyond them is cut."""
        ends = torch.unique(self.episode_ends.clamp(max=n))
        return Sampler(self.matrix[:n], self.obs_dim, self.act_dim, ends)

    def sample(self, n: int, generator: torch.Generator, by_return: bool = False) -> Batch:
        """Draw n transitions with replacement; the fields are views of one new (n, 2S + A + 2) tensor. See `rows`."""
        return self.gather(self.rows(n, generator, by_return))

    def rows(self, n: int, generator: torch.Generator, by_return: bool = False) -> Tensor:
        """Draw n row numbers with replacement, (n,) int64: uniformly, unless `prefer_returns` has set other probabilities.

        With these, all rows are drawn by them if `by_return`, else half of them and the rest uniformly.
        """
        n_by_return = 0 if self.cumulative is None else n if by_return else n // 2
        uniform = torch.randint(len(self), (n - n_by_return,), generator=generator, device=self.device)
        if self.cumulative is None:
            return uniform
        drawn = torch.rand(n_by_return, generator=generator, dtype=torch.float64, device=self.device)
        return torch.cat([uniform, torch.searchsorted(self.cumulative, drawn).clamp_(max=len(self) - 1)])

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
