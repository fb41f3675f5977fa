"""Diffusion-QL: Diffusion Policies as an Expressive Policy Class.   Wang, Hunt, Zhou, ICLR 2023, arXiv:2208.06193.

Every step   critic, then policy, on one batch; targets act with the lagged policy (policy_ema).
Critic       y = r + gamma (1 - d) min_j Qbar_j(s', a'),  a' ~ policy_ema(s');   loss = MSE_1 + MSE_2                Eq. (4)
Policy       L = L_d + eta L_q                                                                                        Eq. (3)
             L_d = E || eps - eps_theta(sqrt(abar_i) a + sqrt(1 - abar_i) eps, s, i) ||^2,  i uniform                 Eq. (2)
             L_q = - E[ Q_k(s, a0) ] / E| Q_l(s, a0) |,   a0 ~ pi(s) with gradients through all T denoising steps
Details
  [D1] L_q: (k, l) is (1, 2) or (2, 1) by a coin, and the divisor is the mean size of Q_l on the POLICY's actions, detached
       (official code). The paper normalises eta by E|Q| over the data.
  [D2] `max_q_backup` (AntMaze): a' is the best of 10 for each critic, then the minimum of the two.
  [D3] L_d is the mean over batch and dimensions, the score network's time is the 0-based step (official code).
  [D4] The learning rate is constant. The official code's cosine is stepped once per 50 epochs of a schedule in epochs: its
       last factor is 0.999.
  [D5] `max_grad_norm` is tuned per task in the official code (1 to 10, rows of zoo/diffusion_ql.yml); 5 elsewhere.
  [D6] The lagged policy stands still for 1000 steps and then follows every 5th (official code).
  [D7] Acting: 50 candidates of the policy (not the lagged one), one drawn by softmax of min Qbar / temperature. With returns
       in the hundreds that is all but the argmax.
  [D8] The official run reports a checkpoint chosen by its diffusion loss, or the best evaluation; ours ends with the last.
Online (a design of ours; the paper has none)
  [O1] The same update on old and new data: cloning what both hold, its own better actions among them, and climbing Q. (A
       port's fine-tuning clones the actor's own samples instead, which holds it to nothing but itself.)
  [O2] The constraint loosens: eta doubles every `online_halflife` environment steps, 16-fold at most.
  [O3] It acts as it does offline [D7] (drawn candidates, softmax of Q), plus Gaussian noise of `online_noise`: the chain
       itself grows narrow where Q is sharp.
  [O4] The lagged policy follows from the first step on ([D6]'s wait is over). The policy learns at
       `online_learning_rate`.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
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
class DiffusionQLConfig:
    """Knobs of Diffusion-QL. Defaults: the official code's for locomotion; per task: zoo/diffusion_ql.yml."""

    eta: float = 1.0  # >= 0; weight of the Q term against cloning. THE knob; 0 is behaviour cloning, AntMaze 0.5 to 4.5
    n_diffusion_steps: int = 5  # T
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share of the online critic in its lagged copy, every step
    ema_tau: float = 0.005  # share of the policy in its lagged copy, [D6]
    ema_every: int = 5
    ema_start: int = 1000
    learning_rate: float = 3e-4  # policy; 1e-3 on one AntMaze task, 3e-5 on adroit
    critic_learning_rate: float = 3e-4
    max_grad_norm: float | None = 5.0  # policy and critics, each for itself [D5]; None: no clipping
    batch_size: int = 256
    max_q_backup: bool = False  # [D2]
    n_backup_samples: int = 10  # of the max-Q backup
    n_candidates: int = 50  # acting [D7]
    select: str = "softmax"  # "softmax", "argmax" or "first"
    temperature: float = 1.0  # of the softmax, in units of Q
    solver: str = "ddpm"  # of acting; "ddim": deterministic from its noise, and may skip steps
    solver_steps: int | None = None  # network calls a sample, at most n_diffusion_steps; None: all
    online_learning_rate: float = 3e-5  # policy, constant [O4]
    online_noise: float = 0.1  # >= 0, std of the noise on actions in [-1, 1] [O3]
    online_halflife: int | None = 20_000  # environment steps in which eta doubles, None: it stays [O2]
    reward_transform: str = "none"  # "cql_antmaze" on AntMaze, "normalize" on adroit
    normalize_obs: bool = False
    train_steps: int | None = None  # None: the `default:` block of zoo/diffusion_ql.yml; paper 2M (AntMaze, adroit 1M)

    def __post_init__(self) -> None:
        check_solver(self.solver, self.solver_steps, self.n_diffusion_steps)
        check_number("eta", self.eta, "must not be negative: 0 clones the data, 1 is usual", lambda x: x >= 0)
        check_choice("select", self.select, SELECT)
        check_choice("reward_transform", self.reward_transform, REWARD_TRANSFORMS)


