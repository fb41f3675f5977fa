"""SRPO: Score Regularized Policy Optimization through Diffusion Behavior.   Chen et al., ICLR 2024, arXiv:2310.07297.

Order      behavior and critic (IQL) are trained alone and frozen; then the policy is extracted from the two.
Objective  max_pi  E_s[ Q(s, pi(s)) ] - 1/beta KL(pi || mu), with the KL averaged over diffusion times
Gradient   E[ ( dQ/da - w(t)/beta (eps_mu(a_t | s, t) - eps) ) dpi/dtheta ],   a_t = alpha_t pi(s) + sigma_t eps      Eq. (10)
Symbols    mu -> behavior, Q -> critic (mean of the twin target networks), pi -> policy (deterministic)
Details
  [D1] Everything is multiplied by beta, as in the official code: the loss is w (eps_mu - eps) . a - beta dQ/da . a.
  [D2] `subtract_noise`: the "- eps" is a zero-mean control variate. Paper: on. Official code: its default weighting string
       leaves it OFF. Same mean gradient, less variance when on; ours is on.
  [D3] `weight`: w(t) = sigma_t^2 ("sigma2", `VDS` in the official code), 1 ("constant", `stable`) or alpha_t / sigma_t
       ("alpha_over_sigma", `score`: a uniform average of the KLs, dominated by small t).
  [D4] `q_grad_norm`: AntMaze divides dQ/da by its size per sample. Paper: by the L2 norm ("l2"). Official code: by the root
       mean square over dimensions ("rms"), so its beta acts sqrt(A) times stronger; the published AntMaze betas are for "rms".
  [D5] t ~ U(0.02, 0.98) in the policy stage, U(0.001, 1) in the behaviour stage (official code).
  [D6] The policy's learning rate falls to 0 on a cosine over its stage (official code; not in the paper's text).
  [D7] Q in the gradient is the mean of the twin TARGET critics (official code; the paper writes Q).
  [D8] The official loader iterates over shuffled epochs; we sample uniformly with replacement, as everywhere in this library.
  [D9] The batch of the behaviour stage is 2048 in the official code and in `preset="paper"`. Ours is 256: on a CPU one update
       with 2048 costs as much as several with 256, and the smaller batch learns more in the same time.
Online (our design; neither the paper nor the official code has one)
  [O1] Each update trains all three on one batch of old and new data: the critic by IQL, the behaviour model by noise matching,
       the policy by Eq. (10) on both. So mu becomes a model of the data AND of the policy's actions, and regularising towards
       it is a trust region that moves with the policy; a frozen mu would limit the improvement. The behaviour model is
       updated only every `online_behavior_every` updates: its updates cost most, and what it models changes slowly.
  [O2] It acts with pi plus Gaussian noise of `online_noise`, clipped. Sampling mu(.|s) around pi(s) instead would explore the
       more widely the worse mu fits.
  [O3] The constraint is relaxed: beta doubles every `online_halflife` environment steps, up to 16-fold.
  [O4] Learning rates are constant, the policy's is `online_learning_rate`; [D6] no longer applies. Returning to the initial
       rate after a cosine that had ended at 0 destroys a converged policy (seen with IQL).
Fast recipe (`preset="fast"`, one setting for all datasets; our design, off in a plain `SRPOConfig`)
  [F1] `return_temperature`: behaviour model and policy learn from episodes drawn by their return, critics from half of these
       and half of all (Hong et al. 2023, arXiv:2306.13085). A clone of mixed data lands in the worse half of it.
  [F2] `precondition`: eps_mu is a correction to the noise of a Gaussian around a clone (networks/preconditioned.py). Without
       it, a short training leaves the mean of mu blurred, and with it the score.
  [F3] `returns_share`: the critic stage begins by regressing Q on the returns of the data; TD carries values over a hundred
       steps too slowly for a short stage.
  [F4] `bootstrap="policy"`: then Q is that of the clone, from which the policy starts and near which it stays; the behaviour
       stage comes first. With expectiles, Q is the value of another policy, not of the one that follows its gradient.
  [F5] `q_grad_norm="spread"`: dQ/da in units of sqrt(v), the spread of the data's actions around the clone, bounded in every
       state (`functional.spread_gradient`). So beta becomes a distance from mu: with w = sigma2 and a
       Gaussian mu, the policy ends at most beta / k standard deviations of the data's actions from the clone, where k, the mean
       over t of sigma^3 alpha / (alpha^2 v + sigma^2), is 0.23 for v = 0.001 and 0.18 for v = 0.25.
  [F6] `cosine`: the learning rate of the behaviour stage falls to 0, too. At a constant rate the last clone is one of many,
       some of which fall.
Critic stage: Q regresses on r + gamma (1 - d) V(s'), V on an expectile of Qbar(s, a): networks/critics.py, Eq. (5), (6). The
official code also trains an IQL policy, for monitoring only; we do not.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from diffagents.agent import Agent
from diffagents.config.checks import MOST, net_arch
from diffagents.config.hyperparameters import Hyperparameters, hyperparameter
from diffagents.config.recipe import PRECONDITION, Q_LAYER_NORM, RETURN_TEMPERATURE, RETURNS_SHARE
from diffagents.data.normalize import REWARD_TRANSFORMS
from diffagents.data.sampler import Sampler
from diffagents.diffusion.sde import dpm_solve, dpm_solver_steps, vp_alpha_sigma
from diffagents.functional import action_gradient, eps_loss, perturb, polyak_update_, spread_gradient
from diffagents.networks.critics import IQLCritic
from diffagents.networks.mlp import Mish, ResidualBlock, TanhPolicy, dropout_masks, fixed_noise, mish
from diffagents.networks.preconditioned import PreconditionedDenoiser, add_clone_loss, clone_variance, without_clone
from diffagents.storage import checkpoint
from diffagents.training.plan import Plan, opening_steps
from diffagents.training.updates import Noise, Optimizer, Stage, Update
from diffagents.types import Batch, Metrics

WEIGHTS = ("sigma2", "constant", "alpha_over_sigma")
BOOTSTRAPS = ("expectile", "policy")
Q_GRAD_NORMS = ("l2", "rms", "spread")


@dataclass(frozen=True)
class SRPOConfig(Hyperparameters):
    """Hyperparameters of SRPO.

    The defaults are the paper's for locomotion except for [D9]; values for each task are rows of zoo/srpo.yml.
    """

    beta: float = hyperparameter(
        0.05,
        "Weight of Q against the behaviour model: large is greedy, small stays close to the data. "
        "The main hyperparameter: sweep 0.01, 0.02, 0.05, 0.1, 0.2, 0.5.",
        above=0,
    )
    expectile: float = hyperparameter(
        0.7,
        "Expectile of Q that V is fitted to: near 1, V approaches the best actions of the data. AntMaze: 0.9.",
        above=0,
        below=1,
    )
    gamma: float = hyperparameter(0.99, "Discount factor of future rewards.", at_least=0, below=1)
    tau: float = hyperparameter(
        0.005, "Soft update (Polyak) coefficient of the target network of Q, at every critic update.", above=0, at_most=1
    )
    learning_rate: float = hyperparameter(3e-4, "Learning rate in all three stages.", above=0)
    batch_size: int = hyperparameter(
        256, "Number of transitions in a batch of the critic and policy stages.", at_least=1, at_most=MOST
    )
    behavior_batch_size: int = hyperparameter(
        256, "Number of transitions in a batch of the behaviour stage [D9].", at_least=1, at_most=MOST
    )
    dropout: float = hyperparameter(
        0.1, "Dropout rate in the residual blocks of the behaviour model during training.", at_least=0, below=1
    )
    weight: str = hyperparameter(
        "sigma2", "Weight w(t) of the diffusion time t in the policy's gradient [D3].", choices=WEIGHTS
    )
    subtract_noise: bool = hyperparameter(
        True, "Whether the noise is subtracted from its prediction, which lowers the variance of the policy's gradient [D2]."
    )
    q_grad_norm: str | None = hyperparameter(
        None,
        "Norm by which each sample's dQ/da is divided [D4]; 'spread': that of the data's actions [F5]. None: as it is.",
        choices=Q_GRAD_NORMS,
    )
    bootstrap: str = hyperparameter(
        "expectile",
        'Value of the next state in the target of Q: "expectile" V(s\'), as in IQL; "policy" Q at the action of the policy, '
        "which is then the clone of the behaviour stage, trained before the critic [F4].",
        choices=BOOTSTRAPS,
    )
    cosine: bool = hyperparameter(False, "Whether the learning rate of the behaviour stage falls to 0 on a cosine [F6].")
    precondition: bool = hyperparameter(False, PRECONDITION)
    return_temperature: float | None = hyperparameter(None, RETURN_TEMPERATURE, above=0)
    returns_share: float = hyperparameter(0.0, RETURNS_SHARE, at_least=0, at_most=1)
    q_layer_norm: bool = hyperparameter(False, Q_LAYER_NORM)
    reward_transform: str = hyperparameter(
        "auto",
        'Transform of the rewards, of which "auto" chooses one from the data. '
        'Locomotion: "iql_locomotion". AntMaze: "iql_antmaze".',
        choices=REWARD_TRANSFORMS,
    )
    normalize_obs: bool = hyperparameter(
        False,
        "Whether observations are normalised by the mean and standard deviation of the data. "
        "The paper does not; switch it on for observations in pixels or other large units.",
    )
    online_learning_rate: float = hyperparameter(1e-4, "Learning rate of the policy in `learn_online`, constant [O4].", above=0)
    online_noise: float = hyperparameter(
        0.2, "Standard deviation of the exploration noise in `learn_online`, for actions in [-1, 1] [O2].", at_least=0
    )
    online_halflife: int | None = hyperparameter(
        50_000,
        "Time in which beta doubles in `learn_online` [O3]. None: beta stays constant.",
        at_least=1,
        unit="environment steps",
    )
    online_behavior_every: int = hyperparameter(
        4, "Updates in `learn_online` for each update of the behaviour model [O1].", at_least=1, at_most=MOST
    )
    critic_steps: int | None = hyperparameter(
        None, "Gradient steps of the critic stage. None: the `default` block of zoo/srpo.yml. Paper: 1.5M.", at_least=0
    )
    behavior_steps: int | None = hyperparameter(
        None,
        "Gradient steps of the behaviour stage. None: the `default` block of zoo/srpo.yml. "
        "Paper: 2.0M (0.5M is nearly as good).",
        at_least=0,
    )
    policy_steps: int | None = hyperparameter(
        None, "Gradient steps of the policy stage. None: the `default` block of zoo/srpo.yml. Paper: 1.0M.", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bootstrap == "policy" and not self.precondition:
            raise ValueError("bootstrap='policy' needs precondition=True, because the policy must begin as the clone")
        if self.q_grad_norm == "spread" and not self.precondition:
            raise ValueError("q_grad_norm='spread' needs precondition=True, which measures the spread around a clone")


class ResidualScoreNet(nn.Module):
    """Noise predictor eps(a_t, s, t) of SRPO's behaviour model: `ScoreNet` in the official code, (B, A) -> (B, A).

    Time: 32 fixed random frequencies W ~ N(0, 30^2), features [sin, cos](2 pi W t), then Linear 64-128, Mish,
    Linear 128-128. Input [a_t, s, time]; Linear to `width`; residual blocks; Mish; Linear to A. The official code also
    allocates three 256x256 shortcut layers that no input reaches; they are omitted here.
    """

    frequencies: Tensor
    N_FREQUENCIES, FREQUENCY_SCALE, TIME_DIM = 32, 30.0, 128

    def __init__(self, obs_dim: int, act_dim: int, width: int = 256, n_blocks: int = 3) -> None:
        super().__init__()
        self.width, self.n_blocks = width, n_blocks
        self.register_buffer("frequencies", torch.randn(self.N_FREQUENCIES) * self.FREQUENCY_SCALE)
        self.time_mlp = nn.Sequential(
            nn.Linear(2 * self.N_FREQUENCIES, self.TIME_DIM), Mish(), nn.Linear(self.TIME_DIM, self.TIME_DIM)
        )
        self.input = nn.Linear(act_dim + obs_dim + self.TIME_DIM, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(n_blocks))
        self.output = nn.Linear(width, act_dim)

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor, masks: Tensor | None = None) -> Tensor:
        """`a_t` (B, A), `obs` (B, S), `t` (B,) in (0, 1]; `masks` (n_blocks, B, width) are dropout masks, None when acting."""
        # Phases reach 600 radians, where float32 rounds at 3e-5: the order of the products is the official one.
        phase = t[:, None] * self.frequencies * 2.0 * math.pi
        time = self.time_mlp(torch.cat([torch.sin(phase), torch.cos(phase)], -1))
        h = self.input(torch.cat([a_t, obs, time], -1))
        for i, block in enumerate(self.blocks):
            h = block(h, None if masks is None else masks[i])
        out: Tensor = self.output(mish(h))
        return out


class Behavior(nn.Module):
    """The diffusion model mu(a|s): the noise predictor, and the fixed x_1 from which its deterministic sample starts."""

    noise: Tensor

    def __init__(self, net: nn.Module, act_dim: int) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("noise", fixed_noise(1, act_dim))

    def sample(self, obs: Tensor, noise: Tensor, n_evals: int = 15) -> Tensor:
        """a ~ mu(.|s), (B, A) in [-1, 1], by DPM-Solver of order 2 from `noise` (B, A)."""
        return dpm_solve(lambda a, t: self.net(a, obs, t), noise, dpm_solver_steps(n_evals)).clamp(-1.0, 1.0)


class SRPO(Agent):
    """Score Regularized Policy Optimization: a fast deterministic policy, regularised by a diffusion model's score."""

    Config = SRPOConfig
    config: SRPOConfig
    policy: TanhPolicy
    STAGE_SHARES: ClassVar[dict[str, int]] = {"critic": 1_500_000, "behavior": 2_000_000, "policy": 1_000_000}  # paper's
    POLICY_STAGE = "policy"
    MODEL: ClassVar[tuple[str, ...]] = ("policy",)
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]] = ("critic", "behavior")
    HEALTHY: ClassVar[dict[str, str]] = {
        "policy_loss": "Its gradient moves the policy; its level says little. It falls at first and stays small.",
        "q_grad_norm": "The pull of Q: of a steady size. If it grows without end, Q diverges.",
        "score_pull": "The pull of the behaviour model: of a steady size, and larger where the policy leaves the data.",
    }

    def build(self) -> None:
        c, obs_dim, act_dim = self.config, self.obs_dim, self.act_dim
        arch = net_arch(
            self.policy_kwargs,
            {"pi": (256, 256), "qf": (256, 256), "vf": (256, 256)},
            extra={"behavior_width": 256, "behavior_blocks": 3},
        )
        self.critic = IQLCritic(obs_dim, act_dim, arch["qf"], arch["vf"], q_layer_norm=c.q_layer_norm).to(self.device)
        net: nn.Module = ResidualScoreNet(obs_dim, act_dim, arch["behavior_width"], arch["behavior_blocks"])
        if c.precondition:  # [F2]
            net = PreconditionedDenoiser(net, obs_dim, act_dim, clone_hidden=arch["pi"])
        self.behavior = Behavior(net, act_dim).to(self.device)
        self.policy = TanhPolicy(obs_dim, act_dim, arch["pi"]).to(self.device)
        trained = self.critic.q.parameters() if c.bootstrap == "policy" else self.critic.trained_parameters()  # [F4]
        self.optimizers = {
            "critic": Optimizer(trained, c.learning_rate),
            "behavior": Optimizer(self.behavior.net.parameters(), c.learning_rate, cosine=c.cosine, weight_decay=0.01),  # [F6]
            "policy": Optimizer(self.policy.parameters(), c.learning_rate, cosine=True),  # [D6]
        }

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        c, opt = self.config, self.optimizers
        on_returns = opening_steps(c.returns_share, plan or self.plan, "critic", self.stage_steps)  # [F3]
        critic = (
            Update(self.return_loss, optimizers=(opt["critic"],), after=self.follow_critic, stop=on_returns),
            Update(self.critic_loss, optimizers=(opt["critic"],), after=self.follow_critic, start=on_returns),
        )
        prepare = (lambda sampler, _: sampler.with_returns(c.gamma)) if on_returns else None
        follow = self.follow_clone if c.precondition and self.policy_is_untrained() else None
        behavior = Update(self.behavior_loss, self.draw_behavior, (opt["behavior"],), follow, by_return=True)
        policy = Update(self.policy_loss, self.draw_policy, (opt["policy"],), by_return=True)
        alone = plan is not None and "critic" in plan.lengths and "behavior" not in plan.lengths
        if c.bootstrap == "policy" and alone and self.stage_steps["behavior"] == 0:
            raise ValueError(
                "with bootstrap='policy' the critic builds on the clone, which the behaviour stage trains: add the stage "
                "'behavior', or run it first"
            )
        stages = [
            Stage("critic", c.batch_size, critic if on_returns else critic[1:], prepare),
            Stage("behavior", c.behavior_batch_size, (behavior,)),
            Stage("policy", c.batch_size, (policy,), self.prepare_policy if c.precondition else None),
        ]
        return stages if c.bootstrap == "expectile" else [stages[1], stages[0], stages[2]]  # [F4]

    def online_stage(self) -> Stage:
        updates = {stage.name: stage.updates[-1] for stage in self.stages()}
        critic, behavior, policy = (updates[name] for name in self.STAGE_SHARES)
        critic = dataclasses.replace(critic, start=0)
        behavior = dataclasses.replace(behavior, every=self.config.online_behavior_every, after=None)
        return Stage("online", self.config.batch_size, (critic, behavior, policy))  # [O1]

    # ---- stage 1: critic -------------------------------------------------------------------------------------------
    def critic_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """IQL's losses: Q is regressed on r + gamma (1 - d) V(s'), Eq. (6) of networks/critics.py; or on Q(s', pi(s')) [F4]."""
        c = self.config
        if c.bootstrap == "policy":  # without V
            with torch.no_grad():
                next_act = self.policy(batch.next_obs)
            return self.critic.q_loss(batch, self.critic.policy_target(batch, next_act, c.gamma))
        return self.critic.loss(batch, c.expectile, c.gamma)

    def return_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The same with Q regressed on the returns of the data [F3]."""
        c, returns = self.config, batch.extras["returns"]
        return (
            self.critic.q_loss(batch, returns)
            if c.bootstrap == "policy"
            else self.critic.loss(batch, c.expectile, c.gamma, returns)
        )

    def follow_critic(self) -> None:
        self.critic.update_target(self.config.tau)

    # ---- stage 2: behaviour ----------------------------------------------------------------------------------------
    def draw_behavior(self, n: int, generator: torch.Generator) -> Noise:
        noise = self.draw_policy(n, generator)
        if self.config.dropout > 0:
            net = without_clone(self.behavior.net)
            assert isinstance(net, ResidualScoreNet)
            noise["masks"] = dropout_masks((net.n_blocks, n, net.width), self.config.dropout, generator)
        return noise

    def behavior_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """E || eps_mu(a_t | s, t) - eps ||^2, t ~ U(0.001, 1) [D5]: noise matching, whose minimiser gives the score."""
        t = 1e-3 + (1.0 - 1e-3) * noise["u"]  # (B,)
        alpha, sigma = vp_alpha_sigma(t)
        a_t = perturb(batch.act, noise["eps"], alpha, sigma)
        loss = eps_loss(self.behavior.net(a_t, batch.obs, t, noise.get("masks")), noise["eps"])
        return add_clone_loss(self.behavior.net, batch, loss, {"behavior_loss": loss.detach()})  # [F2]

    def follow_clone(self) -> None:
        """Until it is trained, the policy is the clone: it starts at what the data do, and Q is that of the clone [F4]."""
        assert isinstance(self.behavior.net, PreconditionedDenoiser)
        polyak_update_(self.policy.parameters(), self.behavior.net.clone.parameters(), 1.0)

    def policy_is_untrained(self) -> bool:
        """Whether the policy has taken no step, or none since `clone(fresh=("policy",))`."""
        return not self.optimizers["policy"].state

    def prepare_policy(self, sampler: Sampler, generator: torch.Generator) -> Sampler:
        """The same at the start of the policy stage, where the policy may be newly built."""
        if self.policy_is_untrained():
            self.follow_clone()
        return sampler

    # ---- stage 3: policy -------------------------------------------------------------------------------------------
    def draw_policy(self, n: int, generator: torch.Generator) -> Noise:
        kwargs: dict[str, Any] = {"generator": generator, "device": self.device}
        return {"u": torch.rand(n, **kwargs), "eps": torch.randn(n, self.act_dim, **kwargs)}

    def policy_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """A surrogate loss whose gradient is minus beta times Eq. (10) [D1]."""
        c, obs, eps = self.config, batch.obs, noise["eps"]
        a = self.policy(obs)  # (B, A)
        with torch.no_grad():
            t = 0.02 + 0.96 * noise["u"]  # (B,) [D5]
            alpha, sigma = vp_alpha_sigma(t)
            eps_mu = self.behavior.net(perturb(a, eps, alpha, sigma), obs, t)  # no dropout here
            if c.weight == "sigma2":  # [D3]
                w = sigma.square()
            elif c.weight == "alpha_over_sigma":
                w = alpha / sigma
            else:
                w = torch.ones_like(sigma)
            pull = w[:, None] * (eps_mu - eps if c.subtract_noise else eps_mu)  # [D2]
        dq_da = action_gradient(lambda x: self.critic.target_mean(obs, x), a)  # (B, A) [D7]
        norm = dq_da.norm(dim=-1, keepdim=True)
        if c.q_grad_norm == "l2":  # [D4]
            dq_da = dq_da / (norm + 1e-8)
        elif c.q_grad_norm == "rms":
            dq_da = dq_da / (norm / self.act_dim**0.5 + 1e-8)
        elif c.q_grad_norm == "spread":  # [F5]
            dq_da = spread_gradient(dq_da, clone_variance(self.behavior.net))
        loss = ((pull - c.beta * self.state.constraint_relaxation * dq_da) * a).sum(-1).mean()
        metrics = {"policy_loss": loss.detach(), "q_grad_norm": norm.mean(), "score_pull": pull.norm(dim=-1).mean()}
        return loss, metrics

    # ---- acting ----------------------------------------------------------------------------------------------------
    def point_policy(self, deterministic: bool) -> TanhPolicy | None:
        return self.policy

    def act(self, obs: Tensor, noise: Noise, config: SRPOConfig) -> Tensor:
        """(B, S) -> (B, A): the policy is deterministic, whatever `deterministic` is."""
        action: Tensor = self.policy(obs)
        return action

    def behavior_policy(self, n_evals: int = 15) -> "BehaviorPolicy":
        """The behaviour model as a policy with `predict`: this agent's own baseline of behaviour cloning.

        Args:
            n_evals: Network evaluations for each sampled action.
        """
        return BehaviorPolicy(self, n_evals)

    @classmethod
    def from_official(cls, behavior: Any, critic: Any, policy: Any = None, **kwargs: Any) -> "SRPO":
        """Load the authors' checkpoint files.

        Args:
            behavior: Path or state dict of the behaviour model, `diffusion_behavior.*`.
            critic: Path or state dict of the critic, `q0.*, q0_target.*, vf.v.*`.
            policy: Path or state dict of the policy. The official code never saves it: without one, `predict` raises until
                `learn(data, stages=("policy",))` has extracted it.
            **kwargs: Arguments of the constructor, whose `preset` is None by default here.

        Raises:
            FileNotFoundError: If a file does not exist.
            ValueError: If a file does not contain the expected network.
        """
        from diffagents.storage.official_checkpoints import srpo_from_official

        return srpo_from_official(cls, behavior, critic, policy, **kwargs)


class BehaviorPolicy:
    """`predict` of the behaviour model: one sample for each observation; with deterministic=True, all from one fixed noise."""

    def __init__(self, agent: SRPO, n_evals: int) -> None:
        self._agent, self._n_evals = agent, n_evals
        self.observation_space, self.action_space = agent.observation_space, agent.action_space

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """As `Agent.predict`; random noise comes from the agent's generator for predictions."""
        checkpoint.fetch_training_networks(self._agent)
        agent, fixed = self._agent, self._agent.behavior.noise

        def act(obs: Tensor) -> Tensor:
            if deterministic:
                return agent.behavior.sample(obs, fixed.expand(len(obs), -1), self._n_evals)
            noise = torch.randn(len(obs), fixed.shape[1], generator=agent.predict_generator, device=agent.device)
            return agent.behavior.sample(obs, noise, self._n_evals)

        return agent.predict_with(act, observation), state
