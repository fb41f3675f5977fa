"""A diffusion chain as a policy: its noise predictor, its sampler, and the fixed noise of its deterministic samples.

Shared by Diffusion-QL, DiffCPS, IDQL, BDPO and diffusion BC, whose samplers differ in three switches. All noise predictors
begin with a layer that is linear in [action, time, state]; `on_states` uses this to compute the contributions of states and
times once for all candidates and denoising steps.

Shapes: B batch, S observation, A action, T denoising steps, n candidates of one observation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffagents.config.checks import N_FIXED
from diffagents.diffusion.chain import SOLVERS, Chain, sample_chain, sample_ddim, vp_chain
from diffagents.functional import gumbel, perturb
from diffagents.networks.mlp import MLP, Mish, fixed_noise, sinusoids

DenoiserOnStates = Callable[[Tensor, int], Tensor]
"""A noise predictor bound to states: (a_i (..., A), step i) -> noise (..., A)."""


def bind_states(
    first: nn.Module,
    rest: Callable[[Tensor], Tensor],
    time_features: Callable[[Tensor], Tensor],
    obs: Tensor,
    n_steps: int,
    state_before_time: bool = False,
) -> DenoiserOnStates:
    """Bind a noise predictor to states, its first layer split into a product with each of action, time and state.

    Args:
        first: The first layer, a Linear on [action, time, state].
        rest: All that follows the first layer.
        time_features: Maps steps (T,) to features (T, TIME_DIM).
        obs: The states, (..., S).
        n_steps: T.
        state_before_time: Whether the first layer takes [action, state, time] instead.

    Returns:
        A function of actions (..., A) and a step in 0..T-1.
    """
    time = time_features(torch.arange(n_steps, device=obs.device))  # (T, TIME_DIM)
    assert isinstance(first, nn.Linear)
    shared = (obs.shape[-1], time.shape[-1]) if state_before_time else (time.shape[-1], obs.shape[-1])
    weights = torch.split(first.weight, [first.in_features - sum(shared), *shared], 1)
    of_act, of_state, of_time = weights if state_before_time else (weights[0], weights[2], weights[1])
    state, times = F.linear(obs, of_state, first.bias), F.linear(time, of_time)  # (..., H), (T, H)
    return lambda a, i: rest(F.linear(a, of_act) + (state + times[i]))


class MLPDenoiser(nn.Module):
    """Noise predictor eps(a_t, s, i) of Diffusion-QL, DiffCPS and diffusion BC: `MLP` in their official code.

    Time: 16 sinusoids [sin, cos], Linear 16-32, Mish, Linear 32-16. Input [a_t, time, s]; layers with Mish; Linear to A.

    Args:
        obs_dim: S.
        act_dim: A.
        hidden: Sizes of the hidden layers.
    """

    TIME_DIM = 16

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int] = (256, 256, 256)) -> None:
        super().__init__()
        self.time_mlp = MLP(self.TIME_DIM, (2 * self.TIME_DIM,), self.TIME_DIM, Mish)
        self.trunk = MLP(act_dim + self.TIME_DIM + obs_dim, hidden, act_dim, Mish)

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in noisy actions.

        Args:
            a_t: Noisy actions, (..., A).
            obs: (..., S); broadcast against the actions.
            t: Steps, counted from 0, (...,); broadcast against the actions.

        Returns:
            (..., A).
        """
        lead = a_t.shape[:-1]
        out: Tensor = self.trunk(torch.cat([a_t, self.time_features(t).expand(*lead, -1), obs.expand(*lead, -1)], -1))
        return out

    def time_features(self, t: Tensor) -> Tensor:
        """Features of steps `t` (...,): (..., TIME_DIM)."""
        time: Tensor = self.time_mlp(torch.cat(sinusoids(t, self.TIME_DIM), -1))
        return time

    def on_states(self, obs: Tensor, n_steps: int) -> DenoiserOnStates:
        """This noise predictor for the states `obs` (..., S) and a chain of `n_steps` (see `bind_states`)."""
        return bind_states(self.trunk[0], self.trunk.rest, self.time_features, obs, n_steps)


