"""The behaviour model of QGPO and SfBC: a noise predictor in continuous time, and samples from it by a DPM-Solver.

Shapes: B batch, N observations, S observation, A action, M or n samples of one state; times t in (0, 1].
"""

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffagents.config.checks import N_FIXED
from diffagents.diffusion.sde import SolverStep, dpm_solve, vp_alpha_sigma
from diffagents.functional import eps_loss, perturb
from diffagents.networks.mlp import fixed_noise


class FourierTime(nn.Module):
    """Time features of QGPO and SfBC: 16 fixed frequencies W ~ N(0, 30^2), [sin, cos](2 pi W t), Linear 32-32."""

    frequencies: Tensor
    DIM, FREQUENCY_SCALE = 32, 30.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(self.DIM // 2) * self.FREQUENCY_SCALE)
        self.project = nn.Linear(self.DIM, self.DIM)

    def forward(self, t: Tensor) -> Tensor:
        """t (...,) in (0, 1] -> (..., 32)."""
        phase = t[..., None] * self.frequencies * 2.0 * math.pi
        out: Tensor = self.project(torch.cat([torch.sin(phase), torch.cos(phase)], -1))
        return out


class ConditionedBlock(nn.Module):
    """silu(W2 (silu(W1 x) + V silu(e))) + skip x, where skip is a Linear if the sizes differ, else the identity.

    Source: `Residual_Block` in SfBC's official code. x is (..., in_dim), the embedding e (..., 128), the result (..., out_dim).
    """

    EMBED_DIM = 128

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(in_dim, out_dim), nn.Linear(out_dim, out_dim)
        self.condition = nn.Linear(self.EMBED_DIM, out_dim)
        self.skip = nn.Linear(in_dim, out_dim) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.inner(x)) + self.condition(F.silu(embedding))
        out: Tensor = F.silu(self.outer(h)) + self.skip(x)
        return out


