"""Value maths as plain functions: TD targets, expectile loss, lambda returns, Polyak update, choice among candidate actions.

Shapes: B batch, A action dimension, K candidates. All functions are pure unless their name ends in `_`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from diffagents.torch_internals import for_each
from diffagents.types import Batch, Metrics

SELECT = ("softmax", "argmax", "first")
"""The values of `select` that `select_action` knows."""
LEAST_GAIN = 0.02
"""`spread_gradient` follows a value less if it changes by less than this when the action moves by the spread of the data's
actions. Its unit is that of the value: with the reward transform "unit_returns", the standard deviation of the returns."""


def td_target(rew: Tensor, done: Tensor, next_value: Tensor, gamma: float, floor: Tensor | None = None) -> Tensor:
    """One-step TD target r + gamma (1 - d) V(s').

    Args:
        rew: Rewards, (B,).
        done: 1 at a true termination, else 0, (B,). A time-out is not a termination: the target bootstraps from its next state.
        next_value: V(s'), (B,).
        gamma: Discount in [0, 1].
        floor: Lower bound of the target, (B,): the return that the data reached (`learn_online(calibrate=True)`).

    Returns:
        The targets, (B,).
    """
    target = rew + gamma * (1.0 - done) * next_value
    return target if floor is None else torch.maximum(target, floor)


def expectile_loss(diff: Tensor, expectile: float) -> Tensor:
    """Mean of |tau - 1(u < 0)| u^2 over the differences u = target - prediction.

    Source: IQL (Kostrikov et al. 2021), Eq. (5); official `value_net`, `loss`.

    Args:
        diff: u, of any shape.
        expectile: tau in (0, 1). 0.5 gives half the mean squared error; towards 1 the prediction approaches the largest target.

    Returns:
        A scalar.
    """
    weight = torch.where(diff < 0, 1.0 - expectile, expectile)
    return (weight * diff.square()).mean()


@torch.no_grad()
def lambda_returns(rew: Tensor, done: Tensor, next_value: Tensor, episode_ends: Tensor, gamma: float, lam: float) -> Tensor:
    """TD(lambda) returns of N consecutive rows, episode after episode.

        G_t = r_t + gamma (1 - d_t) [ (1 - lam) V(s'_t) + lam G_{t+1} ],    in an episode's last row  V(s'_t) alone

    A termination ends the sum; at a time-out or a cut the sum continues with V(s').

    Args:
        rew: Rewards, (N,).
        done: 1 at a true termination, else 0, (N,).
        next_value: V(s'), (N,). With zeros and lam = 1 the result is the Monte-Carlo return.
        episode_ends: One past the last row of each episode, (E,) int64, in ascending order; equal neighbours are allowed.
        gamma: Discount in [0, 1].
        lam: lambda in [0, 1].

    Returns:
        The returns, (N,) float32 on the device of `rew`; computed in double precision.
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


def returns_to_go(rew: Tensor, done: Tensor, episode_ends: Tensor, gamma: float) -> Tensor:
    """Discounted returns-to-go of N consecutive rows, where an episode that was cut short continues as it ended.

    After a time-out, or where the recording stops, the rewards are assumed to continue at the mean of the last 1 / (1 - gamma)
    rewards of the episode. Ending the sum there instead would teach a critic that late states are worth little.

    Args:
        rew: Rewards, (N,).
        done: 1 at a true termination, else 0, (N,).
        episode_ends: One past the last row of each episode, (E,) int64, in ascending order; equal neighbours are allowed.
        gamma: Discount in [0, 1).

    Returns:
        The returns, (N,) float32 on the device of `rew`.
    """
    horizon, next_value, first = max(1, round(1.0 / (1.0 - gamma))), torch.zeros_like(rew), 0
    for end in episode_ends.tolist():
        if end > first:
            next_value[end - 1] = rew[max(first, end - horizon) : end].mean() / (1.0 - gamma)
        first = end
    return lambda_returns(rew, done, next_value, episode_ends, gamma, 1.0)


def return_loss(critic: Callable[[Tensor], Tensor], batch: Batch) -> tuple[Tensor, Metrics]:
    """The squared errors of an ensemble's Q(s, a) to the returns of the data, with which a stage may begin.

    Args:
        critic: Q of [observation, action], an ensemble: (B, S + A) -> (E, B).
        batch: Transitions with `extras["returns"]`, (B,) (`data.sampler.Sampler.with_returns`).

    Returns:
        The sum over the members of their mean squared errors, a scalar, and the metrics `return_loss` and `q`.
    """
    q = critic(torch.cat([batch.obs, batch.act], -1))  # (E, B)
    loss = (q - batch.extras["returns"]).square().mean(-1).sum()
    return loss, {"return_loss": loss.detach(), "q": q.detach().mean()}


def action_gradient(value: Callable[[Tensor], Tensor], act: Tensor) -> Tensor:
    """Gradient of a value with respect to the action.

    Args:
        value: A function of actions (B, A) that returns (B,), row by row.
        act: Where the gradient is taken, (B, A).

    Returns:
        grad_a value(a) at `act`, (B, A), detached.
    """
    gradient: Tensor = torch.func.grad(lambda a: value(a).sum())(act.detach())  # which vmap and tracing can follow
    return gradient.detach()


@torch.no_grad()
def polyak_update_(target: Iterable[Tensor], online: Iterable[Tensor], tau: float) -> None:
    """Move target parameters towards the online ones in place: target <- (1 - tau) target + tau online.

    Args:
        target: Parameters of the target network.
        online: Parameters of the online network, in the same order.
        tau: Share of the ONLINE network in (0, 1]: 0.005, not 0.995.
    """
    for_each("lerp_")(list(target), list(online), tau)


def normalized_q_loss(q1: Tensor, q2: Tensor, coin: Tensor) -> Tensor:
    """Minus the mean of one critic, divided by the mean size of the other.

    Source: official code of Diffusion-QL and DiffCPS.

    Args:
        q1: Values of the first critic at the policy's own actions, (B,).
        q2: Values of the second critic at the same actions, (B,).
        coin: A random number in [0, 1), a scalar. Above 0.5 the first critic is maximised, else the second.

    Returns:
        A scalar; the divisor is detached.
    """
    first = -q1.mean() / q2.abs().mean().detach()
    second = -q2.mean() / q1.abs().mean().detach()
    return torch.where(coin > 0.5, first, second)


def spread_gradient(gradient: Tensor, var: Tensor) -> Tensor:
    """A batch of gradients as bounded steps in units of the spread of the data's actions.

    In coordinates a = m + sqrt(v) u, in which the actions of the data have unit variance, the gradient is divided by its root
    mean square r over batch and dimensions, and each row by sqrt(1 + its own mean square): rows of usual size keep about their
    size, and none exceeds 1. So a step k of it moves no action by more than k standard deviations of the data's actions,
    however steep the value and however narrow the data; and a state where the value is steep, which is often where it is
    wrong, counts no more than the others.

        u = sqrt(v) g / sqrt(r^2 + c^2),    step = sqrt(v) u / sqrt(1 + mean_a u^2),    c = LEAST_GAIN

    Where the whole batch promises little, steps are short: near the actions of an expert the gain is small, and what a critic
    learns of it is the reward of the next few steps, which is no guide. On halfcheetah medium-expert such steps ruin the gait.

    Args:
        gradient: g = dQ/da, (B, A).
        var: v, the variance of the data's actions around the clone in each dimension, (A,).

    Returns:
        (B, A).
    """
    u = var.sqrt() * gradient
    u = u / (u.square().mean() + LEAST_GAIN**2).sqrt()
    return var.sqrt() * u / (1.0 + u.square().mean(-1, keepdim=True)).sqrt()


def gradient_ascent_loss(value: Callable[[Tensor], Tensor], act: Tensor, var: Tensor) -> Tensor:
    """A surrogate loss whose gradient ascends a value with a step size that does not depend on the value's scale.

    Args:
        value: A function of actions (B, A) that returns (B,), row by row.
        act: The policy's own actions, (B, A), with gradients.
        var: The variance of the data's actions around the clone in each dimension, (A,).

    Returns:
        A scalar: minus the mean over batch and dimensions of `act` times the `spread_gradient` of the value there.
    """
    return -(spread_gradient(action_gradient(value, act), var) * act).mean()


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gumbel noise of `shape` on the generator's device: argmax(log p + noise) is distributed as p."""
    return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log()


def select_action(actions: Tensor, q: Tensor, select: str, temperature: float, noise: Tensor | None) -> Tensor:
    """Choose one of K candidate actions for each observation.

    Args:
        actions: Candidates, (B, K, A).
        q: Their values, (B, K).
        select: "softmax" samples a candidate with probabilities softmax(q / temperature), where q is not normalised
            (Diffusion-QL, and DiffCPS with temperature 1); "argmax" takes the highest q (IDQL, BDPO), which is the limit of
            temperature 0; "first" takes the first candidate and ignores q.
        temperature: Positive; used by "softmax" alone.
        noise: `gumbel` noise (B, K) for "softmax". With None, "softmax" takes the highest q as "argmax" does.

    Returns:
        The chosen actions, (B, A).
    """
    if select == "first":
        return actions[:, 0]
    best = (q / temperature + noise if select == "softmax" and noise is not None else q).argmax(-1, keepdim=True)
    return actions.gather(1, best[..., None].expand(-1, 1, actions.shape[-1])).squeeze(1)


def perturb(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The forward process of a diffusion: x_t = alpha_t x + sigma_t eps.

    Args:
        x: Clean actions, (B, A).
        eps: Standard normal noise, (B, A).
        alpha: Share of the action, (B,).
        sigma: Share of the noise, (B,).

    Returns:
        The noisy actions, (B, A).
    """
    return alpha[:, None] * x + sigma[:, None] * eps


def eps_loss(predicted: Tensor, eps: Tensor) -> Tensor:
    """Batch mean of the squared error SUMMED over the action dimensions.

    Source: `loss_fn` of SRPO's official code. Diffusion-QL, DiffCPS and BDPO average over the dimensions too, which is
    `torch.nn.functional.mse_loss`.

    Args:
        predicted: Predicted noise, (B, A).
        eps: The noise that was added, (B, A).

    Returns:
        A scalar.
    """
    return (predicted - eps).square().sum(-1).mean()
