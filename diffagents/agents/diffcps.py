"""DiffCPS: Diffusion Model based Constrained Policy Search for Offline RL.   He et al. 2023, arXiv:2310.05333.

Problem      max_pi E[ Q(s, a) ]   subject to   L_c(pi) <= kappa, the cross-entropy to the data bounded by the denoising loss
Every step   critic; every `policy_freq`-th: policy, then multiplier, on the same batch; targets act with policy_ema
Critic       y = r + gamma (1 - d) min_j Qbar_j(s', a'),  a' ~ policy_ema(s');   loss = MSE_1 + MSE_2
Policy       L = lambda L_c + L_q,   lambda within [lambda_min, lambda_max]
             L_c = E || eps - eps_theta(sqrt(abar_i) a + sqrt(1 - abar_i) eps, s, i) ||^2,  mean over dimensions too
             L_q = - E[ Q_k(s, a0) ] / E| Q_l(s, a0) |,   a0 ~ pi(s) with gradients through all T denoising steps
Multiplier   descends lambda (kappa - L_c): it rises while the data are fitted worse than kappa allows
Symbols      kappa -> target_kl (the official flag), lambda -> `multiplier`
Details
  [D1] L_q is divided by the other ONLINE critic's mean size, by a coin (official code; the paper says target critic).
  [D2] a' is drawn from policy_ema (official code; the paper's listing draws it from the policy).
  [D3] The official code clips only a copy of lambda for use; the parameter itself wanders out and needs as long to return.
       Ours is projected onto [lambda_min, lambda_max] after each of its steps: the same while inside.
  [D4] kappa is a noise error per dimension: its scale depends on T. Where L_c never reaches it, lambda grows by
       `lambda_learning_rate` per policy step (Adam makes the step that size whatever the gradient), 30 in a million steps.
  [D5] `max_q_backup` (AntMaze): a' is the best of 10 for each critic, then the minimum of the two.
  [D6] Constant learning rates: the official cosine is a no-op (see diffusion_ql.py, [D4]).
  [D7] `max_grad_norm` is tuned per task in the official code (1 to 10, rows of zoo/diffcps.yml) and cuts lambda's gradient too.
  [D8] The lagged policy stands still for 1000 steps and then follows every 5th (official code).
  [D9] Acting: 50 candidates of the policy, one drawn by softmax of min Qbar / temperature. The published scores are the best
       evaluation of a run; ours ends with the last policy.
Online (a design of ours; the paper has none)
  [O1] The same update on old and new data, lambda adapting on.
  [O2] The constraint loosens: kappa doubles every `online_halflife` environment steps, 16-fold at most; lambda then falls by
       itself.
  [O3] It acts as it does offline [D9], plus Gaussian noise of `online_noise`: the chain itself grows narrow where Q is sharp.
  [O4] The lagged policy follows from the first step on ([D8]'s wait is over). The policy learns at
       `online_learning_rate`.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffagents.agent import Agent
from diffagents.config.checks import check_choice, check_number, check_solver, net_arch
from diffagents.data.normalize import REWARD_TRANSFORMS
from diffagents.functional import SELECT, normalized_q_loss, polyak_update_, select_action, td_target
from diffagents.networks.diffusion_policy import ChainPolicy, MLPDenoiser
from diffagents.networks.mlp import EnsembleMLP, mish
from diffagents.training.plan import Plan
from diffagents.training.updates import Noise, Optimizer, Stage, Update
from diffagents.types import Batch, Metrics


@dataclass(frozen=True)
class DiffCPSConfig:
    """Knobs of DiffCPS. Defaults are the paper's for locomotion; per-task values are rows of zoo/diffcps.yml."""

    target_kl: float = 0.05  # kappa > 0: the denoising loss that is allowed. THE knob; locomotion .03 to .06, AntMaze .09 to .3
    lambda_init: float = 1.0
    lambda_min: float = 0.0  # 0.3 on AntMaze
    lambda_max: float = 100.0
    lambda_learning_rate: float = 3e-5
    policy_freq: int = 2  # critic steps per policy step; 4 on large AntMaze
    n_diffusion_steps: int = 5  # T
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share of the online critic in its lagged copy, every step
    ema_tau: float = 0.005  # share of the policy in its lagged copy, [D8]
    ema_every: int = 5
    ema_start: int = 1000
    learning_rate: float = 3e-4  # policy; 1e-3 on one AntMaze task
    critic_learning_rate: float = 3e-4
    max_grad_norm: float | None = 5.0  # policy, critics and lambda, each for itself [D7]; None: no clipping
    batch_size: int = 256
    max_q_backup: bool = False  # [D5]
    n_backup_samples: int = 10  # of the max-Q backup
    n_candidates: int = 50  # acting [D9]
    select: str = "softmax"  # "softmax", "argmax" or "first"
    temperature: float = 1.0  # of the softmax, in units of Q
    solver: str = "ddpm"  # of acting; "ddim": deterministic from its noise, and may skip steps
    solver_steps: int | None = None  # network calls a sample, at most n_diffusion_steps; None: all
    online_learning_rate: float = 3e-5  # policy, constant [O4]
    online_noise: float = 0.1  # >= 0, std of the noise on actions in [-1, 1] [O3]
    online_halflife: int | None = 20_000  # environment steps in which target_kl doubles, None: it stays [O2]
    reward_transform: str = "none"  # "cql_antmaze" on AntMaze
    normalize_obs: bool = False
    train_steps: int | None = None  # None: the `default:` block of zoo/diffcps.yml; paper 2M (AntMaze 1M)

    def __post_init__(self) -> None:
        check_solver(self.solver, self.solver_steps, self.n_diffusion_steps)
        check_number("target_kl", self.target_kl, "must be positive: the denoising loss to keep to", lambda x: x > 0)
        check_number("lambda_min", self.lambda_min, "must not be negative", lambda x: x >= 0)
        check_number("lambda_max", self.lambda_max, "must exceed lambda_min", lambda x: x > self.lambda_min)
        check_number(
            "lambda_init",
            self.lambda_init,
            "must lie in [lambda_min, lambda_max]",
            lambda x: self.lambda_min <= x <= self.lambda_max,
        )
        check_choice("select", self.select, SELECT)
        check_choice("reward_transform", self.reward_transform, REWARD_TRANSFORMS)