class ChainPolicy(nn.Module):
    """The policy pi(a|s) by T denoising steps of a noise predictor.

    Args:
        net: The noise predictor: net(a, obs, i), with a method `on_states` such as `MLPDenoiser.on_states`.
        act_dim: A.
        n_steps: T.
        std: Standard deviations of the steps: "posterior" (Diffusion-QL, DiffCPS) or "beta" (IDQL, BDPO).
        clip_x0: As in `diffusion.chain.sample_chain`.
        clip_x: As in `diffusion.chain.sample_chain`.

    Attributes:
        fixed_noise: The noise of deterministic samples, (N_FIXED, T + 1, A), saved with the policy.
    """

    fixed_noise: Tensor

    def __init__(
        self,
        net: nn.Module,
        act_dim: int,
        n_steps: int,
        *,
        std: str = "posterior",
        clip_x0: bool = True,
        clip_x: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.act_dim, self.n_steps = net, act_dim, n_steps
        self.std, self.clip_x0, self.clip_x = std, clip_x0, clip_x
        for name, value in vp_chain(n_steps)._asdict().items():
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("fixed_noise", fixed_noise(N_FIXED, n_steps + 1, act_dim))

    @property
    def chain(self) -> Chain:
        """The chain's constants, on the policy's device."""
        return Chain(*(getattr(self, name) for name in Chain._fields))

    def noises(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normal noise for `sample`, for samples of `shape`: (T + 1, *shape, A)."""
        return torch.randn((self.n_steps + 1, *shape, self.act_dim), generator=generator, device=generator.device)

    def on_states(self, obs: Tensor) -> DenoiserOnStates:
        """The noise predictor bound to obs (..., S): a function of actions (..., A) and a step in 0..T-1."""
        eps: DenoiserOnStates = self.net.on_states(obs, self.n_steps)  # type: ignore[operator]
        return eps

    def sample(
        self, obs: Tensor, noises: Tensor, noise_scale: float = 1.0, solver: str = "ddpm", n_steps: int | None = None
    ) -> Tensor:
        """Sample a ~ pi(.|s). Gradients flow through all steps.

        Args:
            obs: (..., S).
            noises: From `noises`, (T + 1, ..., A).
            noise_scale: Factor of all noise but the first of "ddpm"; of "ddim", factor of x_T.
            solver: "ddpm", the chain itself, or "ddim", which uses noises[0] alone.
            n_steps: Steps of "ddim", from 1 to T; default: T.

        Returns:
            Actions, (..., A).
        """
        if solver == "ddim":
            steps, clips = n_steps or self.n_steps, {"clip_x0": self.clip_x0, "clip_x": self.clip_x}
            return sample_ddim(self.on_states(obs), self.chain, noises[0] * noise_scale, steps, **clips)
        if solver != "ddpm":
            raise ValueError(f"solver={solver!r} is not implemented here; there are {', '.join(SOLVERS)}")
        std = (self.chain.posterior_std if self.std == "posterior" else self.chain.beta_std) * noise_scale
        return sample_chain(self.on_states(obs), self.chain, noises, std, clip_x0=self.clip_x0, clip_x=self.clip_x)

    def perturbed(self, act: Tensor, eps: Tensor, i: Tensor) -> Tensor:
        """Dataset actions `act` (B, A) with noise `eps` (B, A) added as at the steps `i` (B,): (B, A)."""
        return perturb(act, eps, self.chain.signal[i], self.chain.noise[i])

    def draw_candidates(self, n_obs: int, n: int, deterministic: bool, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the noise of `candidates`, and the Gumbel noise by which `select_action` chooses among them.

        Args:
            n_obs: Number of observations.
            n: Candidates of each observation; at most N_FIXED if deterministic.
            deterministic: Whether to take the fixed noise, the same for every observation, and no Gumbel noise.
            generator: Source of the random numbers otherwise.

        Returns:
            "noises", (T + 1, n_obs or 1, n, A), and unless deterministic "gumbel", (n_obs, n).
        """
        if deterministic:
            return {"noises": self.fixed_noise[:n].transpose(0, 1)[:, None]}  # (T + 1, 1, n, A)
        return {"noises": self.noises((n_obs, n), generator), "gumbel": gumbel((n_obs, n), generator)}

    def candidates(self, obs: Tensor, noises: Tensor, config: Any, noise_scale: float = 1.0) -> Tensor:
        """Sample n actions for each observation.

        Args:
            obs: (B, S).
            noises: (T + 1, B or 1, n, A).
            config: The agent's hyperparameters, of which `solver` and `solver_steps` are used as in `sample`.
            noise_scale: As in `sample`.

        Returns:
            (B, n, A), clamped to [-1, 1].
        """
        return self.sample(obs[:, None], noises, noise_scale, config.solver, config.solver_steps).clamp(-1.0, 1.0)