class DiffusionQL(Agent):
    """A diffusion policy trained by cloning and by the gradient of Q through its denoising chain."""

    Config = DiffusionQLConfig
    config: DiffusionQLConfig
    policy: ChainPolicy
    STAGE_SHARES: ClassVar[dict[str, int]] = {"train": 2_000_000}
    POLICY_STAGE = "train"
    MODEL: ClassVar[tuple[str, ...]] = ("policy", "critic_target")
    LEARNER: ClassVar[tuple[str, ...]] = ("policy_ema", "critic")
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
        self.optimizers = {
            "policy": Optimizer(self.policy.parameters(), c.learning_rate, max_grad_norm=c.max_grad_norm),  # [D4]
            "critic": Optimizer(self.critic.parameters(), c.critic_learning_rate, max_grad_norm=c.max_grad_norm),
        }

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        c, opt = self.config, self.optimizers
        updates = (
            Update(self.critic_loss, self.draw_critic, (opt["critic"],), self.follow_critic),
            Update(self.policy_loss, self.draw_policy, (opt["policy"],)),
            Update(after=self.follow_policy, every=c.ema_every, start=c.ema_start),  # [D6]
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
        """Eq. (4): MSE_1 + MSE_2 against the minimum of the lagged twins at the lagged policy's action."""
        c = self.config
        with torch.no_grad():
            each = c.n_backup_samples if c.max_q_backup else 1  # [D2]
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

    # ---- policy ----------------------------------------------------------------------------------------------------
    def draw_policy(self, n: int, generator: torch.Generator) -> Noise:
        kwargs: dict[str, Any] = {"generator": generator, "device": self.device}
        return {
            "i": torch.randint(self.config.n_diffusion_steps, (n,), **kwargs),
            "eps": torch.randn(n, self.act_dim, **kwargs),
            "noises": self.policy.noises((n,), generator),
            "coin": torch.rand((), **kwargs),
        }

    def policy_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Eq. (3): L_d + eta L_q."""
        bc_loss, q_loss = self.bc_loss(batch, noise), self.q_loss(batch, noise)
        loss = bc_loss + self.config.eta * self.state.constraint_relaxation * q_loss
        return loss, {"policy_loss": loss.detach(), "bc_loss": bc_loss.detach(), "q_loss": q_loss.detach()}

    def bc_loss(self, batch: Batch, noise: Noise) -> Tensor:
        """Eq. (2): the noise in the data's actions, predicted [D3]."""
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
    def draw_act(self, n: int, deterministic: bool, config: DiffusionQLConfig, generator: torch.Generator) -> Noise:
        n_candidates = 1 if config.select == "first" else config.n_candidates
        return self.policy.draw_candidates(n, n_candidates, deterministic, generator)

    def act(self, obs: Tensor, noise: Noise, config: DiffusionQLConfig) -> Tensor:
        """(B, S) -> (B, A): candidates of the policy, one chosen by min Qbar [D7].

        deterministic: the candidates of the stored noise, then argmax ("first" stays the first).
        """
        c = config
        actions = self.policy.candidates(obs, noise["noises"], config)  # (B, n, A)
        if actions.shape[1] == 1:
            return actions[:, 0]
        q = self.critic_target.on_parts(obs[:, None], actions).amin(0)  # (B, n)
        return select_action(actions, q, c.select, c.temperature, noise.get("gumbel"))

    @classmethod
    def from_official(cls, actor: Any, critic: Any, **kwargs: Any) -> "DiffusionQL":
        """Load the authors' files `actor_<n>.pth` and `critic_<n>.pth` (paths or state dicts); kwargs as the constructor's.

        They hold no lagged copies: those start equal, with one warning. Raises FileNotFoundError, ValueError.
        """
        from diffagents.storage.official_checkpoints import chain_from_official

        return chain_from_official(cls, actor, critic, **kwargs)
