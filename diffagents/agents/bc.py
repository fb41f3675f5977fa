"""BC: deterministic behaviour cloning.   Pomerleau, NIPS 1988; the baseline of offline RL since D4RL, arXiv:2004.07219.

Every step   L = E || pi(s) - a ||^2   over the transitions of the data
Symbols      pi -> policy, tanh of an MLP of the normalised observation
Acting       pi(s). There is no critic, and rewards are never read.
Details
  [D1] L is the mean over batch and dimensions, so that its scale does not depend on the number of dimensions.
  [D2] Adam decays to 0 on a cosine over the stage. D4RL and TD3+BC keep the learning rate constant; the decay averages out the
       noise of the last steps, which single checkpoints of a cloner show.
  [D3] Observations are normalised, as in TD3+BC.
Online (our design, the same as DiffusionBC's: cloning alone does not improve the policy)
  [O1] It clones the data and the best of its own episodes: the share `online_top` of those that ended, by return,
       selected again every 1000 environment steps. Only here are rewards read. It learns at `online_learning_rate`.
  [O2] A deterministic policy repeats itself, so it explores with Gaussian noise of `online_noise`.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diffagents.agent import Agent
from diffagents.config.checks import MOST, net_arch
from diffagents.config.hyperparameters import Hyperparameters, hyperparameter
from diffagents.data.normalize import REWARD_TRANSFORMS
from diffagents.data.replay_buffer import Mixture
from diffagents.networks.mlp import TanhPolicy
from diffagents.training.plan import Plan
from diffagents.training.updates import Noise, Optimizer, Stage, Update
from diffagents.types import Batch, Metrics


@dataclass(frozen=True)
class BCConfig(Hyperparameters):
    """Hyperparameters of BC."""

    learning_rate: float = hyperparameter(1e-3, "Initial learning rate, which falls to 0 on a cosine [D2].", above=0)
    batch_size: int = hyperparameter(256, "Number of transitions in a batch.", at_least=1, at_most=MOST)
    online_learning_rate: float = hyperparameter(3e-5, "Learning rate of the policy in `learn_online`, constant [O1].", above=0)
    online_top: float = hyperparameter(
        0.25, "Share of its own episodes that it clones in `learn_online`, the best by return [O1].", above=0, at_most=1
    )
    online_noise: float = hyperparameter(
        0.1, "Standard deviation of the exploration noise in `learn_online`, for actions in [-1, 1] [O2].", at_least=0
    )
    reward_transform: str = hyperparameter(
        "none",
        'Transform of the rewards, of which "auto" chooses one from the data. '
        "It has no effect here, because cloning does not use rewards.",
        choices=REWARD_TRANSFORMS,
    )
    normalize_obs: bool = hyperparameter(
        True, "Whether observations are normalised by the mean and standard deviation of the data [D3]."
    )
    behavior_steps: int | None = hyperparameter(
        None, "Gradient steps of the behaviour stage. None: the `default` block of zoo/bc.yml. Papers: 1M.", at_least=0
    )


class BC(Agent):
    """Behaviour cloning: a deterministic policy that imitates the data's actions by least squares."""

    Config = BCConfig
    config: BCConfig
    policy: TanhPolicy
    STAGE_SHARES: ClassVar[dict[str, int]] = {"behavior": 1_000_000}
    POLICY_STAGE = "behavior"
    MODEL: ClassVar[tuple[str, ...]] = ("policy",)
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]] = ()
    HEALTHY: ClassVar[dict[str, str]] = {
        "return": "It rises into the range of the data's returns. A clone seldom exceeds the best of them.",
        "bc_loss": "The error in the data's actions falls fast and then hardly changes. It does not reach 0 if the data vary.",
    }

    def build(self) -> None:
        arch = net_arch(self.policy_kwargs, {"pi": (256, 256)})
        self.policy = TanhPolicy(self.obs_dim, self.act_dim, arch["pi"]).to(self.device)
        self.optimizers = {"policy": Optimizer(self.policy.parameters(), self.config.learning_rate, cosine=True)}  # [D2]

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        update = Update(self.bc_loss, optimizers=(self.optimizers["policy"],))
        return [Stage("behavior", self.config.batch_size, (update,))]

    def online_stage(self) -> Stage:
        return dataclasses.replace(self.stages()[0], name="online", prepare=self.prepare_online)

    def prepare_online(self, mixture: Mixture, generator: torch.Generator) -> Mixture | None:
        """The data and the best of the finished episodes [O1]; None as long as there is neither."""
        return mixture.with_best_episodes(self.config.online_top)

    def bc_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """L: the squared error of the policy's actions [D1]."""
        loss = F.mse_loss(self.policy(batch.obs), batch.act)
        return loss, {"bc_loss": loss.detach()}

    def point_policy(self, deterministic: bool) -> TanhPolicy | None:
        return self.policy

    def act(self, obs: Tensor, noise: Noise, config: BCConfig) -> Tensor:
        """(B, S) -> (B, A): the policy is deterministic, so `deterministic` makes no difference."""
        action: Tensor = self.policy(obs)
        return action
