"""QGPO: Contrastive Energy Prediction for Exact Energy-Guided Diffusion Sampling.   Lu et al., ICML 2023, arXiv:2304.12824.

Order      behavior; critic on it; energy on both. No policy network is trained; actions come from guided sampling.
Target     pi(a|s) ~ mu(a|s) exp(beta Q(s, a))
Score      grad log pi_t(a_t|s) = grad log mu_t(a_t|s) + s_g grad_a f(a_t, s, t); exact for s_g = 1 and
           f = log E_mu[ exp(beta Q(s, a)) | a_t ] + any function of s and t
Support    a_1 .. a_M ~ mu(.|s), M actions for every state of the data, sampled once
Critic     y = r + gamma (1 - d) sum_i softmax_i(beta_q Qbar(s', a'_i)) Qbar(s', a'_i);   loss = (MSE_1 + MSE_2) / 2
Energy     L = - E[ sum_i softmax_i(beta Qbar(s, a_i)) log softmax_i f(a_i,t, s, t) ],   a_i,t = alpha_t a_i + sigma_t eps_i
Symbols    mu -> behavior, Q -> critic, Qbar -> critic_target (minimum of the two), f -> energy, s_g -> guidance_scale
The paper's text was not available: this follows its official code (thu-ml/CEP-energy-guided-diffusion), and the equations
carry no numbers.
Details
  [D1] Stages run one after the other. The official code trains energy and critic together from the first step on and stops the
       critic half-way; our energy is trained with the finished critic only.
  [D2] Sampling the support costs M x `solver_steps` network calls per state, at s' for the critic and at s for the energy, and
       M x A floats of memory per state: with the paper's sizes 20 ms per state for each of the two on one CPU core, and
       hours for a million states.
       `n_support_states` transitions are drawn once, and training uses these alone; None takes all, as do the paper and
       `preset="paper"`.
       The support actions are not saved but recomputed when a stage is resumed, from the same random numbers.
  [D3] t ~ U(0.001, 1) everywhere; the M actions of a state share one.
  [D4] `energy_loss`, for the paper's ablations: "mse" regresses beta Qbar at the data's actions, "emse" its exponential,
       relative to the best of the support and with the exponent clipped to [-100, 4.5]. Only "cep" is exact.
  [D5] beta and beta_q are in units of 1 / Q, and so depend on the reward transform. None: beta_q = beta.
  [D6] guidance_scale is swept at evaluation in the official code (locomotion 0 to 10, AntMaze 1 to 4); the value for each task
       is not published. `predict(obs, guidance_scale=...)` does the same.
  [D7] DPM-Solver++, order 2. Support actions are not clipped; the final action is (the official code leaves that to the
       environment).
  [D8] The batch of the behaviour stage is 4096 in the official code and in `preset="paper"`. Ours is 256, for CPUs.
  [D9] The official loader iterates over shuffled epochs; we sample uniformly with replacement, as everywhere in this library.
Online (our design; neither the paper nor the official code has one)
  [O1] Behaviour, critic and energy are trained jointly, on `n_online_states` transitions drawn from old and new data every 1000
       environment steps, with support actions from the behaviour model at that time.
  [O2] It acts as offline [D7]: one guided sample from random noise. No constraint is relaxed, because mu also models the
       policy's actions.
Fast recipe (`preset="fast"`, one setting for all datasets; our design, off in a plain config)
  [F1] `return_temperature`: the policy learns from episodes drawn by their return, the critic from half of these and half of
       all (Hong et al. 2023, arXiv:2306.13085).
  [F2] `precondition`: the noise predictor is a correction to that of a Gaussian around a clone (networks/preconditioned.py).
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffagents.agent import Agent
from diffagents.config.checks import MOST, net_arch
from diffagents.config.hyperparameters import Hyperparameters, hyperparameter
from diffagents.config.recipe import COSINE, DETERMINISTIC, PRECONDITION, Q_LAYER_NORM, RETURN_TEMPERATURE
from diffagents.data.normalize import REWARD_TRANSFORMS
from diffagents.data.replay_buffer import Mixture
from diffagents.data.sampler import Sampler
from diffagents.diffusion.sde import SolverStep, dpm_solve, dpm_solver_steps, vp_alpha_sigma
from diffagents.functional import action_gradient, perturb, polyak_update_, td_target
from diffagents.networks.mlp import MLP, EnsembleMLP
from diffagents.networks.preconditioned import PreconditionedDenoiser, add_clone_loss
from diffagents.networks.score_model import FourierTime, UNetDenoiser, VPBehavior
from diffagents.training.plan import Plan
from diffagents.training.updates import Noise, Optimizer, Stage, Update
from diffagents.types import Batch, Metrics

ENERGY_LOSSES = ("cep", "mse", "emse")


@dataclass(frozen=True)
class QGPOConfig(Hyperparameters):
    """Hyperparameters of QGPO.

    The defaults are the official code's for locomotion except for [D8]; values for each task are rows of zoo/qgpo.yml.
    """

    beta: float = hyperparameter(
        3.0, "Inverse temperature, in units of 1 / Q: large follows Q, small stays close to the data [D5].", above=0
    )
    beta_q: float | None = hyperparameter(
        None,
        "Inverse temperature inside the critic's target: 0 averages over the support [D5]. None: equal to beta.",
        at_least=0,
    )
    n_support: int = hyperparameter(
        16, "Number M of support actions per state, sampled from the behaviour model. AntMaze: 32.", at_least=1, at_most=MOST
    )
    n_support_states: int | None = hyperparameter(
        20_000, "Number of transitions for which support actions are sampled [D2]. None: all of them.", at_least=1, at_most=MOST
    )
    n_online_states: int = hyperparameter(
        1000,
        "Number of transitions for which support actions are sampled in `learn_online`, every 1000 environment steps [O1].",
        at_least=1,
        at_most=MOST,
    )
    energy_loss: str = hyperparameter("cep", 'Loss of the energy model; only "cep" is exact [D4].', choices=ENERGY_LOSSES)
    guidance_scale: float = hyperparameter(
        1.0, "Scale s_g of the guidance when acting: 0 recovers the behaviour policy [D6].", at_least=0
    )
    solver_steps: int = hyperparameter(15, "Network evaluations for each sampled action.", at_least=1, at_most=1000)
    deterministic: bool = hyperparameter(False, DETERMINISTIC)
    gamma: float = hyperparameter(0.99, "Discount factor of future rewards.", at_least=0, below=1)
    tau: float = hyperparameter(
        0.005, "Soft update (Polyak) coefficient of the target network of Q, at every critic update.", above=0, at_most=1
    )
    learning_rate: float = hyperparameter(3e-4, "Learning rate of the critic and of the energy model.", above=0)
    behavior_learning_rate: float = hyperparameter(1e-4, "Learning rate of the behaviour model.", above=0)
    batch_size: int = hyperparameter(
        256, "Number of transitions in a batch of the critic and energy stages.", at_least=1, at_most=MOST
    )
    behavior_batch_size: int = hyperparameter(
        256, "Number of transitions in a batch of the behaviour stage [D8].", at_least=1, at_most=MOST
    )
    reward_transform: str = hyperparameter(
        "auto",
        'Transform of the rewards, of which "auto" chooses one from the data. '
        'Locomotion: "iql_locomotion". AntMaze: "iql_antmaze".',
        choices=REWARD_TRANSFORMS,
    )
    normalize_obs: bool = hyperparameter(
        False, "Whether observations are normalised by the mean and standard deviation of the data."
    )
    cosine: bool = hyperparameter(False, COSINE)
    precondition: bool = hyperparameter(False, PRECONDITION)
    return_temperature: float | None = hyperparameter(None, RETURN_TEMPERATURE, above=0)
    q_layer_norm: bool = hyperparameter(False, Q_LAYER_NORM)
    behavior_steps: int | None = hyperparameter(
        None, "Gradient steps of the behaviour stage. None: the `default` block of zoo/qgpo.yml. Paper: 600k.", at_least=0
    )
    critic_steps: int | None = hyperparameter(
        None, "Gradient steps of the critic stage. None: the `default` block of zoo/qgpo.yml. Paper: 500k.", at_least=0
    )
    energy_steps: int | None = hyperparameter(
        None, "Gradient steps of the energy stage. None: the `default` block of zoo/qgpo.yml. Paper: 1M.", at_least=0
    )


class Energy(nn.Module):
    """f(a_t, s, t): MLP with SiLU on [a_t, time, s]. `GuidanceQt` in the official code."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.time = FourierTime()
        self.net = MLP(act_dim + FourierTime.DIM + obs_dim, hidden, 1, nn.SiLU)

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        """`a_t` (..., A) -> (...,); `obs` (..., S) and `t` (...,) broadcast against it."""
        lead = a_t.shape[:-1]
        out: Tensor = self.net(torch.cat([a_t, self.time(t).expand(*lead, -1), obs.expand(*lead, -1)], -1))
        return out.squeeze(-1)


