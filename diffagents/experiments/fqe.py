"""Fitted Q evaluation: the value of a policy, estimated from data alone.   Le, Voloshin, Yue, ICML 2019, arXiv:1903.00601.

    Q <- argmin_Q E[ (Q(s, a) - y)^2 ],   y = r + gamma (1 - d) Qbar(s', pi(s'))       their Algorithm 3, by gradient steps
    estimate = mean of Qbar(s_0, pi(s_0)) over the data's first states: the discounted return of raw rewards

pi is fixed, so its actions are computed once, as it is deployed; an update then costs two small networks whatever the policy,
and many policies are evaluated together as members of one ensemble. d is 1 only at a termination: a time limit never ends the
value of a state. Paine et al. 2020 (arXiv:2007.09055) found that such estimates rank policies well; they are not forecasts.
Details
  [D1] Qbar is the target network of Q, which also gives the estimate (it is less noisy than Q). The learning rate decays on a
       cosine.
  [D2] y is clipped to the range that the rewards allow, [min r, max r] / (1 - gamma), extended to 0 if episodes terminate:
       away from the data Q extrapolates, and may diverge by bootstrapping from its own extrapolations. `clipped` is the share
       of targets that were clipped.
  [D3] Q has LayerNorm, which bounds these extrapolations. Observations are normalised by the moments of the data, actions are
       in [-1, 1].
  [D4] The network learns in units of the standard deviation of the data's returns and starts at their mean: from 0 the target
       network would need about 1 / (tau (1 - gamma)) steps to reach it.
  [D5] With several fits (`n_seeds`) a target uses the minimum of their Qbar, like the twin critics of TD3: without data they
       disagree, and a single fit tends to be too optimistic exactly there and to rank a policy first that left the data.
       n_seeds = 1 is the plain method.
  [D6] Every policy is evaluated with the same rows, batches and initial weights, so that chance cancels in comparisons.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from diffagents.config.checks import MOST
from diffagents.config.hyperparameters import Hyperparameters, hyperparameter
from diffagents.data.normalize import ObsNormalizer, RewardTransform
from diffagents.data.sampler import Sampler
from diffagents.data.transitions import Transitions
from diffagents.functional import lambda_returns, polyak_update_, td_target
from diffagents.networks.mlp import EnsembleMLP
from diffagents.training.updates import Noise, Optimizer, Runner, Stage, Update
from diffagents.types import Batch, Metrics

MAX_STARTS = 2000
"""At most so many first states are averaged over: more add little, and a policy may be slow."""


@dataclass(frozen=True)
class FQEConfig(Hyperparameters):
    """Settings of the evaluation, the same for all policies that are compared."""

    gamma: float = hyperparameter(
        0.99, "Discount factor of the estimate, whatever the policies were trained with.", at_least=0, below=1
    )
    steps: int = hyperparameter(10_000, "Gradient steps.", at_least=1)
    batch_size: int = hyperparameter(256, "Number of transitions in a batch.", at_least=1, at_most=MOST)
    learning_rate: float = hyperparameter(3e-4, "Initial learning rate, which falls to 0 on a cosine [D1].", above=0)
    tau: float = hyperparameter(
        0.01, "Soft update (Polyak) coefficient of the target network of Q, at every step.", above=0, at_most=1
    )
    hidden: tuple[int, ...] = hyperparameter((128, 128), "Widths of the hidden layers of Q.", at_least=1)
    n_seeds: int = hyperparameter(
        2,
        "Number of fits of Q for each policy, which are averaged at the end [D5]. The time grows in proportion.",
        at_least=1,
        at_most=MOST,
    )
    max_transitions: int = hyperparameter(
        20_000, "Most transitions that are used, as a diffusion policy takes up to 30 ms of a CPU for each.", at_least=1
    )
    seed: int = hyperparameter(0, "Seed of the rows, the batches and the initial weights.", at_least=0)


@dataclass(frozen=True)
class FQEResult:
    """The estimate of one policy.

    Attributes:
        values: (n_seeds, n_starts), the discounted return of raw reward from each first state.
        drift: change of the mean in the last quarter of the steps.
        clipped: share of the targets in that quarter that were clipped [D2].
    """

    values: Tensor
    drift: float
    clipped: float


class FQE:
    """Data prepared once, on `device`, for the evaluation of any number of policies.

    Args:
        data: the dataset.
        config: settings of the evaluation.
        device: where to fit.

    Attributes:
        next_obs: (N, S), observations at which the actions of a policy are needed, in raw units.
        start_obs: (n_starts, S), first states at which the actions of a policy are needed, in raw units.

    Raises:
        ValueError: if the dataset is empty.
    """

    def __init__(self, data: Transitions, config: FQEConfig, device: torch.device | str = "cpu") -> None:
        if len(data) == 0:
            raise ValueError(f"{data.info.get('id', 'the dataset')} contains no transitions: there is nothing to evaluate on")
        self.config, self.device = config, torch.device(device)
        generator = torch.Generator().manual_seed(config.seed)
        rows = some_rows(len(data), config.max_transitions, generator)
        starts = first_rows(data)
        starts = starts[some_rows(len(starts), MAX_STARTS, generator)]
        self.next_obs, self.start_obs = data.next_obs[rows], data.obs[starts]

        returns = discounted_returns(data, config.gamma)
        self.scale = max(float(returns.std(correction=0)), 0.01 * float(returns.abs().mean()), 1e-6)  # [D4]
        self.first = float(returns.mean()) / self.scale
        normalizer = ObsNormalizer(data.spec.obs_dim).fit(data.obs)
        whole = data.sampler("cpu", RewardTransform(scale=1.0 / self.scale), normalizer)
        self.sampler = Sampler(whole.matrix[rows].to(self.device), whole.obs_dim, whole.act_dim)
        self.starts = normalizer(self.start_obs).to(self.device)
        ends = data.rew if not data.done.any() else torch.cat([data.rew, torch.zeros(1)])
        self.bounds = tuple(float(r) / ((1.0 - config.gamma) * self.scale) for r in (ends.amin(), ends.amax()))

    def fit(self, next_act: Tensor, start_act: Tensor) -> list[FQEResult]:
        """Evaluate P policies.

        Args:
            next_act: (P, N, A), their actions in [-1, 1] at `next_obs`.
            start_act: (P, n_starts, A), their actions in [-1, 1] at `start_obs`.

        Returns:
            One result per policy.
        """
        c, n_policies = self.config, len(next_act)
        q = self._network(n_policies)
        q_target = copy.deepcopy(q).requires_grad_(False)
        optimizer = Optimizer(q.parameters(), c.learning_rate, cosine=True)
        optimizer.start_schedule(c.steps)
        low, high = self.bounds

        def target_values(obs: Tensor, act: Tensor) -> Tensor:
            """Qbar of each policy at its own actions: (B, S), (P, B, A) -> (P * n_seeds, B)."""
            pairs = torch.cat([obs.expand(n_policies, -1, -1), act], -1)
            values: Tensor = q_target(pairs.repeat_interleave(c.n_seeds, 0))
            return values

        def least(q: Tensor) -> Tensor:
            """The minimum over the fits of each policy, (E, B) -> (E, B) [D5]."""
            return q.view(n_policies, c.n_seeds, -1).amin(1).repeat_interleave(c.n_seeds, 0)

        def loss(batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
            with torch.no_grad():
                next_q = target_values(batch.next_obs, batch.extras["next_act"].transpose(0, 1))  # (E, B)
                target = td_target(batch.rew, batch.done, least(next_q).clamp(low, high), c.gamma)  # [D2]
                outside = ((next_q < low) | (next_q > high)).float().mean(-1)
            error = q(torch.cat([batch.obs, batch.act], -1)) - target
            clipped.add_(outside)
            return error.square().mean(-1).sum(), {}

        def follow() -> None:
            polyak_update_(q_target.parameters(), q.parameters(), c.tau)

        @torch.no_grad()
        def estimate() -> Tensor:
            return target_values(self.starts, start_act.to(self.device)) * self.scale  # (E, n_starts)

        stage = Stage("fqe", c.batch_size, (Update(loss, optimizers=(optimizer,), after=follow),))
        sampler = self.sampler.with_extras(next_act=next_act.transpose(0, 1).contiguous().to(self.device))
        runner = Runner(stage, sampler, torch.Generator(self.device).manual_seed(c.seed))  # [D6]
        clipped, late, before = torch.zeros(n_policies * c.n_seeds, device=self.device), c.steps - c.steps // 4, estimate()
        for k in range(c.steps):  # nothing in this loop waits for the device
            if k == late:
                before = estimate()
                clipped.zero_()
            runner.step(k)
        after = estimate().cpu()
        drift, clipped = (after - before.cpu()).mean(-1), clipped.cpu() / (c.steps - late if late < c.steps else c.steps)
        by_policy = (torch.split(x, c.n_seeds) for x in (after, drift, clipped))
        return [FQEResult(v, float(d.mean()), float(s.mean())) for v, d, s in zip(*by_policy, strict=True)]

    def _network(self, n_policies: int) -> EnsembleMLP:
        """Q of all policies and seeds: equal initial weights for each policy [D6], output bias at the mean return [D4]."""
        c, size = self.config, self.sampler.obs_dim + self.sampler.act_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            one = EnsembleMLP(c.n_seeds, size, c.hidden, layer_norm=True)  # [D3]
            q = EnsembleMLP(n_policies * c.n_seeds, size, c.hidden, layer_norm=True)
        with torch.no_grad():
            one.biases[-1].fill_(self.first)
            for parameter, value in zip(q.parameters(), one.parameters(), strict=True):
                parameter.copy_(value.repeat(n_policies, 1, 1))
        return q.to(self.device)


def some_rows(n: int, most: int, generator: torch.Generator) -> Tensor:
    """All n row numbers in order, or `most` of them drawn without replacement, (min(n, most),) int64."""
    return torch.arange(n) if n <= most else torch.randperm(n, generator=generator)[:most].sort().values


def first_rows(data: Transitions) -> Tensor:
    """The row in which each episode begins, (E,) int64; empty episodes are left out."""
    ends = data.episode_ends
    starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
    return starts[starts < ends]


def discounted_returns(data: Transitions, gamma: float, transform: RewardTransform | None = None) -> Tensor:
    """The discounted return of the data from each row on.

    If a time limit or a cut ended the recording, the mean reward is assumed to continue for ever.

    Args:
        data: the dataset, N transitions.
        gamma: discount factor, in [0, 1).
        transform: reward transform. Default: raw reward.

    Returns:
        (N,), in the units of `transform`.
    """
    rew = data.rew if transform is None else transform(data.rew)
    beyond = (rew.mean() / (1.0 - gamma)).expand(len(rew))
    return lambda_returns(rew, data.done, beyond, data.episode_ends, gamma, lam=1.0)