class UNetDenoiser(nn.Module):
    """Noise predictor eps(a_t, s, t) of QGPO's and SfBC's behaviour model: `ScoreNet` in their official code.

    Time and state (Linear S-32, SiLU) are embedded together, 64-128-128, and enter every block. The blocks go down A - w - w/2
    - w/4, have one in the middle, and go up again with the outputs of the way down concatenated (skip connections); a
    Linear 2w - A ends them. The official network is written as a score h / sigma_t with h trained to -eps; this one predicts
    eps = -h, which is the same network with the sign of its last layer changed.

    Args:
        obs_dim: S.
        act_dim: A.
        width: w, at least 4; 512 in the official code.

    Raises:
        ValueError: If `width` is too small.
    """

    def __init__(self, obs_dim: int, act_dim: int, width: int = 512) -> None:
        super().__init__()
        embed, half, quarter = ConditionedBlock.EMBED_DIM, width // 2, width // 4
        if quarter < 1:
            raise ValueError(f"behavior_width={width} must be at least 4, because the narrowest layers are a quarter as wide")
        self.time = FourierTime()
        self.state = nn.Linear(obs_dim, FourierTime.DIM)
        self.embed = nn.Sequential(nn.Linear(2 * FourierTime.DIM, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.down = nn.ModuleList(
            ConditionedBlock(n_in, n_out) for n_in, n_out in ((act_dim, width), (width, half), (half, quarter))
        )
        self.middle = ConditionedBlock(quarter, quarter)
        self.up = nn.ModuleList((ConditionedBlock(2 * quarter, half), ConditionedBlock(2 * half, width)))
        self.output = nn.Linear(2 * width, act_dim)

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in noisy actions.

        Args:
            a_t: Noisy actions, (..., A).
            obs: (..., S); broadcast against the actions.
            t: Times in (0, 1], (...,); broadcast against the actions.

        Returns:
            (..., A). Each pair of observation and time is embedded once.
        """
        both = torch.broadcast_tensors(F.silu(self.state(obs)), self.time(t))  # type: ignore[no-untyped-call]
        embedding = self.embed(torch.cat(both, -1))
        kept, h = [], a_t
        for block in self.down:
            h = block(h, embedding)
            kept.append(h)
        h = self.middle(h, embedding)
        for block in self.up:
            h = block(torch.cat([kept.pop(), h], -1), embedding)
        out: Tensor = self.output(torch.cat([kept.pop(), h], -1))
        return out


class VPBehavior(nn.Module):
    """The behaviour model mu(a|s) of QGPO and SfBC.

    Args:
        net: A noise predictor, net(a_t, obs, t).
        act_dim: A.

    Attributes:
        fixed_noise: The x_1 from which deterministic samples start, (N_FIXED, A), saved with the model.
    """

    fixed_noise: Tensor

    def __init__(self, net: nn.Module, act_dim: int) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("fixed_noise", fixed_noise(N_FIXED, act_dim))

    def loss(self, act: Tensor, obs: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Denoising loss E || eps(a_t | s, t) - eps ||^2.

        Source: Song et al. 2021, Eq. (7), weighted by sigma_t^2.

        Args:
            act: Dataset actions, (B, A).
            obs: (B, S).
            t: Times in (0, 1], (B,).
            eps: Standard normal noise, (B, A).

        Returns:
            A scalar.
        """
        return eps_loss(self.net(perturb(act, eps, *vp_alpha_sigma(t)), obs, t), eps)

    def noise(self, n_obs: int, n: int, deterministic: bool, generator: torch.Generator) -> Tensor:
        """The x_1 of samples.

        Args:
            n_obs: Number of observations.
            n: Samples of each observation; at most N_FIXED if deterministic.
            deterministic: Whether to take the fixed noise, the same for every observation.
            generator: Source of the random numbers otherwise.

        Returns:
            (n_obs, n, A), or (1, n, A) if deterministic.
        """
        if not deterministic:
            size = (n_obs, n, self.fixed_noise.shape[1])
            return torch.randn(size, generator=generator, device=self.fixed_noise.device)
        return self.fixed_noise[None, :n]

    def sample(self, obs: Tensor, noise: Tensor, steps: tuple[SolverStep, ...]) -> Tensor:
        """Sample a ~ mu(.|s) by a DPM-Solver.

        Args:
            obs: (B, S).
            noise: x_1, (B or 1, M, A).
            steps: The solver's constants, from `dpm_solver_steps`.

        Returns:
            Actions, (B, M, A), not clipped.
        """
        obs = obs[:, None]
        return dpm_solve(lambda a, t: self.net(a, obs, t), noise.expand(obs.shape[0], -1, -1), steps)

    @torch.no_grad()
    def support(
        self, obs: Tensor, n: int, steps: tuple[SolverStep, ...], generator: torch.Generator, name: str | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Sample actions for many observations, a few rows at a time.

        Args:
            obs: (N, S).
            n: Samples of each observation.
            steps: The solver's constants, from `dpm_solver_steps`.
            generator: Source of the random numbers.
            name: Start of the line that is printed if this will take more than a few seconds; None prints nothing.

        Yields:
            The rows of `obs` and their actions, (rows, n, A).
        """
        rows_at_once, start = 256, time.perf_counter()
        for first in range(0, len(obs), rows_at_once):
            rows = slice(first, min(first + rows_at_once, len(obs)))
            yield rows, self.sample(obs[rows], self.noise(rows.stop - rows.start, n, False, generator), steps)
            if name is not None and first == rows_at_once:  # the very first call is slower
                if obs.is_cuda:
                    torch.cuda.synchronize(obs.device)
                seconds = (time.perf_counter() - start) * len(obs) / rows.stop
                if seconds > 5:
                    print(
                        f"{name}: {n} actions of the behaviour model for each of {len(obs):,} states; "
                        f"about {seconds / 60:.1f} minutes",
                        flush=True,
                    )