class Multiplier(nn.Module):
    """lambda, one number that is learnt."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))


class DiffCPS(Agent):
    """A diffusion policy that climbs Q as far as a bound on its denoising loss allows."""

    Config = DiffCPSConfig
    config: DiffCPSConfig
    policy: ChainPolicy
    STAGE_SHARES: ClassVar[dict[str, int]] = {"train": 2_000_000}
    POLICY_STAGE = "train"
    MODEL: ClassVar[tuple[str, ...]] = ("policy", "critic_target")
    LEARNER: ClassVar[tuple[str, ...]] = ("policy_ema", "critic", "multiplier")
    CALIBRATES = True
    CHOICE: ClassVar[tuple[str, ...]] = ("n_candidates", "select", "temperature", "solver", "solver_steps")

    def build(self) -> None:
        c, obs_dim, act_dim = self.config, self.obs_dim, self.act_dim
        arch = net_arch(self.policy_kwargs, {"pi": (256, 256, 256), "qf": (256, 256, 256)})
        net = MLPDenoiser(obs_dim, act_dim, arch["pi"])
        self.policy = ChainPolicy(net, act_dim, c.n_diffusion_steps).to(self.device)
        self.policy_ema = copy.deepcopy(self.policy).requires_grad_(False)
        self.critic = EnsembleMLP(2, obs_dim + act_dim, arch["qf"], mish).to(self.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.multiplier = Multiplier(c.lambda_init).to(self.device)
        clip = c.max_grad_norm
        self.optimizers = {
            "policy": Optimizer(self.policy.parameters(), c.learning_rate, max_grad_norm=clip),  # [D6]
            "critic": Optimizer(self.critic.parameters(), c.critic_learning_rate, max_grad_norm=clip),
            "multiplier": Optimizer(self.multiplier.parameters(), c.lambda_learning_rate, max_grad_norm=clip),  # [D7]
        }

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        c, opt = self.config, self.optimizers
        updates = (
            Update(self.critic_loss, self.draw_critic, (opt["critic"],), self.follow_critic),
            Update(
                self.policy_losses,
                self.draw_policy,
                (opt["policy"], opt["multiplier"]),
                self.project_multiplier,
                every=c.policy_freq,
            ),
            Update(after=self.follow_policy, every=c.ema_every, start=c.ema_start),  # [D8]
        )
        return [Stage("train", c.batch_size, updates)]

    def online_stage(self) -> Stage:
        (offline,) = self.stages()
        *updates, follow = offline.updates
        return Stage("online", offline.batch_size, (*updates, dataclasses.replace(follow, start=0)))  # [O1] [O4]

    # ---- critic ----------------------------------------------------------------------------------------------------
    def draw_critic(self, n: int, generator: torch.Generator) -> Noise:
        each = self.config.n_backup_samples if self.config.max_q_backup else 1
        return {"noises": self.policy.noises((n * each,), generator)}

    def critic_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """MSE_1 + MSE_2 against the minimum of the lagged twins at the lagged policy's action [D2]."""
        c = self.config
        with torch.no_grad():
            each = c.n_backup_samples if c.max_q_backup else 1  # [D5]
            next_obs = batch.next_obs.repeat_interleave(each, dim=0)
            next_act = self.policy_ema.sample(next_obs, noise["noises"])
            next_q = self.critic_target(torch.cat([next_obs, next_act], -1))  # (2, B * each)
            next_v = next_q.view(2, -1, each).amax(-1).amin(0)  # (B,)
            goal = td_target(batch.rew, batch.done, next_v, c.gamma, batch.extras.get("floor"))
        q = self.critic(torch.cat([batch.obs, batch.act], -1))  # (2, B)
        loss = (q - goal).square().mean(-1).sum()
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean()}

    def follow_critic(self) -> None:
        polyak_update_(self.critic_target.parameters(), self.critic.parameters(), self.config.tau)

    # ---- policy and multiplier -------------------------------------------------------------------------------------
    def draw_policy(self, n: int, generator: torch.Generator) -> Noise:
        kwargs: dict[str, Any] = {"generator": generator, "device": self.device}
        return {
            "i": torch.randint(self.config.n_diffusion_steps, (n,), **kwargs),
            "eps": torch.randn(n, self.act_dim, **kwargs),
            "noises": self.policy.noises((n,), generator),
            "coin": torch.rand((), **kwargs),
        }

    def policy_losses(self, batch: Batch, noise: Noise) -> tuple[tuple[Tensor, Tensor], Metrics]:
        """The policy's loss, and the multiplier's."""
        c = self.config
        bc_loss, q_loss = self.bc_loss(batch, noise), self.q_loss(batch, noise)
        multiplier = self.multiplier.value.detach().clamp(c.lambda_min, c.lambda_max)
        policy_loss = multiplier * bc_loss + q_loss
        multiplier_loss = self.multiplier.value * (c.target_kl * self.state.constraint_relaxation - bc_loss.detach())  # [O2]
        metrics = {
            "policy_loss": policy_loss.detach(),
            "bc_loss": bc_loss.detach(),  # to be compared with target_kl
            "q_loss": q_loss.detach(),
            "lambda": multiplier,
        }
        return (policy_loss, multiplier_loss), metrics

    @torch.no_grad()
    def project_multiplier(self) -> None:
        self.multiplier.value.clamp_(self.config.lambda_min, self.config.lambda_max)  # [D3]

    def bc_loss(self, batch: Batch, noise: Noise) -> Tensor:
        """L_c: the noise in the data's actions, predicted; mean over batch and dimensions [D4]."""
        a_i = self.policy.perturbed(batch.act, noise["eps"], noise["i"])
        return F.mse_loss(self.policy.net(a_i, batch.obs, noise["i"]), noise["eps"])

    def q_loss(self, batch: Batch, noise: Noise) -> Tensor:
        """L_q: minus one critic at the policy's actions, in units of the other's mean size there [D1]."""
        a0 = self.policy.sample(batch.obs, noise["noises"])
        q1, q2 = self.critic(torch.cat([batch.obs, a0], -1))  # (B,) each; online, already updated
        return normalized_q_loss(q1, q2, noise["coin"])

    def follow_policy(self) -> None:
        polyak_update_(self.policy_ema.parameters(), self.policy.parameters(), self.config.ema_tau)

    # ---- acting ----------------------------------------------------------------------------------------------------
    def draw_act(self, n: int, deterministic: bool, config: DiffCPSConfig, generator: torch.Generator) -> Noise:
        n_candidates = 1 if config.select == "first" else config.n_candidates
        return self.policy.draw_candidates(n, n_candidates, deterministic, generator)

    def act(self, obs: Tensor, noise: Noise, config: DiffCPSConfig) -> Tensor:
        """(B, S) -> (B, A): candidates of the policy, one chosen by min Qbar [D9].

        deterministic: the candidates of the stored noise, then argmax ("first" stays the first).
        """
        c = config
        actions = self.policy.candidates(obs, noise["noises"], config)  # (B, n, A)
        if actions.shape[1] == 1:
            return actions[:, 0]
        q = self.critic_target.on_parts(obs[:, None], actions).amin(0)  # (B, n)
        return select_action(actions, q, c.select, c.temperature, noise.get("gumbel"))

    @classmethod
    def from_official(cls, actor: Any, critic: Any, **kwargs: Any) -> "DiffCPS":
        """Load the authors' files `actor_<n>.pth` and `critic_<n>.pth` (paths or state dicts); kwargs as the constructor's.

        They hold no lagged copies and no multiplier: those start equal and at lambda_init, with one warning.
        Raises FileNotFoundError, ValueError.
        """
        from diffagents.storage.official_checkpoints import chain_from_official

        return chain_from_official(cls, actor, critic, **kwargs)
