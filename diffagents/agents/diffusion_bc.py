"""DiffusionBC: behaviour cloning with a diffusion model.   The baseline of Wang, Hunt, Zhou, ICLR 2023, arXiv:2208.06193.

Every step   L_d = E || eps - eps_theta(sqrt(abar_i) a + sqrt(1 - abar_i) eps, s, i) ||^2,  i uniform: Diffusion-QL's Eq. (2)
Acting       one sample of the chain of T steps. No critic, and rewards are never read.
Source       `--algo bc` of Diffusion-QL's official code
Details
  [D1] L_d is the mean over batch and dimensions (official code; IDQL's and SRPO's behaviour models sum over dimensions).
  [D2] `ema_tau`: the official code acts with the trained network (None). With a number (0.005, 0.001) its EMA acts, which is
       smoother. With None the EMA is kept equal to the network, so that a run with averaging can continue one without.
  [D3] Adam at 3e-4, constant and without clipping: these are the arguments of the official runner; its class defaults to 2e-4.
Online (our design: cloning alone does not improve the policy)
  [O1] It clones the data and the best of its own episodes: the share `online_top` of those that ended, by return,
       selected again every 1000 environment steps. Only here are rewards read. It acts by its own samples, and learns at
       `online_learning_rate`.
Fast recipe (`preset="fast"`; our design, off in a plain config)
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
from diffagents.config.recipe import COSINE, DETERMINISTIC, PRECONDITION
from diffagents.data.normalize import REWARD_TRANSFORMS
from diffagents.data.replay_buffer import Mixture
from diffagents.diffusion.chain import SOLVERS, check_solver
from diffagents.functional import polyak_update_
from diffagents.networks.diffusion_policy import ChainPolicy, MLPDenoiser
from diffagents.networks.preconditioned import PreconditionedDenoiser, add_clone_loss
from diffagents.training.plan import Plan
from diffagents.training.updates import Noise, Optimizer, Stage, Update
from diffagents.types import Batch, Metrics


@dataclass(frozen=True)
class DiffusionBCConfig(Hyperparameters):
    """Hyperparameters of DiffusionBC.

    The defaults are the official code's; values for each task are rows of zoo/diffusion_bc.yml.
    """

    n_diffusion_steps: int = hyperparameter(5, "Number T of denoising steps of the diffusion model.", at_least=1, at_most=MOST)
    ema_tau: float | None = hyperparameter(
        None,
        "Soft update coefficient of the moving average (EMA) of the network, which then acts, at every step [D2]. "
        "None: the network itself acts.",
        above=0,
        at_most=1,
    )
    online_learning_rate: float = hyperparameter(3e-5, "Learning rate of the policy in `learn_online`, constant [O1].", above=0)
    online_top: float = hyperparameter(
        0.25, "Share of its own episodes that it clones in `learn_online`, the best by return [O1].", above=0, at_most=1
    )
    learning_rate: float = hyperparameter(
        3e-4, "Learning rate of the policy [D3]. One AntMaze task: 1e-3; adroit: 3e-5.", above=0
    )
    batch_size: int = hyperparameter(256, "Number of transitions in a batch.", at_least=1, at_most=MOST)
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
        "none",
        'Transform of the rewards, of which "auto" chooses one from the data. '
        "It has no effect here, because cloning does not use rewards.",
        choices=REWARD_TRANSFORMS,
    )
    normalize_obs: bool = hyperparameter(
        False, "Whether observations are normalised by the mean and standard deviation of the data."
    )
    cosine: bool = hyperparameter(False, COSINE)
    precondition: bool = hyperparameter(False, PRECONDITION)
    behavior_steps: int | None = hyperparameter(
        None,
        "Gradient steps of the behaviour stage. None: the `default` block of zoo/diffusion_bc.yml. "
        "Paper: 2M (AntMaze, adroit: 1M).",
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_solver(self.solver, self.solver_steps, self.n_diffusion_steps)


class DiffusionBC(Agent):
    """A diffusion model of the data's actions, sampled once for each observation."""

    Config = DiffusionBCConfig
    config: DiffusionBCConfig
    policy: ChainPolicy
    STAGE_SHARES: ClassVar[dict[str, int]] = {"behavior": 2_000_000}
    POLICY_STAGE = "behavior"
    MODEL: ClassVar[tuple[str, ...]] = ("policy", "policy_ema")  # ema_tau, which `load` may change, decides which acts
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]] = ()
    CHOICE: ClassVar[tuple[str, ...]] = ("solver", "solver_steps")
    HEALTHY: ClassVar[dict[str, str]] = {
        "return": "It rises into the range of the data's returns. A clone seldom exceeds the best of them.",
        "bc_loss": "The error of the predicted noise falls quickly and then hardly changes. It does not reach 0.",
    }

    def build(self) -> None:
        arch = net_arch(self.policy_kwargs, {"pi": (256, 256, 256)})
        net: nn.Module = MLPDenoiser(self.obs_dim, self.act_dim, arch["pi"])
        if self.config.precondition:  # [F2]
            net = PreconditionedDenoiser(net, self.obs_dim, self.act_dim, self.config.n_diffusion_steps)
        self.policy = ChainPolicy(net, self.act_dim, self.config.n_diffusion_steps).to(self.device)
        self.policy_ema = copy.deepcopy(self.policy).requires_grad_(False)
        rate, cosine = self.config.learning_rate, self.config.cosine  # [D3]
        self.optimizers = {"policy": Optimizer(self.policy.parameters(), rate, cosine=cosine)}

    def stages(self, plan: Plan | None = None) -> list[Stage]:
        update = Update(self.bc_loss, self.draw_policy, (self.optimizers["policy"],), self.follow_policy)
        return [Stage("behavior", self.config.batch_size, (update,))]

    def online_stage(self) -> Stage:
        return dataclasses.replace(self.stages()[0], name="online", prepare=self.prepare_online)

    def prepare_online(self, mixture: Mixture, generator: torch.Generator) -> Mixture | None:
        """The data and the best of the finished episodes [O1]; None while there is neither."""
        return mixture.with_best_episodes(self.config.online_top)

    def draw_policy(self, n: int, generator: torch.Generator) -> Noise:
        kwargs: dict[str, Any] = {"generator": generator, "device": self.device}
        return {
            "i": torch.randint(self.config.n_diffusion_steps, (n,), **kwargs),
            "eps": torch.randn(n, self.act_dim, **kwargs),
        }

    def bc_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """L_d: the error of the predicted noise in the data's actions [D1]."""
        a_i = self.policy.perturbed(batch.act, noise["eps"], noise["i"])
        loss = F.mse_loss(self.policy.net(a_i, batch.obs, noise["i"]), noise["eps"])
        return add_clone_loss(self.policy.net, batch, loss, {"bc_loss": loss.detach()})  # [F2]

    def follow_policy(self) -> None:
        tau = 1.0 if self.config.ema_tau is None else self.config.ema_tau  # tau = 1 copies the weights [D2]
        polyak_update_(self.policy_ema.parameters(), self.policy.parameters(), tau)

    def draw_act(self, n: int, deterministic: bool, config: DiffusionBCConfig, generator: torch.Generator) -> Noise:
        policy = self.policy if config.ema_tau is None else self.policy_ema  # [D2]
        return policy.draw_candidates(n, 1, deterministic, generator)

    def act(self, obs: Tensor, noise: Noise, config: DiffusionBCConfig) -> Tensor:
        """(B, S) -> (B, A): one sample; if deterministic, from the stored noise, which all observations share."""
        policy = self.policy if config.ema_tau is None else self.policy_ema  # [D2]
        return policy.candidates(obs, noise["noises"], config)[:, 0]
