"""Diffusion-QL: Diffusion Policies as an Expressive Policy Class.   Wang, Hunt, Zhou, ICLR 2023, arXiv:2208.06193.

Every step   critic, then policy, on one batch; next actions in the targets come from the policy's EMA (policy_ema).
Critic       y = r + gamma (1 - d) min_j Qbar_j(s', a'),  a' ~ policy_ema(s');   loss = MSE_1 + MSE_2                Eq. (4)
Policy       L = L_d + eta L_q                                                                                        Eq. (3)
             L_d = E || eps - eps_theta(sqrt(abar_i) a + sqrt(1 - abar_i) eps, s, i) ||^2,  i uniform                 Eq. (2)
             L_q = - E[ Q_k(s, a0) ] / E| Q_l(s, a0) |,   a0 ~ pi(s) with gradients through all T denoising steps
Details
  [D1] L_q: (k, l) is (1, 2) or (2, 1) at random, and the divisor is the mean size of Q_l on the POLICY's actions, detached
       (official code). The paper normalises eta by E|Q| over the data.
  [D2] `max_q_backup` (AntMaze): a' is the best of 10 for each critic, then the minimum of the two.
  [D3] L_d is the mean over batch and dimensions; the denoiser's time is the 0-based step (official code).
  [D4] The learning rate is constant. The official code's cosine is stepped once in 50 epochs of a schedule in epochs: its
       last factor is 0.999.
  [D5] `max_grad_norm` is tuned per task in the official code (1 to 10, rows of zoo/diffusion_ql.yml); 5 elsewhere.
  [D6] The policy's EMA is constant for 1000 steps and then updated at every 5th (official code).
  [D7] Acting: 50 candidates of the policy (not of its EMA), one sampled by softmax of min Qbar / temperature. With returns in
       the hundreds this is nearly the argmax.
  [D8] The official run reports a checkpoint chosen by its diffusion loss, or the best evaluation; ours is the last policy.
Online (our design; the paper has none)
  [O1] The same update on old and new data: it clones both, including its own better actions, and maximises Q. (The fine-tuning
       of a port clones the actor's own samples instead, which constrains it to nothing but itself.)
  [O2] The constraint is relaxed: eta doubles every `online_halflife` environment steps, up to 16-fold.
  [O3] It acts as offline [D7] (random candidates, softmax of Q), plus Gaussian noise of `online_noise`, because the chain
       itself becomes narrow where Q is sharp.
  [O4] The policy's EMA is updated from the first step on ([D6] no longer applies). The policy learns at
       `online_learning_rate`.
Fast recipe (`preset="fast"`, one setting for all datasets; our design, off in a plain config)
  [F1] `return_temperature`: the policy learns from episodes drawn by their return, the critic from half of these and half of
       all (Hong et al. 2023, arXiv:2306.13085).
  [F2] `precondition`: the noise predictor is a correction to that of a Gaussian around a clone (networks/preconditioned.py).
  [F3] `returns_share`: the stage begins with Q regressing on the returns of the data while the policy only clones.
  [F4] `deterministic_backup`: targets of Q take the policy's action without noise, the one that acts (`select="first"`).
  [F5] `q_norm="spread"`: L_q ascends dQ/da in units of sqrt(v), the spread of the data's actions around the clone, bounded in
       every state (`functional.spread_gradient`), so that eta depends neither on the scale of Q nor on how narrow the data are.
  [F6] `cosine`: learning rates fall to 0 over the stage.
"""

import copy
import dataclasses
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
    Q_NORM,
    Q_NORMS,
    RETURN_TEMPERATURE,
    RETURNS_SHARE,
)
from diffagents.data.normalize import REWARD_TRANSFORMS
from diffagents.diffusion.chain import SOLVERS, check_solver
from diffagents.functional import (
    SELECT,
    gradient_ascent_loss,
    normalized_q_loss,
    polyak_update_,
    return_loss,
    select_action,
    td_target,
)
from diffagents.networks.diffusion_policy import ChainPolicy, MLPDenoiser
from diffagents.networks.mlp import EnsembleMLP, mish
from diffagents.networks.preconditioned import PreconditionedDenoiser, add_clone_loss, clone_variance
from diffagents.training.plan import Plan, opening_steps
from diffagents.training.updates import Noise, Optimizer, Stage, Update
from diffagents.types import Batch, Metrics


