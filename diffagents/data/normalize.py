"""Normalisation of observations and transforms of rewards, under their papers' names; both are saved with the agent.

Every reward transform is affine, `r -> scale * r + shift`. It is fitted on a dataset once and applied unchanged afterwards,
also to the rewards of online fine-tuning.

Shapes: N transitions, E episodes, S flat observation.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

REWARD_TRANSFORMS: dict[str, str] = {
    "none": "r",
    "return_range": "1000 r / (R_max - R_min) over the returns R of episodes",
    "minus_one": "r - 1",
    "iql_locomotion": "return_range under the name of its task in IQL, IDQL, SRPO, QGPO, BDPO",
    "iql_antmaze": "minus_one under the name of its task in IQL, IDQL, SRPO, QGPO: sparse goals",
    "cql_antmaze": "4 (r - 0.5): Diffusion-QL, DiffCPS on sparse goals",
    "antmaze100": "100 r: BDPO on sparse goals",
    "unit_returns": "(r - c) / std of the discounted returns-to-go, c = 1 for a 0/1 goal reward, else 0: the fast recipe",
    "normalize": "(r - mean) / std over the transitions: Diffusion-QL on adroit",
    "auto": "chosen from the data: minus_one for a 0/1 goal reward, return_range where returns differ, else none",
}
"""Name -> formula and who uses it. "auto" is a rule, never a result: a fitted transform has the name that it resolved to, which
says what it does and names no task."""
_RANGE = ("return_range", "iql_locomotion")
"""The names of the transform that divides by the range of returns."""
_FIXED = {
    "none": (1.0, 0.0),
    "minus_one": (1.0, -1.0),
    "iql_antmaze": (1.0, -1.0),
    "cql_antmaze": (4.0, -2.0),
    "antmaze100": (100.0, 0.0),
}


class ObsNormalizer(nn.Module):
    """`(obs - mean) / std`; the identity until `fit` is called.

    The buffers are saved with the policy, so that an agent always sees observations on the scale that it was trained on.

    Args:
        obs_dim: S.

    Attributes:
        mean: Mean of each dimension, (S,).
        std: Standard deviation of each dimension plus eps, (S,).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    @torch.no_grad()
    def fit(self, obs: Tensor, eps: float = 1e-3) -> Self:
        """Set the statistics in place.

        Args:
            obs: The data, (N, S).
            eps: Added to the standard deviation; the default is that of TD3+BC (Fujimoto & Gu 2021, section 4.2).

        Returns:
            Itself.
        """
        std, mean = torch.std_mean(obs, dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(std + eps)
        return self

    def forward(self, obs: Tensor) -> Tensor:
        """Normalise observations, (..., S) in the environment's units."""
        return (obs - self.mean) / self.std


@dataclass(frozen=True)
class RewardTransform:
    """A fitted reward transform, `r -> scale * r + shift`.

    Attributes:
        name: A key of `REWARD_TRANSFORMS` other than "auto".
        scale: Factor.
        shift: Summand.

    Raises:
        ValueError: The scale or its inverse is 0 or infinite in float32, or the shift is not finite there.
    """

    name: str = "none"
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        scale, shift = torch.tensor([self.scale, self.shift], dtype=torch.float64).float()
        if not (0 < float(scale) < math.inf and bool(torch.isfinite(1 / scale)) and bool(torch.isfinite(shift))):
            raise ValueError(
                f"a reward transform has the scale {self.scale:g} and the shift {self.shift:g}, which float32 cannot apply: "
                "the rewards are too large or too small; multiply them by a constant first"
            )

    def __call__(self, rew: Tensor) -> Tensor:
        """Transform rewards of any shape from the environment's units to the learner's."""
        return self.scale * rew + self.shift

    def to_json(self) -> dict[str, Any]:
        """The transform as plain JSON values, from which `from_json` restores it exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RewardTransform":
        """The inverse of `to_json`.

        Raises:
            KeyError: If a key is missing.
            OverflowError: If a number is too large for a float.
            TypeError: If `data` or a number is of another type.
            ValueError: If the name is unknown, or a number is malformed or cannot be (see the class).
        """
        if data["name"] not in REWARD_TRANSFORMS:
            raise ValueError(f"this reward transform is unknown; choose from {', '.join(REWARD_TRANSFORMS)}")
        return cls(name=data["name"], scale=float(data["scale"]), shift=float(data["shift"]))


def fit_reward_transform(
    name: str,
    rewards: Tensor,
    episode_returns: Tensor,
    terminal_rewards: Tensor | None = None,
    returns_to_go: Callable[[Tensor], Tensor] | None = None,
) -> RewardTransform:
    """Fit a reward transform on a dataset.

    "return_range" takes its returns from the recorded episode boundaries. Official SRPO, QGPO and CORL cut every 1000
    rows of an array that has already lost its time-out rows, so that their windows drift across episodes; their factor
    differs from this one by a small amount, most where episodes rarely terminate.

    Args:
        name: A key of `REWARD_TRANSFORMS`.
        rewards: All rewards, (N,).
        episode_returns: Undiscounted returns of whole episodes, (E,).
        terminal_rewards: Rewards of the transitions that terminate, (K,); only "auto" and "unit_returns" use them.
        returns_to_go: Maps rewards (N,) to their discounted returns-to-go, (N,); only "unit_returns" uses it.

    Returns:
        The fitted transform.

    Raises:
        ValueError: If the name is unknown, or the data make the transform impossible.
    """
    if name not in REWARD_TRANSFORMS:
        raise ValueError(f"reward transform {name!r} is unknown; choose from {', '.join(REWARD_TRANSFORMS)}")
    if name == "auto":
        name = _choose(rewards, episode_returns, terminal_rewards)
    if name in _RANGE:
        if not _differ(episode_returns):
            raise ValueError(
                f"reward transform {name!r} divides by the range of returns, but {_describe(episode_returns)}; "
                "use 'none', or 'minus_one' for a sparse goal"
            )
        return RewardTransform(name, scale=1000.0 / float(episode_returns.max() - episode_returns.min()))
    if name == "normalize":
        std, mean = torch.std_mean(rewards.double(), correction=0)
        if float(std) <= 1e-6 * max(1.0, abs(float(mean))):
            raise ValueError(
                f"reward transform 'normalize' divides by the std of the rewards, but all are {float(mean):g}; use 'none'"
            )
        return RewardTransform(name, scale=1.0 / float(std), shift=-float(mean / std))
    if name == "unit_returns":
        if returns_to_go is None:
            raise ValueError("reward transform 'unit_returns' needs the episodes of the data")
        shift = -1.0 if _choose(rewards, episode_returns, terminal_rewards) == "minus_one" else 0.0
        returns = returns_to_go(rewards + shift).double()
        std, mean = torch.std_mean(returns, correction=0)
        scale = 1.0 if float(std) <= 1e-6 * max(1.0, abs(float(mean))) else 1.0 / float(std)
        return RewardTransform(name, scale, scale * shift)
    return RewardTransform(name, *_FIXED[name])


def _choose(rewards: Tensor, episode_returns: Tensor, terminal_rewards: Tensor | None) -> str:
    """The transform that "auto" stands for."""
    # Both values must occur: a reward of 1 for staying alive is not a sparse goal, and r - 1 would erase it. For the same
    # reason, an episode that terminates at reward 0 (a fall) rules out a sparse goal.
    zero, one = rewards == 0, rewards == 1
    sparse_goal = bool((zero | one).all() and zero.any() and one.any())
    if sparse_goal and (terminal_rewards is None or bool((terminal_rewards == 1).all())):
        return "minus_one"
    return "return_range" if _differ(episode_returns) else "none"


def _differ(returns: Tensor) -> bool:
    """Whether there are at least two returns whose range is more than rounding."""
    if len(returns) < 2:
        return False
    return float(returns.max() - returns.min()) > 1e-5 * max(1.0, float(returns.abs().max()))


def _describe(returns: Tensor) -> str:
    """Why the range of returns is zero, for a message."""
    if len(returns) == 0:
        return "the data contain no episode"
    if len(returns) == 1:
        return "the data contain only one episode"
    return f"all {len(returns)} episodes return {float(returns[0]):g}"
