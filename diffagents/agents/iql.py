"""IQL: Offline Reinforcement Learning with Implicit Q-Learning.   Kostrikov, Nair, Levine, ICLR 2022, arXiv:2110.06169.

Every step  critic (V by expectile regression, twin Q, twin target networks), then policy, on one batch
Critic      Eqs. (5) and (6): networks/critics.py. No action outside the data is ever evaluated.
Policy      L = - E[ min(exp(beta A), 100) log pi(a|s) ],   A = min_j Qbar_j(s, a) - V(s)                             Eq. (7)
            pi(.|s) = N(tanh(MLP(s)), diag sigma^2): the squashing is of the mean only, sigma does not depend on s
Details
  [D1] Order: V(s') is computed before the V step, then V and Q are updated together, then the target networks, and the policy's
       weights use the new V and targets. The official code updates V, policy, Q (towards the new V), targets; a well-known port
       (CORL) has our order, but its weights use V and targets from before the step. The difference is one step of 0.005.
  [D2] `deterministic_policy`: the squared error replaces -log pi; an option of that port (CORL) for hopper-medium.
  [D3] `dropout` applies to the policy's hidden layers during training (official code: 0.1 on adroit and kitchen). The offline
       part of that port accepts it and never uses it.
  [D4] The policy's learning rate falls to 0 on a cosine over the stage.
  [D5] Layers are initialised as in PyTorch; the official code uses orthogonal initialisation.
  [D6] log sigma is clipped to [-5, 2] (official code; the port uses [-20, 2]).
  [D7] L_Q is the mean of the twins' squared errors, as in that port; the official code adds them, which under Adam is the same
       except for its epsilon.
Online (official fine-tuning; the paper's section 5.3)
  [O1] The same update on old and new data, one for each environment step. It acts by sampling its Gaussian and clipping. No
       constraint is relaxed: the policy improves by finding better actions and weighting them.
  [O2] Batches are uniform from one buffer that begins with the data (official code), `offline_ratio="uniform"`. If half of each
       batch came from a short run, as in the other algorithms, the same few transitions would be repeated, and their large
       advantages would dominate the weights of Eq. (7).
  [O3] Learning rates are constant ([D4] no longer applies); the policy's is `online_learning_rate`. The official 3e-4 follows
       an offline phase without decay; returning to it after a cosine destroys a converged policy. (A well-known port keeps
       stepping the cosine, which rises again from 0 by accident.)
Fast recipe (`preset="fast"`, one setting for all datasets; our design, off in a plain config)
  [F1] `return_temperature`: the policy learns from episodes drawn by their return, the critic from half of these and half of
       all (Hong et al. 2023, arXiv:2306.13085).
  [F2] `returns_share`: the stage begins with Q regressing on the returns of the data.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffagents.agent import Agent
from diffagents.config.checks import MOST, net_arch
from diffagents.config.hyperparameters import Hyperparameters, hyperparameter
from diffagents.config.recipe import DETERMINISTIC, Q_LAYER_NORM, RETURN_TEMPERATURE, RETURNS_SHARE
from diffagents.data.normalize import REWARD_TRANSFORMS
from diffagents.networks.critics import IQLCritic
from diffagents.networks.mlp import GaussianPolicy, TanhPolicy, dropout_masks
from diffagents.training.plan import Plan, opening_steps
from diffagents.training.updates import Noise, Optimizer, Stage, Update
from diffagents.types import Batch, Metrics

MAX_WEIGHT = 100.0
"""The upper limit of the weights in Eq. (7) (official code)."""


@dataclass(frozen=True)
class IQLConfig(Hyperparameters):
    """Hyperparameters of IQL. The defaults are the paper's for locomotion; values for each task are rows of zoo/iql.yml."""

    expectile: float = hyperparameter(
        0.7,
        "Expectile of Q that V is fitted to: near 1, V approaches the best actions of the data. AntMaze: 0.9.",
        above=0,
        below=1,
    )
    beta: float = hyperparameter(
        3.0,
        "Inverse temperature of the advantage weights: 0 clones the data, large is greedy. "
        "The official code calls it `temperature`. AntMaze: 10; adroit: 0.5.",
        at_least=0,
    )
    dropout: float = hyperparameter(
        0.0, "Dropout rate in the hidden layers of the policy during training [D3].", at_least=0, below=1
    )
    deterministic_policy: bool = hyperparameter(False, "Whether the policy is deterministic and fitted by squared error [D2].")
    deterministic: bool = hyperparameter(True, DETERMINISTIC)
    gamma: float = hyperparameter(0.99, "Discount factor of future rewards.", at_least=0, below=1)
    tau: float = hyperparameter(
        0.005, "Soft update (Polyak) coefficient of the target network of Q, at every critic update.", above=0, at_most=1
    )
    learning_rate: float = hyperparameter(
        3e-4,
        "Learning rate of the critic, constant, and the initial one of the policy, which falls to 0 on a cosine [D4].",
        above=0,
    )
    batch_size: int = hyperparameter(256, "Number of transitions in a batch.", at_least=1, at_most=MOST)
    online_learning_rate: float = hyperparameter(3e-5, "Learning rate of the policy in `learn_online`, constant [O3].", above=0)
    reward_transform: str = hyperparameter(
        "auto",
        'Transform of the rewards, of which "auto" chooses one from the data. '
        'Locomotion: "iql_locomotion". AntMaze: "iql_antmaze".',
        choices=REWARD_TRANSFORMS,
    )
    normalize_obs: bool = hyperparameter(
        False, "Whether observations are normalised by the mean and standard deviation of the data."
    )
    return_temperature: float | None = hyperparameter(None, RETURN_TEMPERATURE, above=0)
    returns_share: float = hyperparameter(0.0, RETURNS_SHARE, at_least=0, at_most=1)
    q_layer_norm: bool = hyperparameter(False, Q_LAYER_NORM)
    train_steps: int | None = hyperparameter(
        None, "Gradient steps of the training stage. None: the `default` block of zoo/iql.yml. Paper: 1M.", at_least=0
    )


