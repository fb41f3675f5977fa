"""Observation statistics and reward transforms, under their papers' names. Both travel inside the artifact.

Every reward transform is affine, `r -> scale * r + shift`, fitted on a dataset once and applied unchanged afterwards,
to the rewards of online fine-tuning too.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

REWARD_TRANSFORMS: dict[str, str] = {
    "none": "r",
    "iql_locomotion": "1000 r / (R_max - R_min) over the returns R of episodes: IQL, IDQL, SRPO, QGPO, BDPO",
    "iql_antmaze": "r - 1: IQL, IDQL, SRPO, QGPO on sparse goals",
    "cql_antmaze": "4 (r - 0.5): Diffusion-QL, DiffCPS on sparse goals",
    "antmaze100": "100 r: BDPO on sparse goals",
    "normalize": "(r - mean) / std over the transitions: Diffusion-QL on adroit",
    "auto": "chosen from the data: iql_antmaze for a 0/1 goal reward, iql_locomotion where returns differ, else none",
}
"""Name -> formula and who uses it. "auto" is a rule, never a result: a fitted transform carries what it resolved to."""
_FIXED = {"none": (1.0, 0.0), "iql_antmaze": (1.0, -1.0), "cql_antmaze": (4.0, -2.0), "antmaze100": (100.0, 0.0)}


class ObsNormalizer(nn.Module):
    """`(obs - mean) / std` with buffers `mean`, `std` of shape (S,); the identity until `fit` is called.

    The buffers are saved with the policy, so an agent never meets observations on another scale than it was trained on.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    @torch.no_grad()
    def fit(self, obs: Tensor, eps: float = 1e-3) -> Self:
        """Take mean and std + eps per dimension of `obs` (N, S); eps as in TD3+BC (Fujimoto & Gu 2021, section 4.2)."""
        std, mean = torch.std_mean(obs, dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(std + eps)
        return self

    def forward(self, obs: Tensor) -> Tensor:
        """(..., S) in the environment's units -> (..., S) normalised."""
        return (obs - self.mean) / self.std


@dataclass(frozen=True)
class RewardTransform:
    """`r -> scale * r + shift`; `name` is a key of REWARD_TRANSFORMS other than "auto"."""

    name: str = "none"
    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, rew: Tensor) -> Tensor:
        """Rewards of any shape, in the environment's units -> the learner's units."""
        return self.scale * rew + self.shift

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; `from_json` reads it back exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RewardTransform":
        """The inverse of `to_json`. Raises KeyError, TypeError, ValueError, OverflowError where it is malformed."""
        if data["name"] not in REWARD_TRANSFORMS:
            raise ValueError(f"there is no such reward transform: choose from {', '.join(REWARD_TRANSFORMS)}")
        return cls(name=data["name"], scale=float(data["scale"]), shift=float(data["shift"]))


def fit_reward_transform(
    name: str, rewards: Tensor, episode_returns: Tensor, terminal_rewards: Tensor | None = None
) -> RewardTransform:
    """The reward transform called `name`, fitted on a dataset.

    `rewards` (N,) are all rewards, `episode_returns` (E,) the undiscounted returns of whole episodes, and
    `terminal_rewards` (K,) the rewards of the transitions that terminate (only "auto" looks at them).

    "iql_locomotion" takes its returns from the recorded episode boundaries. Official SRPO, QGPO and CORL cut every 1000
    rows of an array from which time-out rows are gone already, so that their windows drift across episodes; their
    factor differs from this one by a small amount, most where episodes rarely terminate.

    Raises ValueError for an unknown name, and where the data make a transform impossible.
    """
    if name not in REWARD_TRANSFORMS:
        raise ValueError(f"reward transform {name!r} is unknown; choose from {', '.join(REWARD_TRANSFORMS)}")
    if name == "auto":
        name = _choose(rewards, episode_returns, terminal_rewards)
    if name == "iql_locomotion":
        if not _differ(episode_returns):
            raise ValueError(
                f"reward transform 'iql_locomotion' divides by the range of returns, but {_describe(episode_returns)}; "
                "use 'none', or 'iql_antmaze' for a sparse goal"
            )
        return RewardTransform(name, scale=1000.0 / float(episode_returns.max() - episode_returns.min()))
    if name == "normalize":
        std, mean = torch.std_mean(rewards.double(), correction=0)
        if float(std) <= 1e-6 * max(1.0, abs(float(mean))):
            raise ValueError(
                f"reward transform 'normalize' divides by the rewards' std, but all are {float(mean):g}; use 'none'"
            )
        return RewardTransform(name, scale=1.0 / float(std), shift=-float(mean / std))
    return RewardTransform(name, *_FIXED[name])


def _choose(rewards: Tensor, episode_returns: Tensor, terminal_rewards: Tensor | None) -> str:
    # Both values must occur: a reward of 1 for being alive is no goal, and r - 1 would erase it. For the same reason an
    # episode that terminates at reward 0 (a fall) rules the sparse goal out.
    zero, one = rewards == 0, rewards == 1
    goal = bool((zero | one).all() and zero.any() and one.any())
    if goal and (terminal_rewards is None or bool((terminal_rewards == 1).all())):
        return "iql_antmaze"
    return "iql_locomotion" if _differ(episode_returns) else "none"


def _differ(returns: Tensor) -> bool:
    if len(returns) < 2:
        return False
    return float(returns.max() - returns.min()) > 1e-5 * max(1.0, float(returns.abs().max()))


def _describe(returns: Tensor) -> str:
    if len(returns) == 0:
        return "the data hold no episode"
    if len(returns) == 1:
        return "the data hold one episode only"
    return f"all {len(returns)} episodes return {float(returns[0]):g}"
