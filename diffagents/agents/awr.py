"""AWR: Advantage-Weighted Regression.   Peng, Kumar, Zhang, Levine 2019, arXiv:1910.00177.  Read offline: one round on data.

Order      V is fitted to the data's returns and frozen; then the policy is cloned from the data by weight.
Critic     V <- argmin E[ (R - V(s))^2 ],   R the discounted return from s
Policy     max_pi E[ w log pi(a|s) ],   w = min(exp(A / T), weight_clip),   A = R^lambda - V(s), standardised
           pi(.|s) = N(tanh(MLP(s)), diag sigma^2), one learned sigma for all s
Symbols    V -> critic, T -> temperature, R^lambda: `functional.lambda_returns`
Details
  [D1] The official algorithm learns online: each of its rounds collects data, fits V to TD(lambda) returns of the previous V,
       then fits the policy. On fixed data there is one round and no previous V, so V is fitted once, to Monte-Carlo returns.
       Their sum ENDS at a time-out or a cut: shortly before one, V is too low by the rewards that would have followed.
  [D2] The policy's R^lambda bootstraps with V(s') after a time-out or a cut, and ends at a termination only.
  [D3] A is standardised over ALL data, (A - mean) / (std + 1e-5) (official code). Otherwise the weights degenerate, because the
       scale of the rewards would set the temperature.
  [D4] The official code has a fixed sigma (0.2 or 0.4), SGD, layers of [128, 64], Xavier initialisation, a penalty on means
       outside the bounds, and running normalisers of observations, actions and values. Ours has IQL's Gaussian policy, Adam,
       [256, 256] and PyTorch's initialisation; of the normalisers only `normalize_obs` remains.
Online (the official algorithm, in rounds)
  [O1] A round is 1000 environment steps: then V is fitted to TD(lambda) returns of the previous V, and the policy by weighted
       cloning, on old and new data, with one update of each per environment step, the policy's at `online_learning_rate`. A is
       standardised over both.
  [O2] It acts by sampling its Gaussian, whose sigma is learned ([D4]). No constraint is relaxed.
Fast recipe (`preset="fast"`, one setting for all datasets; our design, off in a plain config)
  [F1] `return_temperature`: the policy learns from episodes drawn by their return, the critic from half of these and half of
       all (Hong et al. 2023, arXiv:2306.13085).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffagents.agent import Agent
from diffagents.config.checks import MOST, net_arch
from diffagents.config.hyperparameters import Hyperparameters, hyperparameter
from diffagents.config.recipe import COSINE, DETERMINISTIC, RETURN_TEMPERATURE
from diffagents.data.normalize import REWARD_TRANSFORMS
from diffagents.data.replay_buffer import Mixture
from diffagents.data.sampler import Sampler
from diffagents.functional import lambda_returns
from diffagents.networks.mlp import MLP, GaussianPolicy, TanhPolicy
from diffagents.training.plan import Plan
from diffagents.training.updates import Noise, Optimizer, Stage, Update
from diffagents.types import Batch, Metrics

ROWS_AT_ONCE = 65_536
"""How many rows V evaluates at once, which limits the memory of its hidden layers."""


@dataclass(frozen=True)
class AWRConfig(Hyperparameters):
    """Hyperparameters of AWR.

    temperature, weight_clip, td_lambda and gamma are the official code's; no values for single tasks are published.
    """

    temperature: float = hyperparameter(
        1.0, "Temperature T of the standardised advantages: small is greedy, large clones the data.", above=0
    )
    weight_clip: float = hyperparameter(20.0, "Largest weight of an action.", above=0)
    td_lambda: float = hyperparameter(
        0.95, "Lambda of the returns: 1 relies on the returns of the data, 0 on the critic.", at_least=0, at_most=1
    )
    deterministic: bool = hyperparameter(True, DETERMINISTIC)
    gamma: float = hyperparameter(0.99, "Discount factor of future rewards.", at_least=0, below=1)
    learning_rate: float = hyperparameter(3e-4, "Learning rate of the critic and of the policy.", above=0)
    batch_size: int = hyperparameter(256, "Number of transitions in a batch.", at_least=1, at_most=MOST)
    online_learning_rate: float = hyperparameter(3e-5, "Learning rate of the policy in `learn_online`, constant [O1].", above=0)
    reward_transform: str = hyperparameter(
        "none",
        'Transform of the rewards, of which "auto" chooses one from the data. '
        "The policy's weights do not depend on the scale of the rewards.",
        choices=REWARD_TRANSFORMS,
    )
    normalize_obs: bool = hyperparameter(
        True, "Whether observations are normalised by the mean and standard deviation of the data [D4]."
    )
    cosine: bool = hyperparameter(False, COSINE)
    return_temperature: float | None = hyperparameter(None, RETURN_TEMPERATURE, above=0)
    critic_steps: int | None = hyperparameter(
        None, "Gradient steps of the critic stage. None: the `default` block of zoo/awr.yml.", at_least=0
    )
    policy_steps: int | None = hyperparameter(
        None, "Gradient steps of the policy stage. None: the `default` block of zoo/awr.yml.", at_least=0
    )


class AWR(Agent):
    """Advantage-weighted regression: a Gaussian policy, cloned from the data with weights that grow with the advantage."""

    Config = AWRConfig
    config: AWRConfig
    policy: GaussianPolicy
    STAGE_SHARES: ClassVar[dict[str, int]] = {"critic": 200_000, "policy": 1_000_000}  # official code: 200 to 1000
    POLICY_STAGE = "policy"
    MODEL: ClassVar[tuple[str, ...]] = ("policy",)
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]] = ("critic",)
    HEALTHY: ClassVar[dict[str, str]] = {
        "critic_loss": "The error of V to the returns of the data falls, then hardly changes. It does not reach 0.",
        "policy_loss": "The weighted cloning error falls, then hardly changes; as minus a log-likelihood it may be below 0.",
    }

    def build(self) -> None:
        c, obs_dim, act_dim = self.config, self.obs_dim, self.act_dim
        arch = net_arch(self.policy_kwargs, {"pi": (256, 256), "vf": (256, 256)})
        self.critic = MLP(obs_dim, arch["vf"], 1).to(self.device)
        self.policy = GaussianPolicy(obs_dim, act_dim, arch["pi"]).to(self.device)
        self.optimizers = {
            "critic": Optimizer(self.critic.parameters(), c.learning_rate, cosine=c.cosine),
            "policy": Optimizer(self.policy.parameters(), c.learning_rate, cosine=c.cosine),
        }

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        size, opt = self.config.batch_size, self.optimizers
        policy = Update(self.policy_loss, optimizers=(opt["policy"],), by_return=True)
        return [
            Stage("critic", size, (Update(self.critic_loss, optimizers=(opt["critic"],)),), self.prepare_critic),
            Stage("policy", size, (policy,), self.prepare_policy),
        ]

    def online_stage(self) -> Stage:
        updates = tuple(update for stage in self.stages() for update in stage.updates)
        return Stage("online", self.config.batch_size, updates, self.prepare_online)

    def prepare_online(self, mixture: Mixture, generator: torch.Generator) -> Mixture:
        """The returns and weights of every row, computed with the previous V [O1]."""
        mixture = mixture.in_episodes(whole=False)
        returns, weights = self.returns_and_weights(mixture.sides)
        return mixture.with_extras(returns=returns, weights=weights)

    # ---- stage 1: critic -------------------------------------------------------------------------------------------
    def prepare_critic(self, sampler: Sampler, generator: torch.Generator) -> Sampler:
        """Monte-Carlo returns of every row [D1]."""
        data = sampler.all()
        no_bootstrap = torch.zeros_like(data.rew)
        returns = lambda_returns(data.rew, data.done, no_bootstrap, sampler.episode_ends, self.config.gamma, 1.0)
        return sampler.with_extras(returns=returns)

    def critic_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        value = self.critic(batch.obs).squeeze(-1)
        loss = (batch.extras["returns"] - value).square().mean()
        return loss, {"critic_loss": loss.detach(), "v": value.detach().mean()}

    # ---- stage 2: policy -------------------------------------------------------------------------------------------
    def prepare_policy(self, sampler: Sampler, generator: torch.Generator) -> Sampler:
        """The weight w of every row [D2] [D3]."""
        _, (weights,) = self.returns_and_weights([sampler])
        return sampler.with_extras(weights=weights)

    def returns_and_weights(self, sides: Sequence[Sampler]) -> tuple[list[Tensor], list[Tensor]]:
        """R^lambda and w of every row, (N,) for each of `sides`; A is standardised over all of them."""
        c, returns, advantages = self.config, [], []
        for side in sides:
            data, next_value = side.all(), self.values(side.next_obs)
            returns.append(lambda_returns(data.rew, data.done, next_value, side.episode_ends, c.gamma, c.td_lambda))
            advantages.append(returns[-1] - self.values(side.obs))
        std, mean = torch.std_mean(torch.cat(advantages), correction=0)
        return returns, [torch.exp((a - mean) / (std + 1e-5) / c.temperature).clamp(max=c.weight_clip) for a in advantages]

    @torch.no_grad()
    def values(self, obs: Tensor) -> Tensor:
        """V at normalised observations (N, S) -> (N,), in pieces of ROWS_AT_ONCE."""
        return torch.cat([self.critic(part).squeeze(-1) for part in torch.split(obs, ROWS_AT_ONCE)])

    def policy_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        weight = batch.extras["weights"]
        loss = -(weight * self.policy.log_prob(batch.obs, batch.act)).mean()
        return loss, {"policy_loss": loss.detach(), "weight": weight.mean()}

    # ---- acting ----------------------------------------------------------------------------------------------------
    def point_policy(self, deterministic: bool) -> TanhPolicy | None:
        return self.policy if deterministic else None

    def draw_act(self, n: int, deterministic: bool, config: AWRConfig, generator: torch.Generator) -> Noise:
        if deterministic:
            return {}
        kwargs: dict[str, Any] = {"generator": generator, "device": self.device}
        return {"eps": torch.randn(n, self.act_dim, **kwargs)}

    def act(self, obs: Tensor, noise: Noise, config: AWRConfig) -> Tensor:
        """(B, S) -> (B, A): a sample of the Gaussian, clipped to [-1, 1]; if deterministic, its mean."""
        if "eps" in noise:
            return self.policy.sample(obs, noise["eps"])
        mean: Tensor = self.policy(obs)
        return mean
