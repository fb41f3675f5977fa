"""IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion Policies.   Hansen-Estruch et al. 2023, arXiv:2304.10573.

Order        critic and behaviour model are trained independently of each other.
Critic       IQL's, by expectile regression: networks/critics.py
Behaviour    L = E || eps - eps_mu(sqrt(abar_i) a + sqrt(1 - abar_i) eps, s, i) ||^2, i uniform, summed over dimensions
Acting       the best of N samples of mu(.|s) by min_j Qbar_j; or, as the paper's implicit actor, one sampled with weights
             |tau - 1(A <= 0)|,   A = min_j Qbar_j(s, a) - V(s)
Symbols      mu -> behavior (behavior_ema acts), Q, Qbar and V -> critic
Source       philippe-eecs/IDQL, its current learner `ddpm_iql_simple`; the older `ddpm_iql` has the implicit actor
Details
  [D1] The released loop updates both networks at every step, on one batch; comments in it mention two behaviour updates for
       each critic update. Separate stages, as here, give the same result, and their lengths can be chosen:
       `preset="official_code"` and "paper".
  [D2] V(s') is computed before the V step (networks/critics.py); the official code updates V first, and Q towards the new V.
  [D3] `v_layer_norm` (current code; the older learner has none): the input of V is normalised over its own dimensions. With
       one or two dimensions this would leave nothing or only a sign, so there it is omitted. The author says that the current
       code, with this and a smaller batch, scores a few points below the paper.
  [D4] The sampler uses the noise estimate as it is (the action that it implies is not clipped), clips every x to [-1, 1], and
       has standard deviation sqrt(beta_i) `sampling_temperature`.
  [D5] The critic's layers are initialised Xavier-uniform. In the blocks of the behaviour model the official layers are
       initialised by LeCun's normal with zero biases; ours as in PyTorch.
  [D6] The official code trains on 95 % of the data and keeps the rest for a validation loss; ours trains on all of it.
  [D7] It clips actions to +-(1 - 1e-5), which matters for densities of squashed actions; there are none here.
  [D8] `select="softmax"` over Q / temperature is the rule of a port (CleanDiffuser), whose weights of the advantage are 1 /
       temperature: 5 to 400 on locomotion, with a sampling_temperature of 0.5.
Online (the released fine-tuning loop)
  [O1] Only the critic continues to learn, on half old and half new data; the behaviour model is frozen. The improvement is
       limited to the support of the data.
  [O2] It acts by the best of N samples, as in evaluation. The released loop waits 5000 steps (`learning_starts`) and
       evaluates with 128 samples.
Fast recipe (`preset="fast"`, one setting for all datasets; our design, off in a plain config)
  [F1] `return_temperature`: the policy learns from episodes drawn by their return, the critic from half of these and half of
       all (Hong et al. 2023, arXiv:2306.13085).
  [F2] `precondition`: the noise predictor is a correction to that of a Gaussian around a clone (networks/preconditioned.py).
  [F3] `returns_share`: the critic stage begins with Q regressing on the returns of the data.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffagents.agent import Agent
from diffagents.config.checks import MOST, N_FIXED, net_arch
from diffagents.config.hyperparameters import Hyperparameters, hyperparameter
from diffagents.config.recipe import DETERMINISTIC, PRECONDITION, Q_LAYER_NORM, RETURN_TEMPERATURE, RETURNS_SHARE
from diffagents.data.normalize import REWARD_TRANSFORMS
from diffagents.diffusion.chain import SOLVERS, check_solver
from diffagents.functional import SELECT, eps_loss, polyak_update_, select_action
from diffagents.networks.critics import IQLCritic
from diffagents.networks.diffusion_policy import ChainPolicy, DenoiserOnStates, bind_states
from diffagents.networks.mlp import MLP, ResidualBlock, dropout_masks, xavier_
from diffagents.networks.preconditioned import PreconditionedDenoiser, add_clone_loss, without_clone
from diffagents.training.plan import Plan, opening_steps
from diffagents.training.updates import Noise, Optimizer, Stage, Update
from diffagents.types import Batch, Metrics


@dataclass(frozen=True)
class IDQLConfig(Hyperparameters):
    """Hyperparameters of IDQL.

    The defaults are the official code's for locomotion; values for each task are rows of zoo/idql.yml.
    """

    expectile: float = hyperparameter(
        0.7,
        "Expectile of Q that V is fitted to: near 1, V approaches the best actions of the data. AntMaze: 0.9.",
        above=0,
        below=1,
    )
    n_candidates: int = hyperparameter(
        64,
        "Number of actions sampled when acting, of which Q selects one; deterministic acting uses stored noise. "
        "The main hyperparameter: large follows Q, 1 clones the data; the paper sweeps 16, 64, 256.",
        at_least=1,
        at_most=N_FIXED,
    )
    select: str = hyperparameter(
        "argmax",
        'How one candidate is selected when acting: "softmax" samples it by its Q, "argmax" takes the best, "first" ignores Q. '
        '"expectile" is the implicit actor of the paper; "first" is the behaviour model itself.',
        choices=(*SELECT, "expectile"),
    )
    temperature: float = hyperparameter(1.0, 'Temperature of select="softmax", in units of Q [D8].', above=0)
    sampling_temperature: float = hyperparameter(
        1.0, "Factor on the standard deviation of the sampler's noise: below 1, likelier actions are preferred [D4].", above=0
    )
    n_diffusion_steps: int = hyperparameter(5, "Number T of denoising steps of the diffusion model.", at_least=1, at_most=MOST)
    ema_tau: float = hyperparameter(
        0.001, "Soft update coefficient of the moving average (EMA) of the behaviour model, at every step.", above=0, at_most=1
    )
    weight_decay: float = hyperparameter(1e-4, "Weight decay of the behaviour model.", at_least=0)
    dropout: float = hyperparameter(
        0.1, "Dropout rate in the residual blocks of the behaviour model during training.", at_least=0, below=1
    )
    v_layer_norm: bool = hyperparameter(True, "Whether V normalises its input by LayerNorm [D3].")
    gamma: float = hyperparameter(0.99, "Discount factor of future rewards.", at_least=0, below=1)
    tau: float = hyperparameter(
        0.005, "Soft update (Polyak) coefficient of the target network of Q, at every critic update.", above=0, at_most=1
    )
    learning_rate: float = hyperparameter(
        3e-4,
        "Learning rate of the critic, constant, and the initial one of the behaviour model, which falls to 0 on a cosine.",
        above=0,
    )
    batch_size: int = hyperparameter(512, "Number of transitions in a batch, in both stages.", at_least=1, at_most=MOST)
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
    reward_transform: str = hyperparameter(
        "auto",
        'Transform of the rewards, of which "auto" chooses one from the data. '
        'Locomotion: "iql_locomotion". AntMaze: "iql_antmaze".',
        choices=REWARD_TRANSFORMS,
    )
    normalize_obs: bool = hyperparameter(
        False, "Whether observations are normalised by the mean and standard deviation of the data."
    )
    precondition: bool = hyperparameter(False, PRECONDITION)
    return_temperature: float | None = hyperparameter(None, RETURN_TEMPERATURE, above=0)
    returns_share: float = hyperparameter(0.0, RETURNS_SHARE, at_least=0, at_most=1)
    q_layer_norm: bool = hyperparameter(False, Q_LAYER_NORM)
    critic_steps: int | None = hyperparameter(
        None, "Gradient steps of the critic stage. None: the `default` block of zoo/idql.yml. Paper: 1.5M [D1].", at_least=0
    )
    behavior_steps: int | None = hyperparameter(
        None, "Gradient steps of the behaviour stage. None: the `default` block of zoo/idql.yml. Paper: 3M.", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_solver(self.solver, self.solver_steps, self.n_diffusion_steps)


class ResidualDenoiser(nn.Module):
    """Noise predictor eps(a_t, s, i) of IDQL: `DDPM` around `MLPResNet` in its official code.

    Time: 64 learned frequencies W, initially N(0, 0.2^2), features [cos, sin](2 pi W i), Linear 128-256, SiLU, Linear 256-256.
    Input [a_t, s, time]; Linear to `width`; residual blocks with SiLU; SiLU; Linear to A. All but the blocks use `xavier_`.
    """

    N_FREQUENCIES, TIME_DIM = 64, 256

    def __init__(self, obs_dim: int, act_dim: int, width: int = 256, n_blocks: int = 3) -> None:
        super().__init__()
        self.width, self.n_blocks = width, n_blocks
        self.frequencies = nn.Parameter(0.2 * torch.randn(self.N_FREQUENCIES))
        self.time_mlp = MLP(2 * self.N_FREQUENCIES, (self.TIME_DIM,), self.TIME_DIM, nn.SiLU)
        self.input = nn.Linear(act_dim + obs_dim + self.TIME_DIM, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, F.silu) for _ in range(n_blocks))
        self.output = nn.Linear(width, act_dim)
        for layers in (self.time_mlp, self.input, self.output):
            xavier_(layers)

    def forward(self, a_t: Tensor, obs: Tensor, i: Tensor, masks: Tensor | None = None) -> Tensor:
        """As `MLPDenoiser`; `masks` (n_blocks, ..., width) are dropout masks, None when acting."""
        lead = a_t.shape[:-1]
        h = self.input(torch.cat([a_t, obs.expand(*lead, -1), self.time_features(i).expand(*lead, -1)], -1))
        return self.rest(h, masks)

    def time_features(self, i: Tensor) -> Tensor:
        """i (...,) -> (..., TIME_DIM)."""
        phase = 2.0 * math.pi * i[..., None] * self.frequencies
        time: Tensor = self.time_mlp(torch.cat([torch.cos(phase), torch.sin(phase)], -1))
        return time

    def on_states(self, obs: Tensor, n_steps: int) -> DenoiserOnStates:
        return bind_states(self.input, self.rest, self.time_features, obs, n_steps, state_before_time=True)

    def rest(self, h: Tensor, masks: Tensor | None = None) -> Tensor:
        for k, block in enumerate(self.blocks):
            h = block(h, None if masks is None else masks[k])
        out: Tensor = self.output(F.silu(h))
        return out


class IDQL(Agent):
    """Implicit diffusion Q-learning: samples of a behaviour model, selected by a critic that is trained on the data alone."""

    Config = IDQLConfig
    config: IDQLConfig
    STAGE_SHARES: ClassVar[dict[str, int]] = {"critic": 1_500_000, "behavior": 3_000_000}
    POLICY_STAGE = "behavior"
    MODEL: ClassVar[tuple[str, ...]] = ("behavior_ema", "critic")
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]] = ("behavior",)
    CHOICE: ClassVar[tuple[str, ...]] = (
        "n_candidates",
        "select",
        "temperature",
        "sampling_temperature",
        "solver",
        "solver_steps",
    )

    def build(self) -> None:
        c, obs_dim, act_dim = self.config, self.obs_dim, self.act_dim
        arch = net_arch(
            self.policy_kwargs, {"qf": (256, 256), "vf": (256, 256)}, extra={"behavior_width": 256, "behavior_blocks": 3}
        )
        norm = c.v_layer_norm and obs_dim > 2  # [D3]
        self.critic = IQLCritic(obs_dim, act_dim, arch["qf"], arch["vf"], norm, c.q_layer_norm)
        xavier_(self.critic)  # [D5]
        self.critic.to(self.device)
        self.critic.update_target(1.0)
        net: nn.Module = ResidualDenoiser(obs_dim, act_dim, arch["behavior_width"], arch["behavior_blocks"])
        if c.precondition:  # [F2]
            net = PreconditionedDenoiser(net, obs_dim, act_dim, c.n_diffusion_steps)
        chain = ChainPolicy(net, act_dim, c.n_diffusion_steps, std="beta", clip_x0=False, clip_x=True)  # [D4]
        self.behavior = chain.to(self.device)
        self.behavior_ema = copy.deepcopy(self.behavior).requires_grad_(False)
        self.optimizers = {
            "critic": Optimizer(self.critic.trained_parameters(), c.learning_rate),
            "behavior": Optimizer(self.behavior.parameters(), c.learning_rate, weight_decay=c.weight_decay, cosine=True),
        }

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        c, n, opt = self.config, self.config.batch_size, self.optimizers
        first = opening_steps(c.returns_share, plan or self.plan, "critic", self.stage_steps)
        opening = Update(self.return_loss, optimizers=(opt["critic"],), after=self.follow_critic, stop=first)  # [F3]
        critic = Update(self.critic_loss, optimizers=(opt["critic"],), after=self.follow_critic, start=first)
        prepare = (lambda sampler, _: sampler.with_returns(c.gamma)) if first else None
        draw, follow = self.draw_behavior, self.follow_behavior
        behavior = Update(self.behavior_loss, draw, (opt["behavior"],), follow, by_return=True)
        return [  # [D1]
            Stage("critic", n, (opening, critic) if first else (critic,), prepare),
            Stage("behavior", n, (behavior,)),
        ]

    def online_stage(self) -> Stage:
        return Stage("online", self.config.batch_size, (dataclasses.replace(self.stages()[0].updates[-1], start=0),))  # [O1]

    # ---- stage 1: critic -------------------------------------------------------------------------------------------
    def critic_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        return self.critic.loss(batch, self.config.expectile, self.config.gamma)  # [D2]

    def return_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The same with Q regressed on the returns of the data [F3]."""
        return self.critic.loss(batch, self.config.expectile, self.config.gamma, batch.extras["returns"])

    def follow_critic(self) -> None:
        self.critic.update_target(self.config.tau)

    # ---- stage 2: behaviour ----------------------------------------------------------------------------------------
    def draw_behavior(self, n: int, generator: torch.Generator) -> Noise:
        c, net = self.config, without_clone(self.behavior.net)
        assert isinstance(net, ResidualDenoiser)
        kwargs: dict[str, Any] = {"generator": generator, "device": self.device}
        noise = {
            "i": torch.randint(c.n_diffusion_steps, (n,), **kwargs),
            "eps": torch.randn(n, self.act_dim, **kwargs),
        }
        if c.dropout > 0:
            noise["masks"] = dropout_masks((net.n_blocks, n, net.width), c.dropout, generator)
        return noise

    def behavior_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """L: the error of the predicted noise in the data's actions."""
        a_i = self.behavior.perturbed(batch.act, noise["eps"], noise["i"])
        loss = eps_loss(self.behavior.net(a_i, batch.obs, noise["i"], noise.get("masks")), noise["eps"])
        return add_clone_loss(self.behavior.net, batch, loss, {"behavior_loss": loss.detach()})  # [F2]

    def follow_behavior(self) -> None:
        polyak_update_(self.behavior_ema.parameters(), self.behavior.parameters(), self.config.ema_tau)

    # ---- acting ----------------------------------------------------------------------------------------------------
    def draw_act(self, n: int, deterministic: bool, config: IDQLConfig, generator: torch.Generator) -> Noise:
        n_candidates = 1 if config.select == "first" else config.n_candidates
        return self.behavior_ema.draw_candidates(n, n_candidates, deterministic, generator)

    def act(self, obs: Tensor, noise: Noise, config: IDQLConfig) -> Tensor:
        """(B, S) -> (B, A): samples of the behaviour model's EMA, one of them selected by min Qbar.

        If deterministic, the samples come from the stored noise and argmax selects ("first" still takes the first).
        """
        c, gumbel_noise = config, noise.get("gumbel")
        actions = self.behavior_ema.candidates(obs, noise["noises"], c, c.sampling_temperature)  # (B, n, A)
        if actions.shape[1] == 1:
            return actions[:, 0]
        q = self.critic.q_target.on_parts(actions, obs[:, None]).amin(0)  # (B, n)
        if c.select == "expectile" and gumbel_noise is not None:
            return implicit_choice(actions, q - self.critic.v(obs), c.expectile, gumbel_noise)
        return select_action(actions, q, c.select, c.temperature, gumbel_noise)


def implicit_choice(actions: Tensor, advantage: Tensor, expectile: float, noise: Tensor) -> Tensor:
    """The paper's implicit actor: samples one of K actions with weight `expectile` above V and 1 - `expectile` below.

    Source: `sample_implicit_policy` of the official code.

    Args:
        actions: (B, K, A).
        advantage: Q - V, (B, K).
        expectile: The expectile of V, in (0, 1).
        noise: Gumbel noise, (B, K).

    Returns:
        The sampled actions, (B, A).
    """
    weights = torch.where(advantage > 0, expectile, 1.0 - expectile)
    drawn = (weights.log() + noise).argmax(-1, keepdim=True)
    return actions.gather(1, drawn[..., None].expand(-1, 1, actions.shape[-1])).squeeze(1)
