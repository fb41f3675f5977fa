"""TD3+BC: A Minimalist Approach to Offline Reinforcement Learning.   Fujimoto, Gu, NeurIPS 2021, arXiv:2106.06860.

Every step  critic; every `policy_freq`-th: policy, then both target networks, on the same batch
Critic      y = r + gamma (1 - d) min_j Qbar_j(s', a'),  a' = clip(pibar(s') + clip(N(0, policy_noise), +-noise_clip), +-1)
            loss = MSE_1 + MSE_2
Policy      L = - lambda Q_1(s, pi(s)) + (pi(s) - a)^2,   lambda = alpha / E|Q_1(s, pi(s))|                       Eqs. (3), (5)
Symbols     pibar -> policy_target, Qbar -> critic_target
Details
  [D1] lambda is measured on the policy's own actions in the batch, and detached (official code; the paper's Eq. (5) has the
       data's actions).
  [D2] The squared error is a mean over dimensions too (official code): the more dimensions, the weaker the constraint on each.
  [D3] The target networks are updated on policy steps only, and these are the 2nd, 4th, ... step (official code).
  [D4] `normalize_obs`: (s - mean) / (std + 1e-3) over the data, with the same numbers when acting. On AntMaze the author
       advises against it, and recommends a larger alpha.
  [D5] Q starts near 0, so lambda starts large; a policy that it drives into the flat ends of tanh stays there for long. A
       learning rate above the paper's makes this likely on small problems.
Online (the usual recipe; the authors publish none)
  [O1] TD3 continues on old and new data, and the cloning term fades: it is halved every `online_halflife` environment steps,
       down to a 16th. It acts with Gaussian noise of `online_noise` (TD3's 0.1). The policy learns at `online_learning_rate`.
Fast recipe (`preset="fast"`, one setting for all datasets; our design, off in a plain config)
  [F1] `return_temperature`: the policy learns from episodes drawn by their return, the critic from half of these and half of
       all (Hong et al. 2023, arXiv:2306.13085).
  [F2] `returns_share`: the stage begins with Q regressing on the returns of the data.
  [F3] `q_norm="spread"`: the gradient of Q in units of the spread of the data's actions around the policy, instead of lambda.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diffagents.agent import Agent
from diffagents.config.checks import MOST, net_arch
from diffagents.config.hyperparameters import Hyperparameters, hyperparameter
from diffagents.config.recipe import COSINE, Q_LAYER_NORM, Q_NORM, Q_NORMS, RETURN_TEMPERATURE, RETURNS_SHARE
from diffagents.data.normalize import REWARD_TRANSFORMS
from diffagents.functional import gradient_ascent_loss, polyak_update_, return_loss, td_target
from diffagents.networks.mlp import EnsembleMLP, TanhPolicy
from diffagents.training.plan import Plan, opening_steps
from diffagents.training.updates import Noise, Optimizer, Stage, Update
from diffagents.types import Batch, Metrics


@dataclass(frozen=True)
class TD3BCConfig(Hyperparameters):
    """Hyperparameters of TD3+BC. The defaults are the paper's, the same for all of its tasks."""

    alpha: float = hyperparameter(
        2.5, "Weight of Q against cloning: 0 clones the data, large is greedy. The main hyperparameter.", at_least=0
    )
    policy_noise: float = hyperparameter(
        0.2, "Standard deviation of the noise on the target policy's actions, which lie in [-1, 1].", at_least=0
    )
    noise_clip: float = hyperparameter(0.5, "Bound at which that noise is clipped.", at_least=0)
    policy_freq: int = hyperparameter(2, "Critic updates for each policy update.", at_least=1, at_most=MOST)
    gamma: float = hyperparameter(0.99, "Discount factor of future rewards.", at_least=0, below=1)
    tau: float = hyperparameter(
        0.005,
        "Soft update (Polyak) coefficient of the target networks of Q and the policy, at every policy update [D3].",
        above=0,
        at_most=1,
    )
    learning_rate: float = hyperparameter(3e-4, "Learning rate of the policy and of Q.", above=0)
    batch_size: int = hyperparameter(256, "Number of transitions in a batch.", at_least=1, at_most=MOST)
    online_learning_rate: float = hyperparameter(3e-5, "Learning rate of the policy in `learn_online`, constant [O1].", above=0)
    online_noise: float = hyperparameter(
        0.1, "Standard deviation of the exploration noise in `learn_online`, for actions in [-1, 1] [O1].", at_least=0
    )
    online_halflife: int | None = hyperparameter(
        20_000,
        "Time in which the weight of the cloning term halves in `learn_online` [O1]. None: it stays constant.",
        at_least=1,
        unit="environment steps",
    )
    reward_transform: str = hyperparameter(
        "none",
        'Transform of the rewards, of which "auto" chooses one from the data. A port (CORL) takes "iql_antmaze" on AntMaze.',
        choices=REWARD_TRANSFORMS,
    )
    normalize_obs: bool = hyperparameter(
        True, "Whether observations are normalised by the mean and standard deviation of the data [D4]."
    )
    q_norm: str = hyperparameter("value", Q_NORM, choices=Q_NORMS)
    cosine: bool = hyperparameter(False, COSINE)
    return_temperature: float | None = hyperparameter(None, RETURN_TEMPERATURE, above=0)
    returns_share: float = hyperparameter(0.0, RETURNS_SHARE, at_least=0, at_most=1)
    q_layer_norm: bool = hyperparameter(False, Q_LAYER_NORM)
    train_steps: int | None = hyperparameter(
        None, "Gradient steps of the training stage. None: the `default` block of zoo/td3_bc.yml. Paper: 1M.", at_least=0
    )


