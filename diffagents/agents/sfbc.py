"""SfBC: Offline RL via High-Fidelity Generative Behavior Modeling ("selecting from behavior candidates").

Chen et al., ICLR 2023, arXiv:2209.14548.

Order      behavior; critic on the data's returns; planning: refit the critic on returns improved by the previous critic
Policy     pi(a|s) ~ mu(a|s) exp(alpha Q(s, a)), by resampling candidates of mu: it needs no network of its own
Critic     Q(s_n, a_n) -> R_n, regression.   Round 0: R_n = r_n + gamma R_n+1, the Monte-Carlo return
Planning   round k: R_n = max( r_n + gamma R_n+1, V(s_n) ), backwards through each trajectory, R = 0 after its end;
           V(s) = sum_i softmax_i(alpha Q(s, a_i)) Q(s, a_i),   a_1 .. a_M ~ mu(.|s),   Q of the previous round
Symbols    mu -> behavior, Q -> critic, Q of the previous round -> critic_before
The paper's text was not available: this follows its official code (ChenDRAG/SfBC), and the equations carry no numbers.
Details
  [D1] Q is fitted to standardised returns, (R - mean) / max(std, 0.1), and alpha and temperature act on those; mean and std are
       recomputed in each round.
  [D2] Time-outs are treated as terminations (no bootstrapping).
  [D3] Each planning round begins with the critic's initial weights and a new optimiser. Two rounds in all (K = 2) are the
       stages `critic` and `planning`; `learn(data, stages=("planning",), reset_num_timesteps=False)` is one more.
  [D4] V costs M x `solver_steps` network calls per state: with the paper's sizes 20 ms on one CPU core, hours for a million
       states. With `n_support_states`, V is computed at that many random states only, and the maximum in R skips the others;
       None takes all, as do the paper and `preset="paper"`. V is not saved but recomputed when a stage is resumed, from
       the same random numbers.
  [D5] t ~ U(0.00001, 1). DPM-Solver, order 3. Candidates are not clipped; the final action is (the official code leaves that to
       the environment).
  [D6] Acting: 32 candidates, `average_top` of them drawn without replacement by softmax(Q / 0.01), and averaged: 4 on
       locomotion, 1 elsewhere. The official code caps Q at 40 temperatures above the 4th best before it draws, for numerical
       reasons only: the same candidates are drawn, except with a probability of about e^-40.
  [D7] Batches are 4096 in the official code and in `preset="paper"`. Ours are 256, for CPUs.
  [D8] The official loader iterates over shuffled epochs; we sample uniformly with replacement, as everywhere in this library.
       It also drops AntMaze trajectories of fewer than 5 steps.
Online (our design; neither the paper nor the official code has one)
  [O1] Behaviour and critic are trained jointly on old and new data. The critic is fitted to Monte-Carlo returns of complete
       episodes, recomputed every 1000 environment steps and standardised as in the last fit. So mu models the policy's actions
       and the critic their returns, and both improve the policy further. There is no planning.
  [O2] It acts as offline: random candidates, resampled by Q. No constraint is relaxed.
Fast recipe (`preset="fast"`, one setting for all datasets; our design, off in a plain config)
  [F1] `return_temperature`: the policy learns from episodes drawn by their return, the critic from half of these and half of
       all (Hong et al. 2023, arXiv:2306.13085).
  [F2] `precondition`: the noise predictor is a correction to that of a Gaussian around a clone (networks/preconditioned.py).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffagents.agent import Agent
from diffagents.config.checks import MOST, N_FIXED, net_arch
from diffagents.config.hyperparameters import Hyperparameters, hyperparameter
from diffagents.config.recipe import COSINE, DETERMINISTIC, PRECONDITION, RETURN_TEMPERATURE
from diffagents.data.normalize import REWARD_TRANSFORMS
from diffagents.data.replay_buffer import Mixture
from diffagents.data.sampler import Sampler
from diffagents.diffusion.sde import SolverStep, dpm_solver_steps
from diffagents.functional import gumbel
from diffagents.networks.critics import ReturnCritic
from diffagents.networks.preconditioned import PreconditionedDenoiser, add_clone_loss
from diffagents.networks.score_model import UNetDenoiser, VPBehavior
from diffagents.training.plan import Plan
from diffagents.training.updates import Noise, Optimizer, Stage, Update
from diffagents.types import Batch, Metrics


@dataclass(frozen=True)
class SfBCConfig(Hyperparameters):
    """Hyperparameters of SfBC.

    The defaults are the official code's except for [D7]; values for each task are rows of zoo/sfbc.yml.
    """

    alpha: float = hyperparameter(
        20.0,
        "Inverse temperature of V in planning, per standard deviation of the return: 0 averages over the support [D1].",
        at_least=0,
    )
    n_support: int = hyperparameter(
        16, "Number M of the behaviour model's actions from which V is computed at a state.", at_least=1, at_most=MOST
    )
    n_support_states: int | None = hyperparameter(
        20_000, "Number of states at which V is computed [D4]. None: all of them.", at_least=1, at_most=MOST
    )
    n_candidates: int = hyperparameter(
        32,
        "Number of actions sampled when acting, some of which Q selects; deterministic acting uses stored noise [D6].",
        at_least=1,
        at_most=N_FIXED,
    )
    temperature: float = hyperparameter(
        0.01, "Softmax temperature of the resampling, in standard deviations of the return [D1].", above=0
    )
    average_top: int = hyperparameter(
        1, "Number of resampled candidates that are averaged to the action, at most all of them. Locomotion: 4.", at_least=1
    )
    solver_steps: int = hyperparameter(15, "Network evaluations for each sampled action.", at_least=1, at_most=1000)
    deterministic: bool = hyperparameter(False, DETERMINISTIC)
    gamma: float = hyperparameter(0.99, "Discount factor of future rewards.", at_least=0, below=1)
    learning_rate: float = hyperparameter(1e-4, "Learning rate of the behaviour model.", above=0)
    critic_learning_rate: float = hyperparameter(1e-3, "Learning rate of the critic.", above=0)
    batch_size: int = hyperparameter(
        256, "Number of transitions in a batch of the critic and planning stages [D7].", at_least=1, at_most=MOST
    )
    behavior_batch_size: int = hyperparameter(
        256, "Number of transitions in a batch of the behaviour stage [D7].", at_least=1, at_most=MOST
    )
    reward_transform: str = hyperparameter(
        "none",
        'Transform of the rewards, of which "auto" chooses one from the data. '
        '"none" on every task, because returns are standardised [D1].',
        choices=REWARD_TRANSFORMS,
    )
    normalize_obs: bool = hyperparameter(
        False, "Whether observations are normalised by the mean and standard deviation of the data."
    )
    cosine: bool = hyperparameter(False, COSINE)
    precondition: bool = hyperparameter(False, PRECONDITION)
    return_temperature: float | None = hyperparameter(None, RETURN_TEMPERATURE, above=0)
    behavior_steps: int | None = hyperparameter(
        None, "Gradient steps of the behaviour stage. None: the `default` block of zoo/sfbc.yml. Paper: 586k.", at_least=0
    )
    critic_steps: int | None = hyperparameter(
        None, "Gradient steps of the critic stage. None: the `default` block of zoo/sfbc.yml. Paper: 24.5k.", at_least=0
    )
    planning_steps: int | None = hyperparameter(
        None, "Gradient steps of the planning stage. None: the `default` block of zoo/sfbc.yml. Paper: 24.5k.", at_least=0
    )


class SfBC(Agent):
    """Candidates of a diffusion model of the data, selected by a critic of planned returns."""

    Config = SfBCConfig
    config: SfBCConfig
    STAGE_SHARES: ClassVar[dict[str, int]] = {"behavior": 586_200, "critic": 24_500, "planning": 24_500}
    POLICY_STAGE = "critic"
    MODEL: ClassVar[tuple[str, ...]] = ("behavior", "critic")
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]] = ("critic_before",)
    CHOICE: ClassVar[tuple[str, ...]] = ("n_candidates", "temperature", "average_top", "solver_steps")

    def build(self) -> None:
        c, obs_dim, act_dim = self.config, self.obs_dim, self.act_dim
        arch = net_arch(self.policy_kwargs, {"qf": (256, 256)}, extra={"behavior_width": 512})
        net: nn.Module = UNetDenoiser(obs_dim, act_dim, arch["behavior_width"])
        if c.precondition:  # [F2]
            net = PreconditionedDenoiser(net, obs_dim, act_dim)
        self.behavior = VPBehavior(net, act_dim).to(self.device)
        self.critic = ReturnCritic(obs_dim, act_dim, arch["qf"]).to(self.device)
        self.critic_before = ReturnCritic(obs_dim, act_dim, arch["qf"]).to(self.device).requires_grad_(False)
        self.initial_weights = {name: value.clone() for name, value in self.critic.net.state_dict().items()}  # [D3]
        self.optimizers = {
            "behavior": Optimizer(self.behavior.parameters(), c.learning_rate, cosine=c.cosine),
            "critic": Optimizer(self.critic.parameters(), c.critic_learning_rate, cosine=c.cosine),
        }

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        c, opt = self.config, self.optimizers
        behavior = Update(self.behavior_loss, self.draw_behavior, (opt["behavior"],), by_return=True)
        critic = Update(self.critic_loss, optimizers=(opt["critic"],))
        return [
            Stage("behavior", c.behavior_batch_size, (behavior,)),
            Stage("critic", c.batch_size, (critic,), self.prepare_critic),
            Stage("planning", c.batch_size, (critic,), self.prepare_planning, c.n_support_states),
        ]

    def online_stage(self) -> Stage:
        updates = tuple(update for stage in self.stages()[:2] for update in stage.updates)
        return Stage("online", self.config.batch_size, updates, self.prepare_online)

    def prepare_online(self, mixture: Mixture, generator: torch.Generator) -> Mixture | None:
        """Standardised returns of all complete episodes [O1]; None if there are no complete episodes."""
        mixture = mixture.in_episodes(whole=True)
        if not mixture.sides:
            return None
        returns = [planned_returns(side, self.config.gamma) for side in mixture.sides]
        if self.state.pristine:  # nothing has been fitted yet
            self._targets(torch.cat(returns))
        mean, std = self.critic.mean, self.critic.std
        return mixture.with_extras(targets=[(some.float().to(self.device) - mean) / std for some in returns])

    # ---- stage 1: behaviour ----------------------------------------------------------------------------------------
    def draw_behavior(self, n: int, generator: torch.Generator) -> Noise:
        kwargs: dict[str, Any] = {"generator": generator, "device": self.device}
        return {"u": torch.rand(n, **kwargs), "eps": torch.randn(n, self.act_dim, **kwargs)}

    def behavior_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        loss = self.behavior.loss(batch.act, batch.obs, 1e-5 + (1.0 - 1e-5) * noise["u"], noise["eps"])  # [D5]
        return add_clone_loss(self.behavior.net, batch, loss, {"behavior_loss": loss.detach()})  # [F2]

    # ---- stages 2 and 3: critic, planning --------------------------------------------------------------------------
    def prepare_critic(self, sampler: Sampler, generator: torch.Generator) -> Sampler:
        return sampler.with_extras(targets=self._targets(planned_returns(sampler, self.config.gamma)))

    def prepare_planning(self, sampler: Sampler, generator: torch.Generator) -> Sampler:
        """At its beginning, a round copies the critic to `critic_before` and resets it; a resumed round has both already."""
        begins = self.plan is None or self.plan.done.get("planning", 0) == 0
        if begins:
            self.critic_before.load_state_dict(self.critic.state_dict())
        targets = self._targets(planned_returns(sampler, self.config.gamma, self.state_values(sampler, generator)))
        if begins:  # [D3]; last, so that an earlier interruption is harmless
            self.critic.net.load_state_dict(self.initial_weights)
            self.optimizers["critic"].state.clear()
        return sampler.with_extras(targets=targets)

    @torch.no_grad()
    def state_values(self, sampler: Sampler, generator: torch.Generator) -> Tensor:
        """V(s_n) of `critic_before` in units of reward, (N,); minus infinity where it is not computed [D4]."""
        c, critic, n = self.config, self.critic_before, self.config.n_support_states
        values = torch.full((len(sampler),), -torch.inf, device=self.device)
        rows, obs = torch.arange(len(sampler), device=self.device), sampler.obs
        if n is not None and n < len(sampler):
            rows = torch.randperm(len(sampler), generator=generator, device=self.device)[:n]
            obs = obs[rows]
        name = "planning" if self.verbose else None
        for some, actions in self.behavior.support(obs, c.n_support, self._solver(c.solver_steps), generator, name):
            q = critic(obs[some, None], actions)  # (rows, M)
            values[rows[some]] = critic.mean + critic.std * (torch.softmax(c.alpha * q, -1) * q).sum(-1)
        return values

    def _targets(self, returns: Tensor) -> Tensor:
        """The targets of the critic: `returns` (N,), standardised [D1]. The critic stores their mean and standard deviation."""
        std, mean = torch.std_mean(returns, correction=0)
        self.critic.mean.copy_(mean)
        self.critic.std.copy_(std.clamp(min=0.1))
        return ((returns - mean) / std.clamp(min=0.1)).float().to(self.device)

    def critic_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Squared error against the standardised returns; the metric q is in units of reward."""
        q = self.critic(batch.obs, batch.act)  # (B,)
        loss = F.mse_loss(q, batch.extras["targets"])
        return loss, {"critic_loss": loss.detach(), "q": self.critic.mean + self.critic.std * q.detach().mean()}

    # ---- acting ----------------------------------------------------------------------------------------------------
    def draw_act(self, n: int, deterministic: bool, config: SfBCConfig, generator: torch.Generator) -> Noise:
        noise = {"eps": self.behavior.noise(n, config.n_candidates, deterministic, generator)}
        if not deterministic:
            noise["gumbel"] = gumbel((n, config.n_candidates), generator)
        return noise

    def act(self, obs: Tensor, noise: Noise, config: SfBCConfig) -> Tensor:
        """(B, S) -> (B, A): the mean of candidates that are resampled by their Q [D6].

        If deterministic, the candidates come from the stored noise, and the best of them are taken.
        """
        c = config
        candidates = self.behavior.sample(obs, noise["eps"], self._solver(c.solver_steps))  # (B, n, A)
        scores = self.critic(obs[:, None], candidates) / c.temperature  # (B, n)
        if "gumbel" in noise:  # Gumbel-top-k: the k largest are a sample without replacement
            scores = scores + noise["gumbel"]
        best = scores.topk(min(c.average_top, c.n_candidates), -1).indices  # (B, k)
        chosen = candidates.gather(1, best[..., None].expand(-1, -1, self.act_dim))
        return chosen.mean(1).clamp(-1.0, 1.0)

    @staticmethod
    def _solver(n_evals: int) -> tuple[SolverStep, ...]:
        return dpm_solver_steps(n_evals, order=3)


def planned_returns(sampler: Sampler, gamma: float, values: Tensor | None = None) -> Tensor:
    """R_n = max(r_n + gamma R_n+1, V(s_n)) backwards through every trajectory, R = 0 after its end [D2].

    Args:
        sampler: Transitions in the order in which they happened.
        gamma: Discount factor.
        values: V, (N,); None gives the Monte-Carlo returns.

    Returns:
        The returns, (N,) float64 on the CPU.
    """
    batch = sampler.all()
    last = batch.done.cpu() > 0
    last[sampler.episode_ends[sampler.episode_ends > 0] - 1] = True
    floor = torch.full((len(sampler),), -torch.inf) if values is None else values
    rewards, ends, floors = batch.rew.tolist(), last.tolist(), floor.tolist()
    returns, follows = [0.0] * len(sampler), 0.0
    for n in reversed(range(len(sampler))):
        follows = max(rewards[n] + gamma * (0.0 if ends[n] else follows), floors[n])
        returns[n] = follows
    return torch.tensor(returns, dtype=torch.float64)