@dataclass(frozen=True)
class DiffusionQLConfig(Hyperparameters):
    """Hyperparameters of Diffusion-QL.

    The defaults are the official code's for locomotion; values for each task are rows of zoo/diffusion_ql.yml.
    """

    eta: float = hyperparameter(
        1.0,
        "Weight of Q against cloning: 0 clones the data, large is greedy. The main hyperparameter. AntMaze: 0.5 to 4.5.",
        at_least=0,
    )
    n_diffusion_steps: int = hyperparameter(5, "Number T of denoising steps of the diffusion model.", at_least=1, at_most=MOST)
    gamma: float = hyperparameter(0.99, "Discount factor of future rewards.", at_least=0, below=1)
    tau: float = hyperparameter(
        0.005, "Soft update (Polyak) coefficient of the target network of Q, at every critic update.", above=0, at_most=1
    )
    ema_tau: float = hyperparameter(
        0.005, "Soft update coefficient of the policy's moving average (EMA), at each of its updates [D6].", above=0, at_most=1
    )
    ema_every: int = hyperparameter(5, "Gradient steps between two updates of the policy's EMA [D6].", at_least=1, at_most=MOST)
    ema_start: int = hyperparameter(1000, "Gradient steps before the first update of the policy's EMA [D6].", at_least=0)
    learning_rate: float = hyperparameter(3e-4, "Learning rate of the policy. One AntMaze task: 1e-3; adroit: 3e-5.", above=0)
    critic_learning_rate: float = hyperparameter(3e-4, "Learning rate of Q.", above=0)
    max_grad_norm: float | None = hyperparameter(
        5.0, "Largest norm of the gradient, for policy and critics separately [D5]. None: gradients are not clipped.", above=0
    )
    batch_size: int = hyperparameter(256, "Number of transitions in a batch.", at_least=1, at_most=MOST)
    max_q_backup: bool = hyperparameter(
        False, "Whether the target of Q takes the best of several sampled next actions instead of one [D2]. AntMaze: True."
    )
    n_backup_samples: int = hyperparameter(10, "Number of next actions sampled for max_q_backup.", at_least=1, at_most=MOST)
    n_candidates: int = hyperparameter(
        50,
        "Number of actions sampled when acting, of which Q selects one; deterministic acting uses stored noise [D7].",
        at_least=1,
        at_most=N_FIXED,
    )
    select: str = hyperparameter(
        "softmax",
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
    online_learning_rate: float = hyperparameter(3e-5, "Learning rate of the policy in `learn_online`, constant [O4].", above=0)
    online_noise: float = hyperparameter(
        0.1, "Standard deviation of the exploration noise in `learn_online`, for actions in [-1, 1] [O3].", at_least=0
    )
    online_halflife: int | None = hyperparameter(
        20_000,
        "Time in which eta doubles in `learn_online` [O2]. None: eta stays constant.",
        at_least=1,
        unit="environment steps",
    )
    reward_transform: str = hyperparameter(
        "none",
        'Transform of the rewards, of which "auto" chooses one from the data. AntMaze: "cql_antmaze". Adroit: "normalize".',
        choices=REWARD_TRANSFORMS,
    )
    normalize_obs: bool = hyperparameter(
        False, "Whether observations are normalised by the mean and standard deviation of the data."
    )
    deterministic_backup: bool = hyperparameter(False, DETERMINISTIC_BACKUP)
    q_norm: str = hyperparameter("value", Q_NORM, choices=Q_NORMS)
    cosine: bool = hyperparameter(False, COSINE)
    precondition: bool = hyperparameter(False, PRECONDITION)
    return_temperature: float | None = hyperparameter(None, RETURN_TEMPERATURE, above=0)
    returns_share: float = hyperparameter(0.0, RETURNS_SHARE, at_least=0, at_most=1)
    q_layer_norm: bool = hyperparameter(False, Q_LAYER_NORM)
    train_steps: int | None = hyperparameter(
        None,
        "Gradient steps of the training stage. None: the `default` block of zoo/diffusion_ql.yml. "
        "Paper: 2M (AntMaze, adroit: 1M).",
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_solver(self.solver, self.solver_steps, self.n_diffusion_steps)
        if self.q_norm == "spread" and not self.precondition:
            raise ValueError("q_norm='spread' needs precondition=True, which measures the spread around a clone")


class DiffusionQL(Agent):
    """A diffusion policy trained by cloning and by the gradient of Q through its denoising chain."""

    Config = DiffusionQLConfig
    config: DiffusionQLConfig
    policy: ChainPolicy
    STAGE_SHARES: ClassVar[dict[str, int]] = {"train": 2_000_000}
    POLICY_STAGE = "train"
    MODEL: ClassVar[tuple[str, ...]] = ("policy", "critic_target")
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]] = ("policy_ema", "critic")
    CALIBRATES = True
    CHOICE: ClassVar[tuple[str, ...]] = ("n_candidates", "select", "temperature", "solver", "solver_steps")
    HEALTHY: ClassVar[dict[str, str]] = {
        "q_loss": "Its gradient raises Q at the policy's actions; its level says little. It does not grow without end.",
    }

    def build(self) -> None:
        c, obs_dim, act_dim = self.config, self.obs_dim, self.act_dim
        arch = net_arch(self.policy_kwargs, {"pi": (256, 256, 256), "qf": (256, 256, 256)})
        net: nn.Module = MLPDenoiser(obs_dim, act_dim, arch["pi"])
        if c.precondition:  # [F2]
            net = PreconditionedDenoiser(net, obs_dim, act_dim, c.n_diffusion_steps)
        self.policy = ChainPolicy(net, act_dim, c.n_diffusion_steps).to(self.device)
        self.policy_ema = copy.deepcopy(self.policy).requires_grad_(False)
        self.critic = EnsembleMLP(2, obs_dim + act_dim, arch["qf"], mish, c.q_layer_norm).to(self.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        how: dict[str, Any] = {"cosine": c.cosine, "max_grad_norm": c.max_grad_norm}  # [D4] [F6]
        self.optimizers = {
            "policy": Optimizer(self.policy.parameters(), c.learning_rate, **how),
            "critic": Optimizer(self.critic.parameters(), c.critic_learning_rate, **how),
        }

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        c, opt = self.config, self.optimizers
        first = opening_steps(c.returns_share, plan or self.plan, "train", self.stage_steps)
        opening = (  # [F3]
            Update(self.return_loss, optimizers=(opt["critic"],), after=self.follow_critic, stop=first),
            Update(self.clone_loss, self.draw_policy, (opt["policy"],), stop=first, by_return=True),
        )
        updates = (
            Update(self.critic_loss, self.draw_critic, (opt["critic"],), self.follow_critic, start=first),
            Update(self.policy_loss, self.draw_policy, (opt["policy"],), start=first, by_return=True),
            Update(after=self.follow_policy, every=c.ema_every, start=c.ema_start),  # [D6]
        )
        if first == 0:
            return [Stage("train", c.batch_size, updates)]
        return [Stage("train", c.batch_size, opening + updates, lambda sampler, _: sampler.with_returns(c.gamma))]

    def online_stage(self) -> Stage:
        updates = tuple(dataclasses.replace(update, start=0) for update in self.stages()[0].updates[-3:])
        return Stage("online", self.config.batch_size, updates)  # [O1] [O4]

    # ---- critic ----------------------------------------------------------------------------------------------------
    def draw_critic(self, n: int, generator: torch.Generator) -> Noise:
        each = self.config.n_backup_samples if self.config.max_q_backup else 1
        if self.config.deterministic_backup:  # [F4]
            return {"noises": torch.zeros(self.config.n_diffusion_steps + 1, n * each, self.act_dim, device=self.device)}
        return {"noises": self.policy.noises((n * each,), generator)}

    def critic_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Eq. (4): MSE_1 + MSE_2 against the minimum of the target critics at an action of the policy's EMA."""
        c = self.config
        with torch.no_grad():
            each = c.n_backup_samples if c.max_q_backup else 1  # [D2]
            next_obs = batch.next_obs.repeat_interleave(each, dim=0)
            next_act = self.policy_ema.sample(next_obs, noise["noises"])
            next_q = self.critic_target(torch.cat([next_obs, next_act], -1))  # (2, B * each)
            next_v = next_q.view(2, -1, each).amax(-1).amin(0)  # (B,)
            target = td_target(batch.rew, batch.done, next_v, c.gamma, batch.extras.get("floor"))
        q = self.critic(torch.cat([batch.obs, batch.act], -1))  # (2, B)
        loss = (q - target).square().mean(-1).sum()
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean()}

    def return_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """MSE_1 + MSE_2 against the returns of the data [F3]."""
        return return_loss(self.critic, batch)

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
        (clone_loss, metrics), q_loss = self.clone_loss(batch, noise), self.q_loss(batch, noise)
        loss = clone_loss + self.config.eta * self.state.constraint_relaxation * q_loss
        return loss, {"policy_loss": loss.detach(), **metrics, "q_loss": q_loss.detach()}

    def clone_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """L_d, and the losses of the clone if there is one [F2] [F3]."""
        loss = self.bc_loss(batch, noise)
        metrics = {"bc_loss": loss.detach()}
        return add_clone_loss(self.policy.net, batch, loss, metrics) if self.config.precondition else (loss, metrics)

    def bc_loss(self, batch: Batch, noise: Noise) -> Tensor:
        """Eq. (2): the error of the predicted noise in the data's actions [D3]."""
        a_i = self.policy.perturbed(batch.act, noise["eps"], noise["i"])
        return F.mse_loss(self.policy.net(a_i, batch.obs, noise["i"]), noise["eps"])

    def q_loss(self, batch: Batch, noise: Noise) -> Tensor:
        """L_q: minus one critic at the policy's actions, in units of the other critic's mean size there [D1]."""
        a0 = self.policy.sample(batch.obs, noise["noises"])
        if self.config.q_norm == "spread":  # [F5]
            return gradient_ascent_loss(
                lambda a: self.critic(torch.cat([batch.obs, a], -1)).mean(0), a0, clone_variance(self.policy.net)
            )
        q1, q2 = self.critic(torch.cat([batch.obs, a0], -1))  # (B,) each; already updated in this step
        return normalized_q_loss(q1, q2, noise["coin"])

    def follow_policy(self) -> None:
        polyak_update_(self.policy_ema.parameters(), self.policy.parameters(), self.config.ema_tau)

    # ---- acting ----------------------------------------------------------------------------------------------------
    def draw_act(self, n: int, deterministic: bool, config: DiffusionQLConfig, generator: torch.Generator) -> Noise:
        n_candidates = 1 if config.select == "first" else config.n_candidates
        return self.policy.draw_candidates(n, n_candidates, deterministic, generator)

    def act(self, obs: Tensor, noise: Noise, config: DiffusionQLConfig) -> Tensor:
        """(B, S) -> (B, A): candidates of the policy, one of them selected by min Qbar [D7].

        If deterministic, the candidates come from the stored noise and argmax selects ("first" still takes the first).
        """
        c = config
        actions = self.policy.candidates(obs, noise["noises"], config)  # (B, n, A)
        if actions.shape[1] == 1:
            return actions[:, 0]
        q = self.critic_target.on_parts(obs[:, None], actions).amin(0)  # (B, n)
        return select_action(actions, q, c.select, c.temperature, noise.get("gumbel"))

    @classmethod
    def from_official(cls, actor: Any, critic: Any, **kwargs: Any) -> "DiffusionQL":
        """Load the authors' files. They contain no target networks and no EMA: these start as copies, with one warning.

        Args:
            actor: Path or state dict of `actor_<n>.pth`.
            critic: Path or state dict of `critic_<n>.pth`.
            **kwargs: Arguments of the constructor, whose `preset` is None by default here.

        Raises:
            FileNotFoundError: If a file does not exist.
            ValueError: If a file does not contain the expected network.
        """
        from diffagents.storage.official_checkpoints import chain_from_official

        return chain_from_official(cls, actor, critic, **kwargs)