class TD3BC(Agent):
    """TD3 with a cloning term: a deterministic policy that climbs Q near the data."""

    Config = TD3BCConfig
    config: TD3BCConfig
    policy: TanhPolicy
    STAGE_SHARES: ClassVar[dict[str, int]] = {"train": 1_000_000}
    POLICY_STAGE = "train"
    CALIBRATES = True
    MODEL: ClassVar[tuple[str, ...]] = ("policy",)
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]] = ("policy_target", "critic", "critic_target")

    def build(self) -> None:
        c, obs_dim, act_dim = self.config, self.obs_dim, self.act_dim
        arch = net_arch(self.policy_kwargs, {"pi": (256, 256), "qf": (256, 256)})
        self.policy = TanhPolicy(obs_dim, act_dim, arch["pi"]).to(self.device)
        self.policy_target = copy.deepcopy(self.policy).requires_grad_(False)
        self.critic = EnsembleMLP(2, obs_dim + act_dim, arch["qf"], layer_norm=c.q_layer_norm).to(self.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.optimizers = {
            "policy": Optimizer(self.policy.parameters(), c.learning_rate, cosine=c.cosine),
            "critic": Optimizer(self.critic.parameters(), c.learning_rate, cosine=c.cosine),
        }

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        c, opt = self.config, self.optimizers
        first = opening_steps(c.returns_share, plan or self.plan, "train", self.stage_steps)
        opening = (  # [F2]
            Update(self.return_loss, optimizers=(opt["critic"],), stop=first),
            Update(self.clone_loss, optimizers=(opt["policy"],), after=self.follow_both, stop=first, by_return=True),
        )
        updates = (
            Update(self.critic_loss, self.draw_critic, (opt["critic"],), start=first),
            Update(
                self.policy_loss,
                optimizers=(opt["policy"],),
                after=self.follow_both,
                every=c.policy_freq,
                start=first + c.policy_freq - 1,  # [D3]
                by_return=True,
            ),
        )
        if first == 0:
            return [Stage("train", c.batch_size, updates)]
        return [Stage("train", c.batch_size, opening + updates, lambda sampler, _: sampler.with_returns(c.gamma))]

    def online_stage(self) -> Stage:
        critic, policy = self.stages()[0].updates[-2:]
        policy = dataclasses.replace(policy, start=self.config.policy_freq - 1)
        return Stage("online", self.config.batch_size, (dataclasses.replace(critic, start=0), policy))  # [O1]

    # ---- critic ----------------------------------------------------------------------------------------------------
    def draw_critic(self, n: int, generator: torch.Generator) -> Noise:
        return {"eps": torch.randn(n, self.act_dim, generator=generator, device=self.device)}

    def critic_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """MSE_1 + MSE_2 against the minimum of the target critics at the target policy's smoothed action."""
        c = self.config
        with torch.no_grad():
            smoothing = (c.policy_noise * noise["eps"]).clamp(-c.noise_clip, c.noise_clip)
            next_act = (self.policy_target(batch.next_obs) + smoothing).clamp(-1.0, 1.0)
            next_q = self.critic_target(torch.cat([batch.next_obs, next_act], -1)).amin(0)  # (B,)
            target = td_target(batch.rew, batch.done, next_q, c.gamma, batch.extras.get("floor"))
        q = self.critic(torch.cat([batch.obs, batch.act], -1))  # (2, B)
        loss = (q - target).square().mean(-1).sum()
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean()}

    def return_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """MSE_1 + MSE_2 against the returns of the data [F2]."""
        return return_loss(self.critic, batch)

    # ---- policy and target networks --------------------------------------------------------------------------------
    def policy_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Eq. (3) with the weight of Eq. (5)."""
        c, act = self.config, self.policy(batch.obs)
        bc_loss = F.mse_loss(act, batch.act)  # [D2]
        metrics = {"bc_loss": bc_loss.detach()}
        if c.q_norm == "spread":  # [F3]
            var = (act - batch.act).square().mean(0).detach()
            q_loss = c.alpha * gradient_ascent_loss(lambda a: self.critic(torch.cat([batch.obs, a], -1)).mean(0), act, var)
        else:
            q = self.critic(torch.cat([batch.obs, act], -1))[0]  # (B,), the first of the twins; online, already updated
            metrics["lambda"] = c.alpha / q.abs().mean().detach()  # [D1]
            q_loss = -metrics["lambda"] * q.mean()
        loss = bc_loss / self.state.constraint_relaxation + q_loss
        return loss, {"policy_loss": loss.detach(), **metrics}

    def clone_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The cloning term alone [F2]."""
        loss = F.mse_loss(self.policy(batch.obs), batch.act)
        return loss, {"bc_loss": loss.detach()}

    def follow_both(self) -> None:
        for target, online in ((self.critic_target, self.critic), (self.policy_target, self.policy)):
            polyak_update_(target.parameters(), online.parameters(), self.config.tau)

    # ---- acting ----------------------------------------------------------------------------------------------------
    def point_policy(self, deterministic: bool) -> TanhPolicy | None:
        return self.policy

    def act(self, obs: Tensor, noise: Noise, config: TD3BCConfig) -> Tensor:
        """(B, S) -> (B, A): the policy is deterministic, whatever `deterministic` is."""
        action: Tensor = self.policy(obs)
        return action
