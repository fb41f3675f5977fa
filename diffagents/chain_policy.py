"""A diffusion chain as a policy: a noise predictor, its sampler, and the fixed noise of its deterministic samples.

Shared by Diffusion-QL, DiffCPS, IDQL, BDPO and diffusion BC, whose samplers differ in three switches.
"""

import torch
from torch import Tensor, nn

from diffagents.diffusion import Chain, perturb, sample_chain, vp_chain
from diffagents.knobs import N_FIXED


class ChainPolicy(nn.Module):
    """pi(a|s) by T denoising steps of `net(a, obs, i)`.

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

    def predict_eps(self, a: Tensor, obs: Tensor, i: int) -> Tensor:
        """Noise in `a` (..., A) at step i of 0..T-1; obs (..., S)."""
        eps: Tensor = self.net(a, obs, torch.full((1,) * (a.dim() - 1), i, device=a.device))
        return eps

    def sample(self, obs: Tensor, noises: Tensor, noise_scale: float = 1.0) -> Tensor:
        """a ~ pi(.|s) from `noises` (T + 1, ..., A), for obs (..., S): (..., A). Gradients flow through all T steps."""
        std = (self.chain.posterior_std if self.std == "posterior" else self.chain.beta_std) * noise_scale
        return sample_chain(
            lambda a, i: self.predict_eps(a, obs, i), self.chain, noises, std, clip_x0=self.clip_x0, clip_x=self.clip_x
        )

    def perturbed(self, act: Tensor, eps: Tensor, i: Tensor) -> Tensor:
        """Dataset actions (B, A) with the noise `eps` of steps i (B,)."""
        return perturb(act, eps, self.chain.signal[i], self.chain.noise[i])

    def candidates(
        self, obs: Tensor, n: int, deterministic: bool, generator: torch.Generator, noise_scale: float = 1.0
    ) -> Tensor:
        """n samples for each observation, (B, S) -> (B, n, A), clamped to [-1, 1].

        deterministic: from the fixed noises, the same for every observation; n is at most N_FIXED.
        """
        if deterministic:
            fixed = self.fixed_noise[:n].transpose(0, 1)[:, None]  # (T + 1, 1, n, A)
            noises = fixed.expand(-1, len(obs), -1, -1)
        else:
            noises = self.noises((len(obs), n), generator)
        return self.sample(obs[:, None], noises, noise_scale).clamp(-1.0, 1.0)
