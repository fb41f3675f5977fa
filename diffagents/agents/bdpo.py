"""BDPO: Behavior-Regularized Diffusion Policy Optimization.   Gao et al., ICML 2025, arXiv:2502.04778.

Order      `behavior`: a diffusion model nu of the data; `train`: the policy pi starts as nu and is improved, step by step
Objective  max_pi E[ sum gamma^t (r - eta KL_path(pi || nu)) ],  KL_path = E_pi[ l_T + ... + l_1 ]: the KL of the two chains
Penalty    l_n = || mu_pi - mu_nu ||^2 / (2 beta_n) = w_n || eps_pi - eps_nu ||^2,   w_n = beta_n / (2 alpha_n (1 - abar_n))
Q          y = r + gamma (1 - d) ( agg_e mean_k Qbar_e(s', a_k) - eta mean_k sum_n l_n ),   a_1..a_K ~ pi_ema(s')
V_n        z = agg_e mean_k Vbar_n-1,e(s, a^n-1_k) - eta l_n,  V_0 = Q,  n uniform, a^n: the data's action with noise,
           a^n-1_k ~ pi_ema( . | a^n, s): K samples around one predicted mean
Policy     max agg_e mean_k Vbar_n-1,e(s, a^n-1_k) - eta l_n,  a^n-1_k ~ pi: the gradient passes ONE denoising step
Symbols    pi -> policy (targets and acting: policy_ema), nu -> behavior (reference: behavior_ema), Q -> critic, V -> value
Every step of `train`: critic and value; every `policy_freq`-th after the warm-up: policy, and the behaviour model once more.
The paper's text was not available: this follows its author's code (flow-rl), and the equations carry no numbers.
Details
  [D1] sigma_n^2 is beta_n, in the penalty and in the sampler; the true posterior's is 0 at n = 1, where l_1 would be infinite.
  [D2] The penalty compares noise predictions, while the sampler clips the action that they imply; and l_1 counts although the
       last step adds no noise.
  [D3] `aggregation` over the ensemble: "lcb" mean - rho std (population), "min", "mean", "convex" rho min + (1 - rho) max,
       "random_convex" a random weighting for each update (uniform numbers, normalised; how the code samples it is unknown).
  [D4] `max_q_backup` (AntMaze): the maximum over k instead of the mean, in the target of Q only; the penalty stays a mean.
  [D5] The cosine of the policy's learning rate counts policy steps against the length of the stage, as optax does: with
       policy_freq 5 it ends at 0.905 of the initial rate. Those of critic and value end at 0.
  [D6] `warmup_steps`: the paper's 50k of 2M; None is the same share, 2.5 %, of the stage's actual length.
  [D7] The policy's learning rate is 30 times smaller than the critics': it only refines the behaviour.
  [D8] Acting: 10 candidates of policy_ema, argmax of the ensemble's MEAN target Q, not of the bound.
Online (our design; neither the paper nor the official code has one)
  [O1] The updates of `train` on old and new data, without warm-up, at constant learning rates ([D5] no longer applies). nu is
       still fitted, now also to the policy's actions: a trust region that moves with it.
  [O2] The constraint is relaxed: eta halves every `online_halflife` environment steps, down to a 16th.
  [O3] It acts as offline [D8], by random candidates, plus Gaussian noise of `online_noise`.
Fast recipe (`preset="fast"`, one setting for all datasets; our design, off in a plain config)
  [F1] `return_temperature`: the policy learns from episodes drawn by their return, the critic from half of these and half of
       all (Hong et al. 2023, arXiv:2306.13085).
  [F2] `precondition`: the noise predictor is a correction to that of a Gaussian around a clone (networks/preconditioned.py).
  [F3] `returns_share`: `train` begins with Q regressing on the returns of the data; the policy waits.
  [F4] `deterministic_backup`: the path in the target of Q has no noise: the value of the action that acts (`select="first"`).
  [F5] With `precondition`, sigma_n^2 in the penalty is the reverse variance of the Gaussian around the clone in each dimension.
       beta_n is that of actions of unit variance, and would let narrow data be left by many of their standard deviations.
  [F6] `q_norm="spread"`: the policy ascends the gradient of V_n-1 in units of the standard deviations of [F5], bounded in every
       state (`functional.spread_gradient`), against eta l_n: 1 / eta bounds each step's distance from nu in these deviations.
       As eta is then no weight in units of reward, the targets of Q and V omit the penalty.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffagents.agent import Agent
from diffagents.config.checks import MOST, N_FIXED, net_arch
from diffagents.config.hyperparameters import Hyperparameters, hyperparameter
from diffagents.config.recipe import (
    COSINE,
    DETERMINISTIC,
    DETERMINISTIC_BACKUP,
    PRECONDITION,
    Q_LAYER_NORM,
    RETURN_TEMPERATURE,
    RETURNS_SHARE,
)
from diffagents.data.normalize import REWARD_TRANSFORMS
from diffagents.data.sampler import Sampler
from diffagents.diffusion.chain import SOLVERS, check_solver, reverse_mean, reverse_var
from diffagents.functional import SELECT, action_gradient, polyak_update_, select_action, spread_gradient, td_target
from diffagents.networks.diffusion_policy import ChainPolicy, DenoiserOnStates, bind_states
from diffagents.networks.mlp import MLP, EnsembleMLP, Mish, mish, orthogonal_, sinusoids
from diffagents.networks.preconditioned import PreconditionedDenoiser, add_clone_loss, clone_variance, without_clone
from diffagents.training.plan import Plan, opening_steps
from diffagents.training.updates import Noise, Optimizer, Stage, Update
from diffagents.types import Batch, Metrics

AGGREGATIONS = ("lcb", "min", "mean", "convex", "random_convex")


@dataclass(frozen=True)
class BDPOConfig(Hyperparameters):
    """Hyperparameters of BDPO.

    The defaults are the official code's for halfcheetah; values for each task are rows of zoo/bdpo.yml.
    """

    eta: float = hyperparameter(
        0.05,
        "Weight, in units of reward, of the KL from the behaviour model: large stays close to the data, small is greedy. "
        "The main hyperparameter. Hopper: 0.2; walker2d: 0.15.",
        above=0,
    )
    rho: float = hyperparameter(
        0.5, 'Standard deviations below the mean for "lcb", or the share of the minimum for "convex" [D3].', at_least=0
    )
    aggregation: str = hyperparameter("lcb", "How the values of an ensemble are combined [D3].", choices=AGGREGATIONS)
    n_critics: int = hyperparameter(
        10, "Number of members in the ensembles of Q and of V. Two are enough on a CPU.", at_least=1, at_most=MOST
    )
    n_samples: int = hyperparameter(
        10, "Number K of actions sampled for each state in the targets and in the policy's loss.", at_least=1, at_most=MOST
    )
    n_diffusion_steps: int = hyperparameter(5, "Number T of denoising steps of the diffusion models.", at_least=1, at_most=MOST)
    clip_x0: bool = hyperparameter(
        True, "Whether the sampler clips the action implied by the predicted noise to [-1, 1]. Off in the 2-D toys."
    )
    gamma: float = hyperparameter(0.99, "Discount factor of future rewards. AntMaze: 0.995.", at_least=0, below=1)
    tau: float = hyperparameter(
        0.005, "Soft update (Polyak) coefficient of the target networks of Q and V, at every critic update.", above=0, at_most=1
    )
    ema_tau: float = hyperparameter(
        0.005,
        "Soft update coefficient of the moving averages (EMA) of the policy and the behaviour model, at each of their updates.",
        above=0,
        at_most=1,
    )
    policy_freq: int = hyperparameter(5, "Critic updates for each policy update.", at_least=1, at_most=MOST)
    warmup_steps: int | None = hyperparameter(
        None, "Critic updates before the first policy update. None: 2.5 % of the stage [D6].", at_least=0
    )
    learning_rate: float = hyperparameter(1e-5, "Learning rate of the policy [D7].", above=0)
    critic_learning_rate: float = hyperparameter(3e-4, "Learning rate of Q and V.", above=0)
    behavior_learning_rate: float = hyperparameter(3e-4, "Learning rate of the behaviour model. AntMaze: 1e-4.", above=0)
    max_grad_norm: float | None = hyperparameter(
        1.0, "Largest norm of the gradient, for each network separately. None: gradients are not clipped.", above=0
    )
    batch_size: int = hyperparameter(256, "Number of transitions in a batch.", at_least=1, at_most=MOST)
    max_q_backup: bool = hyperparameter(
        False,
        "Whether the target of Q takes the maximum over the sampled next actions instead of their mean [D4]. AntMaze: True.",
    )
    q_layer_norm: bool = hyperparameter(False, Q_LAYER_NORM)
    n_candidates: int = hyperparameter(
        10,
        "Number of actions sampled when acting, of which Q selects one; deterministic acting uses stored noise [D8].",
        at_least=1,
        at_most=N_FIXED,
    )
    select: str = hyperparameter(
        "argmax",
        'How one candidate is selected when acting: "softmax" samples it by its Q, "argmax" takes the best, "first" ignores Q.',
        choices=SELECT,
    )
    temperature: float = hyperparameter(1.0, 'Temperature of select="softmax", in units of Q.', above=0)
    solver: str = hyperparameter(
        "ddpm",
        'Sampler used when acting: "ddpm" runs the chain itself, "ddim" is deterministic given its noise and may skip steps; '
        "solvers in continuous time (DPM-Solver, EDM) need noise levels that the network was not trained on.",
        choices=SOLVERS,
    )
    solver_steps: int | None = hyperparameter(
        None, "Network evaluations for each sampled action, at most n_diffusion_steps. None: all of them.", at_least=1
    )
    deterministic: bool = hyperparameter(False, DETERMINISTIC)
    online_learning_rate: float = hyperparameter(1e-5, "Learning rate of the policy in `learn_online`, constant [O1].", above=0)
    online_noise: float = hyperparameter(
        0.1, "Standard deviation of the exploration noise in `learn_online`, for actions in [-1, 1] [O3].", at_least=0
    )
    online_halflife: int | None = hyperparameter(
        20_000,
        "Time in which eta halves in `learn_online` [O2]. None: eta stays constant.",
        at_least=1,
        unit="environment steps",
    )
    reward_transform: str = hyperparameter(
        "auto",
        'Transform of the rewards, of which "auto" chooses one from the data. '
        'Locomotion: "iql_locomotion". AntMaze: "antmaze100". eta depends on its scale.',
        choices=REWARD_TRANSFORMS,
    )
    normalize_obs: bool = hyperparameter(
        False, "Whether observations are normalised by the mean and standard deviation of the data."
    )
    deterministic_backup: bool = hyperparameter(False, DETERMINISTIC_BACKUP)
    q_norm: str = hyperparameter(
        "none",
        'Unit of Q in the policy\'s loss: "none", that of rewards; "spread" steps along the gradient in units of the spread of '
        "the behaviour model's steps, with 1 / eta the largest step [F6].",
        choices=("none", "spread"),
    )
    cosine: bool = hyperparameter(False, COSINE)
    precondition: bool = hyperparameter(False, PRECONDITION)
    return_temperature: float | None = hyperparameter(None, RETURN_TEMPERATURE, above=0)
    returns_share: float = hyperparameter(0.0, RETURNS_SHARE, at_least=0, at_most=1)
    behavior_steps: int | None = hyperparameter(
        None, "Gradient steps of the behaviour stage. None: the `default` block of zoo/bdpo.yml. Paper: 2M.", at_least=0
    )
    train_steps: int | None = hyperparameter(
        None, "Gradient steps of the training stage. None: the `default` block of zoo/bdpo.yml. Paper: 2M.", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_solver(self.solver, self.solver_steps, self.n_diffusion_steps)
        if self.q_norm == "spread" and not self.precondition:
            raise ValueError("q_norm='spread' needs precondition=True, which measures the spread around a clone")
        if self.aggregation == "convex" and self.rho > 1:
            raise ValueError(f'rho={self.rho!r} must be at most 1, the share of the minimum, with aggregation="convex"')


class PositionalDenoiser(nn.Module):
    """Noise predictor eps(a_n, s, n) of BDPO: the backbone of its policy and behaviour in the official code.

    Time: 64 sinusoids [cos, sin] of n = i + 1, two Linear 64 with Mish after both. Input [a_n, time, s]; layers with Mish;
    Linear to A. Orthogonal initialisation.
    """

    TIME_DIM = 64

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(MLP(self.TIME_DIM, (self.TIME_DIM,), self.TIME_DIM, Mish), Mish())
        self.trunk = MLP(act_dim + self.TIME_DIM + obs_dim, hidden, act_dim, Mish)
        orthogonal_(self)

    def forward(self, a_n: Tensor, obs: Tensor, i: Tensor) -> Tensor:
        """`a_n` (..., A); `obs` (..., S) and the step `i` (...,), counted from 0, broadcast against it."""
        lead = a_n.shape[:-1]
        out: Tensor = self.trunk(torch.cat([a_n, self.time_features(i).expand(*lead, -1), obs.expand(*lead, -1)], -1))
        return out

    def time_features(self, i: Tensor) -> Tensor:
        """i (...,) -> (..., TIME_DIM)."""
        sin, cos = sinusoids(i + 1, self.TIME_DIM)
        time: Tensor = self.time_mlp(torch.cat([cos, sin], -1))
        return time

    def on_states(self, obs: Tensor, n_steps: int) -> DenoiserOnStates:
        return bind_states(self.trunk[0], self.trunk.rest, self.time_features, obs, n_steps)


class StepValue(nn.Module):
    """E values V_n(s, a_n) of BDPO for the steps n = 1..T of a chain, with LayerNorm: (B, S), (B, ..., A), (B,) -> (E, B, ...).

    Time, for each member: 64 sinusoids [cos, sin] of n, Linear 64-128, Mish, Linear 128-64, Mish. Input [s, a_n, time].
    """

    positions: Tensor

    def __init__(self, n_members: int, obs_dim: int, act_dim: int, n_steps: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.sizes = [obs_dim, act_dim, 64]
        sin, cos = sinusoids(torch.arange(1, n_steps + 1), 64)
        self.register_buffer("positions", torch.cat([cos, sin], -1), persistent=False)
        self.time_mlp = EnsembleMLP(n_members, 64, (128,), mish, out_dim=64)
        self.trunk = EnsembleMLP(n_members, sum(self.sizes), hidden, mish, layer_norm=True)
        orthogonal_(self)

    def forward(self, obs: Tensor, a_n: Tensor, i: Tensor) -> Tensor:
        """`i` = n - 1 counts from 0. The first layer is evaluated once for each of the T times and once for each state."""
        n_members, rows = self.trunk.n_members, a_n.flatten(0, -2)
        of_state, of_act, of_time = self.trunk.weights[0].split(self.sizes, 1)
        time = torch.baddbmm(self.trunk.biases[0], mish(self.time_mlp(self.positions)), of_time)  # (E, T, H)
        shared = torch.bmm(obs.expand(n_members, *obs.shape), of_state) + time[:, i]  # (E, B, H)
        h = torch.bmm(rows.expand(n_members, *rows.shape), of_act).view(n_members, len(obs), -1, shared.shape[-1])
        out: Tensor = self.trunk.rest((h + shared[:, :, None]).flatten(1, 2))
        return out.view(n_members, *a_n.shape[:-1])


class BDPO(Agent):
    """A diffusion policy regularised towards a diffusion model of the data along the whole denoising path."""

    Config = BDPOConfig
    config: BDPOConfig
    policy: ChainPolicy
    STAGE_SHARES: ClassVar[dict[str, int]] = {"behavior": 2_000_000, "train": 2_000_000}
    POLICY_STAGE = "train"
    MODEL: ClassVar[tuple[str, ...]] = ("policy_ema", "critic_target")
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]] = ("policy", "behavior", "behavior_ema", "critic", "value", "value_target")
    CALIBRATES = True
    CHOICE: ClassVar[tuple[str, ...]] = ("n_candidates", "select", "temperature", "solver", "solver_steps")
    HEALTHY: ClassVar[dict[str, str]] = {
        "step_kl": "The policy's divergence from the behaviour model begins near 0, rises, and settles.",
        "path_kl": "The same over a whole path of denoising: it begins near 0, rises, and settles.",
    }

    def build(self) -> None:
        c, obs_dim, act_dim = self.config, self.obs_dim, self.act_dim
        arch = net_arch(self.policy_kwargs, {"pi": (256,) * 4, "qf": (256,) * 3, "vf": (256,) * 3})
        net: nn.Module = PositionalDenoiser(obs_dim, act_dim, arch["pi"])
        if c.precondition:  # [F2]
            net = PreconditionedDenoiser(net, obs_dim, act_dim, c.n_diffusion_steps)
        behavior = ChainPolicy(net, act_dim, c.n_diffusion_steps, std="beta", clip_x0=c.clip_x0)  # [D1]
        self.behavior = behavior.to(self.device)
        self.behavior_ema = copy.deepcopy(self.behavior).requires_grad_(False)
        self.policy = copy.deepcopy(self.behavior)
        self.policy_ema = copy.deepcopy(self.behavior).requires_grad_(False)
        self.critic = EnsembleMLP(c.n_critics, obs_dim + act_dim, arch["qf"], mish, c.q_layer_norm)
        orthogonal_(self.critic)
        self.critic.to(self.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = StepValue(c.n_critics, obs_dim, act_dim, c.n_diffusion_steps, arch["vf"]).to(self.device)
        self.value_target = copy.deepcopy(self.value).requires_grad_(False)
        chain = self.policy.chain
        self.step_weights = chain.beta / (2.0 * chain.alpha * (1.0 - chain.alpha_bar))  # w_n, (T,)
        net = without_clone(self.policy.net)  # the policy keeps the clone of its start [F2]
        clip, rates = c.max_grad_norm, (c.learning_rate, c.critic_learning_rate, c.behavior_learning_rate)
        self.optimizers = {
            "policy": Optimizer(net.parameters(), rates[0], cosine=True, max_grad_norm=clip),  # [D5] [D7]
            "critic": Optimizer(self.critic.parameters(), rates[1], cosine=True, max_grad_norm=clip),
            "value": Optimizer(self.value.parameters(), rates[1], cosine=True, max_grad_norm=clip),
            "behavior": Optimizer(self.behavior.parameters(), rates[2], cosine=c.cosine, max_grad_norm=clip),
        }

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        c, opt = self.config, self.optimizers
        plan = plan or self.plan
        planned, done = (0, 0) if plan is None else (d.get("train", 0) for d in (plan.lengths, plan.done))
        begun = self.stage_steps["train"] > done  # in an earlier plan, whose warm-up was the only one
        warmup = 0 if begun else round(0.025 * planned) if c.warmup_steps is None else c.warmup_steps  # [D6]
        if 0 < planned <= warmup:
            raise ValueError(
                f"warmup_steps={warmup} leaves none of the {planned} train steps for the policy: use fewer, or None for 2.5 %"
            )
        first = opening_steps(c.returns_share, plan, "train", self.stage_steps)
        draw, follow = self.draw_behavior, self.follow_behavior
        behavior = Update(self.behavior_loss, draw, (opt["behavior"],), follow, by_return=True)
        alone = (behavior, Update(after=self.act_like_behavior)) if self.stage_steps["train"] == 0 else (behavior,)
        return [
            Stage("behavior", c.batch_size, alone),
            Stage("train", c.batch_size, self.train_parts(warmup, first), self.prepare_train),
        ]

    def online_stage(self) -> Stage:
        return Stage("online", self.config.batch_size, self.train_parts(warmup=0))  # [O1]

    def train_parts(self, warmup: int, first: int = 0) -> tuple[Update, ...]:
        """Updates of critics, policy and behaviour model; the last two start at the `warmup`-th critic step.

        In the first `first` steps Q regresses on returns [F3].
        """
        c, opt = self.config, self.optimizers
        late: dict[str, Any] = {"by_return": True, "every": c.policy_freq, "start": max(warmup, first)}
        critics = Update(self.critic_losses, self.draw_critics, (opt["critic"], opt["value"]), self.follow_critics, start=first)
        opening = dataclasses.replace(critics, loss=self.return_losses, start=0, stop=first)
        return (
            *((opening,) if first else ()),
            critics,
            Update(self.policy_loss, self.draw_policy, (opt["policy"],), self.follow_policy, **late),
            Update(self.behavior_loss, self.draw_behavior, (opt["behavior"],), self.follow_behavior, **late),
        )

    # ---- behaviour: alone, and then together with the policy -----------------------------------------------------------
    def draw_behavior(self, n: int, generator: torch.Generator) -> Noise:
        kwargs: dict[str, Any] = {"generator": generator, "device": self.device}
        return {
            "i": torch.randint(self.config.n_diffusion_steps, (n,), **kwargs),  # n - 1
            "eps": torch.randn(n, self.act_dim, **kwargs),
        }

    def behavior_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """E || eps_nu(a^n, s, n) - eps ||^2, mean over batch and dimensions."""
        a_n = self.behavior.perturbed(batch.act, noise["eps"], noise["i"])
        loss = F.mse_loss(self.behavior.net(a_n, batch.obs, noise["i"]), noise["eps"])
        metrics = {"behavior_loss": loss.detach()}
        return add_clone_loss(self.behavior.net, batch, loss, metrics) if self.config.precondition else (loss, metrics)  # [F2]

    def follow_behavior(self) -> None:
        polyak_update_(self.behavior_ema.parameters(), self.behavior.parameters(), self.config.ema_tau)

    def act_like_behavior(self) -> None:
        """Until it is trained, the policy is the EMA of the behaviour model: its initial weights, and able to act."""
        for policy in (self.policy, self.policy_ema):
            polyak_update_(policy.parameters(), self.behavior_ema.parameters(), 1.0)

    def prepare_train(self, sampler: Sampler, generator: torch.Generator) -> Sampler:
        """The same at the start of `train`, where the policy may be newly built; and the returns on which Q regresses [F3]."""
        if self.stage_steps["train"] == 0:
            for policy in (self.policy, self.policy_ema):
                policy.load_state_dict(self.behavior_ema.state_dict())
        first = opening_steps(self.config.returns_share, self.plan, "train", self.stage_steps)
        return sampler.with_returns(self.config.gamma) if first else sampler

    # ---- critic and value --------------------------------------------------------------------------------------------
    def draw_critics(self, n: int, generator: torch.Generator) -> Noise:
        noise = self.draw_policy(n, generator)
        if self.config.gamma > 0:
            noise["path"] = self.policy.noises((n, self.config.n_samples), generator)
        if self.config.deterministic_backup:  # one path without noise [F4]
            noise["path"] = torch.zeros(self.config.n_diffusion_steps + 1, n, 1, self.act_dim, device=self.device)
        return noise

    def critic_losses(self, batch: Batch, noise: Noise) -> tuple[tuple[Tensor, Tensor], Metrics]:
        """The losses of the critic and of the value."""
        with torch.no_grad():
            q_td_target, q_penalty = self.q_target(batch, noise)
        losses, metrics = self.losses_of(batch, noise, q_td_target)
        return losses, {**metrics, "path_kl": q_penalty.mean()}  # sum over the steps and dimensions

    def return_losses(self, batch: Batch, noise: Noise) -> tuple[tuple[Tensor, Tensor], Metrics]:
        """The same with Q regressed on the returns of the data [F3]."""
        return self.losses_of(batch, noise, batch.extras["returns"])

    def losses_of(self, batch: Batch, noise: Noise, q_td_target: Tensor) -> tuple[tuple[Tensor, Tensor], Metrics]:
        """Squared errors of Q to its target (B,), and of V_n to z; both targets precede the step of either network."""
        with torch.no_grad():
            mean, penalty = self.step(batch, noise, self.policy_ema)
            v_target = self.value_before(batch.obs, mean, noise) - self.kl_weight_in_values * penalty
        a_n = self.policy.perturbed(batch.act, noise["eps"], noise["i"])
        q = self.critic(torch.cat([batch.obs, batch.act], -1))  # (E, B)
        v = self.value(batch.obs, a_n, noise["i"])  # (E, B)
        q_loss, v_loss = (q - q_td_target).square().mean(), (v - v_target).square().mean()
        return (q_loss, v_loss), {
            "q_loss": q_loss.detach(),
            "v_loss": v_loss.detach(),
            "q": q.detach().mean(),
            "v": v.detach().mean(),
            "step_kl": penalty.mean(),
        }

    def follow_critics(self) -> None:
        polyak_update_(self.critic_target.parameters(), self.critic.parameters(), self.config.tau)
        polyak_update_(self.value_target.parameters(), self.value.parameters(), self.config.tau)

    def q_target(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """y (B,), and the penalty of the path (B, K): K whole paths of the policy's EMA from each s'."""
        c, chain, n = self.config, self.policy.chain, len(batch.rew)
        if "path" not in noise:  # gamma = 0: a bandit has no next state
            return batch.rew, torch.zeros(n, c.n_samples, device=batch.rew.device)
        obs, path = batch.next_obs[:, None], noise["path"]  # (B, 1, S), (T + 1, B, K, A)
        x, penalty = path[0], torch.zeros(path.shape[1:3], device=path.device)
        eps_pi, eps_nu = self.policy_ema.on_states(obs), self.behavior_ema.on_states(obs)
        for i, z in zip(reversed(range(chain.n_steps)), path[1:], strict=True):
            eps = eps_pi(x, i)
            penalty = penalty + self.penalty(eps, eps_nu(x, i), i)  # [D2]
            x = reverse_mean(chain, i, x, eps, c.clip_x0)
            if i > 0:
                x = x + chain.beta_std[i] * z
        q = self.critic_target.on_parts(obs, x)  # (E, B, K)
        q = q.amax(-1) if c.max_q_backup else q.mean(-1)  # [D4]
        next_v = self.aggregate(q, noise) - self.kl_weight_in_values * penalty.mean(-1)
        return td_target(batch.rew, batch.done, next_v, c.gamma, batch.extras.get("floor")), penalty

    def step(self, batch: Batch, noise: Noise, policy: ChainPolicy) -> tuple[Tensor, Tensor]:
        """The mean (B, A) of a^n-1 that `policy` predicts from the data's action with noise, and l_n (B,)."""
        i = noise["i"]
        a_n = self.policy.perturbed(batch.act, noise["eps"], i)
        eps = policy.net(a_n, batch.obs, i)
        with torch.no_grad():
            eps_nu = self.behavior_ema.net(a_n, batch.obs, i)
        mean = reverse_mean(self.policy.chain, i[:, None], a_n, eps, self.config.clip_x0)
        return mean, self.penalty(eps, eps_nu, i)

    def value_before(self, obs: Tensor, mean: Tensor, noise: Noise) -> Tensor:
        """agg_e mean_k Vbar_n-1,e(s, a^n-1_k) (B,), with K actions a^n-1 around their mean (B, A)."""
        i = noise["i"]
        std = torch.where(i > 0, self.policy.chain.beta_std[i], 0.0)
        before = mean[:, None] + std[:, None, None] * noise["z"]  # (B, K, A), a^n-1
        v = self.value_target(obs, before, (i - 1).clamp(min=0)).mean(-1)  # (E, B); not used where n = 1
        q = self.critic_target(torch.cat([obs, mean], -1))  # (E, B); where n = 1, all K actions are the mean
        return self.aggregate(torch.where(i > 0, v, q), noise)  # V_0 = Q

    @property
    def kl_weight(self) -> float:
        """eta, or what is left of it [O2]."""
        return self.config.eta / self.state.constraint_relaxation

    @property
    def kl_weight_in_values(self) -> float:
        """eta in the targets of Q and V, where it is in units of reward; 0 if it is not [F6]."""
        return 0.0 if self.config.q_norm == "spread" else self.kl_weight

    def penalty(self, eps: Tensor, eps_nu: Tensor, i: int | Tensor) -> Tensor:
        """l_n = w_n || eps_pi - eps_nu ||^2, (..., A) -> (...)."""
        if self.config.precondition:  # [F5]
            weights = (self.step_weights * self.policy.chain.beta)[:, None] / self.reverse_variances()
            return (weights[i] * (eps - eps_nu).square()).sum(-1)
        return self.step_weights[i] * (eps - eps_nu).square().sum(-1)

    def reverse_variances(self) -> Tensor:
        """Of the steps of the behaviour model around its clone, (T, A) [F5]."""
        return reverse_var(self.policy.chain, clone_variance(self.behavior_ema.net))

    def aggregate(self, q: Tensor, noise: Noise) -> Tensor:
        """(E, B) -> (B,) [D3]."""
        kind, rho = self.config.aggregation, self.config.rho
        if kind == "lcb":
            return q.mean(0) - rho * q.std(0, correction=0)
        if kind == "convex":
            return rho * q.amin(0) + (1.0 - rho) * q.amax(0)
        if kind == "random_convex":
            return (noise["mix"] / noise["mix"].sum()) @ q
        return q.amin(0) if kind == "min" else q.mean(0)

    # ---- policy ------------------------------------------------------------------------------------------------------
    def draw_policy(self, n: int, generator: torch.Generator) -> Noise:
        shape = (n, self.config.n_samples, self.act_dim)
        noise = self.draw_behavior(n, generator)
        noise["z"] = torch.randn(shape, generator=generator, device=self.device)
        if self.config.aggregation == "random_convex":
            noise["mix"] = torch.rand(self.config.n_critics, generator=generator, device=self.device)
        return noise

    def policy_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Minus the objective of one denoising step, by the policy."""
        mean, penalty = self.step(batch, noise, self.policy)
        if self.config.q_norm == "spread":  # [F6]
            gradient = action_gradient(lambda a: self.value_before(batch.obs, a, noise), mean)
            var = self.reverse_variances()[noise["i"]]  # (B, A)
            ascent = (spread_gradient(gradient, var) / var * mean).sum(-1)
        else:
            ascent = self.value_before(batch.obs, mean, noise)
        loss = -(ascent - self.kl_weight * penalty).mean()
        return loss, {"policy_loss": loss.detach()}

    def follow_policy(self) -> None:
        polyak_update_(self.policy_ema.parameters(), self.policy.parameters(), self.config.ema_tau)

    # ---- acting ------------------------------------------------------------------------------------------------------
    def draw_act(self, n: int, deterministic: bool, config: BDPOConfig, generator: torch.Generator) -> Noise:
        n_candidates = 1 if config.select == "first" else config.n_candidates
        return self.policy_ema.draw_candidates(n, n_candidates, deterministic, generator)

    def act(self, obs: Tensor, noise: Noise, config: BDPOConfig) -> Tensor:
        """(B, S) -> (B, A): candidates of the policy's EMA, one of them selected by the ensemble's mean target Q [D8].

        If deterministic, the candidates come from the stored noise and argmax selects ("first" still takes the first).
        """
        c = config
        actions = self.policy_ema.candidates(obs, noise["noises"], config)  # (B, n, A)
        if actions.shape[1] == 1:
            return actions[:, 0]
        q = self.critic_target.on_parts(obs[:, None], actions).mean(0)
        return select_action(actions, q, c.select, c.temperature, noise.get("gumbel"))