class IQL(Agent):
    """Implicit Q-learning: a critic trained on the data's actions alone, and a Gaussian policy cloned by advantage weights."""

    Config = IQLConfig
    config: IQLConfig
    policy: TanhPolicy
    STAGE_SHARES: ClassVar[dict[str, int]] = {"train": 1_000_000}
    POLICY_STAGE = "train"
    MODEL: ClassVar[tuple[str, ...]] = ("policy",)
    OFFLINE_RATIO = "uniform"  # [O2]
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]] = ("critic",)
    HEALTHY: ClassVar[dict[str, str]] = {
        "policy_loss": "The weighted cloning error falls, then hardly changes; as minus a log-likelihood it may be below 0.",
        "advantage": "The mean advantage of the data's actions stays near 0 or below it: V already expects the better of them.",
    }

    def build(self) -> None:
        c, obs_dim, act_dim = self.config, self.obs_dim, self.act_dim
        arch = net_arch(self.policy_kwargs, {"pi": (256, 256), "qf": (256, 256), "vf": (256, 256)})
        self.critic = IQLCritic(obs_dim, act_dim, arch["qf"], arch["vf"], q_layer_norm=c.q_layer_norm).to(self.device)
        kind = TanhPolicy if c.deterministic_policy else GaussianPolicy
        self.policy = kind(obs_dim, act_dim, arch["pi"]).to(self.device)
        self.optimizers = {
            "critic": Optimizer(self.critic.trained_parameters(), c.learning_rate),
            "policy": Optimizer(self.policy.parameters(), c.learning_rate, cosine=True),  # [D4]
        }

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        c, opt = self.config, self.optimizers
        first = opening_steps(c.returns_share, plan or self.plan, "train", self.stage_steps)
        opening = Update(self.return_loss, optimizers=(opt["critic"],), after=self.follow_critic, stop=first)  # [F2]
        critic = Update(self.critic_loss, optimizers=(opt["critic"],), after=self.follow_critic, start=first)
        policy = Update(self.policy_loss, self.draw_policy, (opt["policy"],), by_return=True)
        if first == 0:
            return [Stage("train", c.batch_size, (critic, policy))]
        return [Stage("train", c.batch_size, (opening, critic, policy), lambda sampler, _: sampler.with_returns(c.gamma))]

    def online_stage(self) -> Stage:
        critic, policy = self.stages()[0].updates[-2:]
        return Stage("online", self.config.batch_size, (dataclasses.replace(critic, start=0), policy))  # [O1]

    # ---- critic ----------------------------------------------------------------------------------------------------
    def critic_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        return self.critic.loss(batch, self.config.expectile, self.config.gamma)  # [D1]

    def return_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The same with Q regressed on the returns of the data [F2]."""
        return self.critic.loss(batch, self.config.expectile, self.config.gamma, batch.extras["returns"])

    def follow_critic(self) -> None:
        self.critic.update_target(self.config.tau)

    # ---- policy ----------------------------------------------------------------------------------------------------
    def draw_policy(self, n: int, generator: torch.Generator) -> Noise:
        if self.config.dropout == 0:
            return {}
        return {"masks": dropout_masks((n, sum(self.policy.hidden)), self.config.dropout, generator)}  # [D3]

    def policy_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Eq. (7): cloning, where each action is weighted by its advantage."""
        with torch.no_grad():
            q = self.critic.q_target(torch.cat([batch.act, batch.obs], -1)).amin(0)  # (B,)
            advantage = q - self.critic.v(batch.obs).squeeze(-1)
            weight = torch.exp(self.config.beta * advantage).clamp(max=MAX_WEIGHT)
        masks = noise.get("masks")
        if isinstance(self.policy, GaussianPolicy):
            misfit = -self.policy.log_prob(batch.obs, batch.act, masks)
        else:
            misfit = (self.policy(batch.obs, masks) - batch.act).square().sum(-1)  # [D2]
        loss = (weight * misfit).mean()
        return loss, {"policy_loss": loss.detach(), "advantage": advantage.mean(), "weight": weight.mean()}

    # ---- acting ----------------------------------------------------------------------------------------------------
    def point_policy(self, deterministic: bool) -> TanhPolicy | None:
        return self.policy if deterministic or not isinstance(self.policy, GaussianPolicy) else None

    def draw_act(self, n: int, deterministic: bool, config: IQLConfig, generator: torch.Generator) -> Noise:
        if deterministic or not isinstance(self.policy, GaussianPolicy):
            return {}
        kwargs: dict[str, Any] = {"generator": generator, "device": self.device}
        return {"eps": torch.randn(n, self.act_dim, **kwargs)}

    def act(self, obs: Tensor, noise: Noise, config: IQLConfig) -> Tensor:
        """(B, S) -> (B, A): a sample of the Gaussian, clipped to [-1, 1]; if deterministic, its mean (the paper's evaluation).

        With `deterministic_policy` it is the mean in both cases.
        """
        if "eps" in noise:
            assert isinstance(self.policy, GaussianPolicy)
            return self.policy.sample(obs, noise["eps"])
        mean: Tensor = self.policy(obs)
        return mean
