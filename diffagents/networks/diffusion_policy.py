"""A diffusion chain as a policy: noise predictors, their sampler, and the fixed noise of its deterministic samples.

Shared by Diffusion-QL, DiffCPS, IDQL, BDPO and diffusion BC, whose samplers differ in three switches. All noise predictors
begin with a layer that is linear in [action, time, state]; `on_states` uses it to compute the shares of states and times
once for all candidates and denoising steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffagents.config.checks import N_FIXED
from diffagents.diffusion.chain import Chain, sample_chain, sample_ddim, vp_chain
from diffagents.functional import gumbel, perturb
from diffagents.networks.mlp import MLP, Mish, sinusoids

DenoiserOnStates = Callable[[Tensor, int], Tensor]
"""(a_i (..., A), i) -> noise (..., A), for the states that it was made for."""


def _on_states(
    first: nn.Module,
    rest: Callable[[Tensor], Tensor],
    time_features: Callable[[Tensor], Tensor],
    obs: Tensor,
    n_steps: int,
    state_before_time: bool = False,
) -> DenoiserOnStates:
    """A noise predictor for states (..., S) and the steps 0..n_steps - 1, its first layer split into three products."""
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
    """

    TIME_DIM = 16

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int] = (256, 256, 256)) -> None:
        super().__init__()
        self.time_mlp = MLP(self.TIME_DIM, (2 * self.TIME_DIM,), self.TIME_DIM, Mish)
        self.trunk = MLP(act_dim + self.TIME_DIM + obs_dim, hidden, act_dim, Mish)

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        """`a_t` (..., A); `obs` (..., S) and the step `t` (...,), counted from 0, may have sizes of 1 to expand."""
        lead = a_t.shape[:-1]
        out: Tensor = self.trunk(torch.cat([a_t, self.time_features(t).expand(*lead, -1), obs.expand(*lead, -1)], -1))
        return out

    def time_features(self, t: Tensor) -> Tensor:
        """t (...,) -> (..., TIME_DIM)."""
        time: Tensor = self.time_mlp(torch.cat(sinusoids(t, self.TIME_DIM), -1))
        return time

    def on_states(self, obs: Tensor, n_steps: int) -> DenoiserOnStates:
        return _on_states(self.trunk[0], self.trunk.rest, self.time_features, obs, n_steps)


class ChainPolicy(nn.Module):
    """pi(a|s) by T denoising steps of `net(a, obs, i)`, one of the noise predictors above.

    std: "posterior" (Diffusion-QL, DiffCPS) or "beta" (IDQL, BDPO). clip_x0, clip_x: see `diffusion.sample_chain`.
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
        self.register_buffer("fixed_noise", torch.randn(N_FIXED, n_steps + 1, act_dim))

    @property
    def chain(self) -> Chain:
        return Chain(*(getattr(self, name) for name in Chain._fields))

    def noises(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The random numbers of `sample` for samples of `shape`: (T + 1, *shape, A)."""
        return torch.randn((self.n_steps + 1, *shape, self.act_dim), generator=generator, device=generator.device)

    def on_states(self, obs: Tensor) -> DenoiserOnStates:
        """The noise predictor for obs (..., S) alone: a function of (a (..., A), i of 0..T-1)."""
        eps: DenoiserOnStates = self.net.on_states(obs, self.n_steps)  # type: ignore[operator]
        return eps

    def sample(
        self, obs: Tensor, noises: Tensor, noise_scale: float = 1.0, solver: str = "ddpm", n_steps: int | None = None
    ) -> Tensor:
        """a ~ pi(.|s) from `noises` (T + 1, ..., A), for obs (..., S): (..., A). Gradients flow through all steps.

        solver: "ddpm", the chain itself, or "ddim" in n_steps (None: T), which takes noises[0] alone.
        """
        if solver == "ddim":
            steps, clips = n_steps or self.n_steps, {"clip_x0": self.clip_x0, "clip_x": self.clip_x}
            return sample_ddim(self.on_states(obs), self.chain, noises[0] * noise_scale, steps, **clips)
        std = (self.chain.posterior_std if self.std == "posterior" else self.chain.beta_std) * noise_scale
        return sample_chain(self.on_states(obs), self.chain, noises, std, clip_x0=self.clip_x0, clip_x=self.clip_x)

    def perturbed(self, act: Tensor, eps: Tensor, i: Tensor) -> Tensor:
        """Dataset actions (B, A) with the noise `eps` of steps i (B,)."""
        return perturb(act, eps, self.chain.signal[i], self.chain.noise[i])

    def draw_candidates(self, n_obs: int, n: int, deterministic: bool, generator: torch.Generator) -> dict[str, Tensor]:
        """The random numbers of `candidates`, and "gumbel" (n_obs, n) to choose one of them by.

        deterministic: the fixed noises, the same for every observation, of at most N_FIXED candidates, and no "gumbel".
        """
        if deterministic:
            return {"noises": self.fixed_noise[:n].transpose(0, 1)[:, None]}  # (T + 1, 1, n, A)
        return {"noises": self.noises((n_obs, n), generator), "gumbel": gumbel((n_obs, n), generator)}

    def candidates(self, obs: Tensor, noises: Tensor, config: Any, noise_scale: float = 1.0) -> Tensor:
        """n samples for each observation, (B, S), noises (T + 1, B or 1, n, A) -> (B, n, A), clamped to [-1, 1].

        config: `solver` and `solver_steps`, as in `sample`.
        """
        return self.sample(obs[:, None], noises, noise_scale, config.solver, config.solver_steps).clamp(-1.0, 1.0)
