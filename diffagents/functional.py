"""Value maths as plain functions: TD target, expectile loss, returns, Polyak update, choice among candidates.

Shapes: B batch, A action dimension, E ensemble members. All functions are pure unless their name ends in `_`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def td_target(rew: Tensor, done: Tensor, next_value: Tensor, gamma: float, floor: Tensor | None = None) -> Tensor:
    """One-step target r + gamma (1 - d) V(s'), all (B,). d is 1 on a true termination only, never on a time-out.

    floor: (B,) what the target is at least, e.g. the return that the data then had (`learn_online(calibrate=True)`).
    """
    target = rew + gamma * (1.0 - done) * next_value
    return target if floor is None else torch.maximum(target, floor)


def expectile_loss(diff: Tensor, expectile: float) -> Tensor:
    """Mean of |tau - 1(u < 0)| u^2 over u = target - prediction, any shape; tau in (0, 1).

    tau = 0.5 is half the mean squared error; tau -> 1 makes the prediction approach the largest target.
    Source: IQL (Kostrikov et al. 2021), Eq. (5); official `value_net`, `loss`.
    """
    weight = torch.where(diff < 0, 1.0 - expectile, expectile)
    return (weight * diff.square()).mean()


@torch.no_grad()
def lambda_returns(rew: Tensor, done: Tensor, next_value: Tensor, episode_ends: Tensor, gamma: float, lam: float) -> Tensor:
    """TD(lambda) returns of the N rows of whole data, episode after episode, (N,) float32 on `rew`'s device.

        G_t = r_t + gamma (1 - d_t) [ (1 - lam) V(s'_t) + lam G_{t+1} ],    in an episode's last row  V(s'_t) alone

    so a termination ends the sum, while a time-out or a cut goes on with V(s'). rew, done, next_value (N,);
    episode_ends (E,) one past each episode's last row. lam = 1 with a next_value of zero: Monte-Carlo returns.
    """
    r, d, v = (tensor.cpu().double() for tensor in (rew, done, next_value))
    ends = episode_ends.cpu()
    share = torch.full_like(r, lam)
    share[ends[ends > 0] - 1] = 0.0  # an end at 0 closes an episode of which no row is left
    discount = gamma * (1.0 - d)
    here, carry = (r + discount * (1.0 - share) * v).tolist(), (discount * share).tolist()
    value, returns = 0.0, [0.0] * len(here)
    for i in range(len(here) - 1, -1, -1):
        value = here[i] + carry[i] * value
        returns[i] = value
    return torch.tensor(returns, dtype=torch.float32, device=rew.device)


def action_gradient(value: Callable[[Tensor], Tensor], act: Tensor) -> Tensor:
    """grad_a value(a) at `act` (B, A), detached; `value` maps (B, A) to (B,), row by row."""
    gradient: Tensor = torch.func.grad(lambda a: value(a).sum())(act.detach())  # which vmap and tracing can follow
    return gradient.detach()


@torch.no_grad()
def polyak_update_(target: Iterable[Tensor], online: Iterable[Tensor], tau: float) -> None:
    """target <- (1 - tau) target + tau online, in place; tau is the share of the ONLINE network (0.005, not 0.995)."""
    torch._foreach_lerp_(list(target), list(online), tau)


def normalized_q_loss(q1: Tensor, q2: Tensor, coin: Tensor) -> Tensor:
    """Minus the mean of one critic in units of the other's mean size: which is which, a coin in [0, 1) decides.

    q1, q2 (B,) at the policy's own actions; the divisor is detached. Source: Diffusion-QL's and DiffCPS's official code.
    """
    first = -q1.mean() / q2.abs().mean().detach()
    second = -q2.mean() / q1.abs().mean().detach()
    return torch.where(coin > 0.5, first, second)


SELECT = ("softmax", "argmax", "first")
"""Ways of `select_action`."""


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gumbel noise: the argmax of log p + noise is a draw from p."""
    return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log()


def select_action(actions: Tensor, q: Tensor, select: str, temperature: float, noise: Tensor | None) -> Tensor:
    """One of K candidates for each observation; actions (B, K, A), q (B, K) -> (B, A).

    "softmax": drawn with probabilities softmax(q / temperature), q as it is (Diffusion-QL, DiffCPS at temperature 1), by
    Gumbel `noise` (B, K); without noise, or "argmax": the highest q, the limit of temperature 0 (IDQL, BDPO); "first": q is
    not asked.
    """
    if select == "first":
        return actions[:, 0]
    best = (q / temperature + noise if select == "softmax" and noise is not None else q).argmax(-1, keepdim=True)
    return actions.gather(1, best[..., None].expand(-1, 1, actions.shape[-1])).squeeze(1)


def perturb(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha_t x + sigma_t eps; x and eps (B, A), alpha and sigma (B,)."""
    return alpha[:, None] * x + sigma[:, None] * eps


def eps_loss(predicted: Tensor, eps: Tensor) -> Tensor:
    """Batch mean of the squared error SUMMED over the A dimensions, (B, A) both (SRPO official `loss_fn`).

    Diffusion-QL, DiffCPS and BDPO take the mean over the dimensions too: `torch.nn.functional.mse_loss`.
    """
    return (predicted - eps).square().sum(-1).mean()
