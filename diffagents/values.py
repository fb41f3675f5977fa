"""Value maths as plain functions: TD target, expectile loss, Polyak update, action gradient.

Shapes: B batch, A action dimension, E ensemble members. All functions are pure unless their name ends in `_`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def td_target(rew: Tensor, done: Tensor, next_value: Tensor, gamma: float) -> Tensor:
    """One-step target r + gamma (1 - d) V(s'), all (B,). d is 1 on a true termination only, never on a time-out."""
    return rew + gamma * (1.0 - done) * next_value


def expectile_loss(diff: Tensor, expectile: float) -> Tensor:
    """Mean of |tau - 1(u < 0)| u^2 over u = target - prediction, any shape; tau in (0, 1).

    tau = 0.5 is half the mean squared error; tau -> 1 makes the prediction approach the largest target.
    Source: IQL (Kostrikov et al. 2021), Eq. (5); official `value_net`, `loss`.
    """
    weight = torch.where(diff < 0, 1.0 - expectile, expectile)
    return (weight * diff.square()).mean()


def action_gradient(value: Callable[[Tensor], Tensor], act: Tensor) -> Tensor:
    """grad_a value(a) at `act` (B, A), detached; `value` maps (B, A) to (B,), row by row."""
    leaf = act.detach().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf)
    return gradient


@torch.no_grad()
def polyak_update_(target: Iterable[Tensor], online: Iterable[Tensor], tau: float) -> None:
    """target <- (1 - tau) target + tau online, in place; tau is the share of the ONLINE network (0.005, not 0.995)."""
    torch._foreach_lerp_(list(target), list(online), tau)