class QGPO(Agent):
    """A diffusion model of the data, guided during sampling by a learned energy: the policy mu exp(beta Q)."""

    Config = QGPOConfig
    config: QGPOConfig
    STAGE_SHARES: ClassVar[dict[str, int]] = {"behavior": 600_000, "critic": 500_000, "energy": 1_000_000}
    POLICY_STAGE = "energy"
    MODEL: ClassVar[tuple[str, ...]] = ("behavior", "energy")
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]] = ("critic", "critic_target")
    CHOICE: ClassVar[tuple[str, ...]] = ("guidance_scale", "solver_steps")
    HEALTHY: ClassVar[dict[str, str]] = {
        "energy_loss": "It falls at first and then hardly changes. It does not reach 0: noise hides part of the action.",
    }

    def build(self) -> None:
        c, obs_dim, act_dim = self.config, self.obs_dim, self.act_dim
        arch = net_arch(self.policy_kwargs, {"qf": (256,) * 3, "energy": (256,) * 4}, extra={"behavior_width": 512})
        net: nn.Module = UNetDenoiser(obs_dim, act_dim, arch["behavior_width"])
        if c.precondition:  # [F2]
            net = PreconditionedDenoiser(net, obs_dim, act_dim)
        self.behavior = VPBehavior(net, act_dim).to(self.device)
        self.critic = EnsembleMLP(2, obs_dim + act_dim, arch["qf"], layer_norm=c.q_layer_norm).to(self.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.energy = Energy(obs_dim, act_dim, arch["energy"]).to(self.device)
        self.optimizers = {
            "behavior": Optimizer(self.behavior.parameters(), c.behavior_learning_rate, cosine=c.cosine),
            "critic": Optimizer(self.critic.parameters(), c.learning_rate, cosine=c.cosine),
            "energy": Optimizer(self.energy.parameters(), c.learning_rate, cosine=c.cosine),
        }

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        c, opt = self.config, self.optimizers
        behavior = Update(self.behavior_loss, self.draw_behavior, (opt["behavior"],), by_return=True)
        critic = Update(self.critic_loss, optimizers=(opt["critic"],), after=self.follow_critic)
        energy = Update(self.energy_loss, self.draw_energy, (opt["energy"],))
        return [
            Stage("behavior", c.behavior_batch_size, (behavior,)),
            Stage("critic", c.batch_size, (critic,), self.prepare_critic, c.n_support_states),
            Stage("energy", c.batch_size, (energy,), self.prepare_energy, c.n_support_states),
        ]

    def online_stage(self) -> Stage:
        (behavior,), (critic,), (energy,) = (stage.updates for stage in self.stages())
        critic = dataclasses.replace(critic, loss=self.next_critic_loss)
        return Stage("online", self.config.batch_size, (behavior, critic, energy), self.prepare_online)

    def prepare_online(self, mixture: Mixture, generator: torch.Generator) -> Sampler:
        """Some transitions with actions of the behaviour model at s and at s' as extras [O1]."""
        b = mixture.sample(self.config.n_online_states, generator)
        matrix = torch.cat([b.obs, b.act, b.rew[:, None], b.done[:, None], b.next_obs], 1)
        actions, next_actions = (self._support(None, obs, generator) for obs in (b.obs, b.next_obs))
        return Sampler(matrix, self.obs_dim, self.act_dim).with_extras(actions=actions, next_actions=next_actions)

    def next_critic_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """`critic_loss` online, where the extras also contain support actions at s."""
        return self.critic_loss(batch._replace(extras={"actions": batch.extras["next_actions"]}), noise)

    # ---- stage 1: behaviour ----------------------------------------------------------------------------------------
    def draw_behavior(self, n: int, generator: torch.Generator) -> Noise:
        kwargs: dict[str, Any] = {"generator": generator, "device": self.device}
        return {"u": torch.rand(n, **kwargs), "eps": torch.randn(n, self.act_dim, **kwargs)}

    def behavior_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        loss = self.behavior.loss(batch.act, batch.obs, 1e-3 + (1.0 - 1e-3) * noise["u"], noise["eps"])  # [D3]
        return add_clone_loss(self.behavior.net, batch, loss, {"behavior_loss": loss.detach()})  # [F2]

    # ---- stage 2: critic -------------------------------------------------------------------------------------------
    def prepare_critic(self, sampler: Sampler, generator: torch.Generator) -> Sampler:
        """Adds actions of the behaviour model at s' to each transition [D2]."""
        sampler = self._with_support(sampler, generator)
        return sampler.with_extras(actions=self._support("critic", sampler.next_obs, generator))

    def critic_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The mean of the two squared errors; the target stays within the support of the data."""
        c = self.config
        with torch.no_grad():
            q = self.min_target_q(batch.next_obs[:, None], batch.extras["actions"])  # (B, M)
            beta = c.beta if c.beta_q is None else c.beta_q  # [D5]
            target = td_target(batch.rew, batch.done, (torch.softmax(beta * q, -1) * q).sum(-1), c.gamma)
        q = self.critic(torch.cat([batch.obs, batch.act], -1))  # (2, B)
        loss = (q - target).square().mean()
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean()}

    def follow_critic(self) -> None:
        polyak_update_(self.critic_target.parameters(), self.critic.parameters(), self.config.tau)

    def min_target_q(self, obs: Tensor, act: Tensor) -> Tensor:
        """Qbar, the minimum of the target critics: act (..., A), obs (..., S), which broadcasts -> (...,)."""
        return self.critic_target.on_parts(obs, act).amin(0)

    # ---- stage 3: energy -------------------------------------------------------------------------------------------
    def prepare_energy(self, sampler: Sampler, generator: torch.Generator) -> Sampler:
        if self.config.energy_loss == "mse":  # needs only the actions of the data
            return sampler
        sampler = self._with_support(sampler, generator)
        return sampler.with_extras(actions=self._support("energy", sampler.obs, generator))

    def draw_energy(self, n: int, generator: torch.Generator) -> Noise:
        kwargs: dict[str, Any] = {"generator": generator, "device": self.device}
        size = (n, self.config.n_support, self.act_dim) if self.config.energy_loss == "cep" else (n, self.act_dim)
        return {"u": torch.rand(n, **kwargs), "eps": torch.randn(size, **kwargs)}

    def energy_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The loss that the hyperparameter of the same name, `config.energy_loss`, selects, and its metric."""
        loss = self.prediction_loss(batch, noise)
        return loss, {"energy_loss": loss.detach()}

    def prediction_loss(self, batch: Batch, noise: Noise) -> Tensor:
        """Cross-entropy of softmax(f) against softmax(beta Qbar) over the support; or the regression ablations [D4]."""
        c = self.config
        t = 1e-3 + (1.0 - 1e-3) * noise["u"]  # (B,) [D3]
        alpha, sigma = vp_alpha_sigma(t)
        if c.energy_loss == "cep":
            a, obs = batch.extras["actions"], batch.obs[:, None]  # (B, M, A), (B, 1, S)
            with torch.no_grad():
                weights = torch.softmax(c.beta * self.min_target_q(obs, a), -1)  # (B, M)
            f = self.energy(perturb(a, noise["eps"], alpha[:, None], sigma[:, None]), obs, t[:, None])  # (B, M)
            return F.cross_entropy(f, weights)
        f = self.energy(perturb(batch.act, noise["eps"], alpha, sigma), batch.obs, t)  # (B,)
        with torch.no_grad():
            target = self.min_target_q(batch.obs, batch.act)
            if c.energy_loss == "emse":
                target = target - self.min_target_q(batch.obs[:, None], batch.extras["actions"]).amax(-1)
        if c.energy_loss == "mse":
            return F.mse_loss(f, c.beta * target)
        return F.mse_loss(f.clamp(-100.0, 4.5).exp(), (c.beta * target).clamp(-100.0, 4.5).exp())

    # ---- acting, and the support -----------------------------------------------------------------------------------
    def draw_act(self, n: int, deterministic: bool, config: QGPOConfig, generator: torch.Generator) -> Noise:
        return {"eps": self.behavior.noise(n, 1, deterministic, generator)}

    def act(self, obs: Tensor, noise: Noise, config: QGPOConfig) -> Tensor:
        """(B, S) -> (B, A): one guided sample [D7]; if deterministic, it starts from the stored noise."""
        sample = self.guided_sample(obs, noise["eps"], config.guidance_scale, self._solver(config.solver_steps))
        return sample[:, 0].clamp(-1.0, 1.0)

    def guided_sample(self, obs: Tensor, noise: Tensor, scale: float, steps: tuple[SolverStep, ...]) -> Tensor:
        """a ~ mu(.|s) exp(f) from x_1 = `noise` (B or 1, M, A) for obs (B, S): (B, M, A), not clipped.

        The noise that corresponds to the guided score is eps - sigma_t s_g grad_a f.
        """
        obs = obs[:, None]

        def guided_eps(a: Tensor, t: Tensor) -> Tensor:
            _, sigma = vp_alpha_sigma(t)
            gradient = action_gradient(lambda x: self.energy(x, obs, t), a)
            out: Tensor = self.behavior.net(a, obs, t) - scale * sigma[..., None] * gradient
            return out

        return dpm_solve(guided_eps, noise.expand(obs.shape[0], -1, -1), steps)

    @staticmethod
    def _solver(n_evals: int) -> tuple[SolverStep, ...]:
        return dpm_solver_steps(n_evals, order=2, data_prediction=True)

    def _with_support(self, sampler: Sampler, generator: torch.Generator) -> Sampler:
        """The transitions on which a stage is trained: all, or some drawn once."""
        n = self.config.n_support_states
        if n is None or n >= len(sampler):
            return sampler
        rows = torch.randperm(len(sampler), generator=generator, device=self.device)[:n]
        return Sampler(sampler.matrix[rows], sampler.obs_dim, sampler.act_dim)

    def _support(self, stage: str | None, obs: Tensor, generator: torch.Generator) -> Tensor:
        """M actions of the behaviour model for each of obs (N, S): (N, M, A)."""
        c = self.config
        actions = torch.empty(len(obs), c.n_support, self.act_dim, device=self.device)
        name = stage if self.verbose else None
        for rows, some in self.behavior.support(obs, c.n_support, self._solver(c.solver_steps), generator, name):
            actions[rows] = some
        return actions
